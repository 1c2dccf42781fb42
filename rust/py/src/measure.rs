//! Measuring the drive and the CPU, for `megatrain-io bench` and the comparisons in `benches/`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use megatrain_io::Error;
use megatrain_io::io::{Engine, start};
use megatrain_io::measure::{self, Figure, Form, Limit, Traffic, Transfers};
use megatrain_io::optimizer::{AdamW, Kernel};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::raise;
use crate::store::engine_of;

/// A file to measure transfers on, with an engine. It has no name: nothing is left behind.
#[pyclass(frozen, module = "megatrain_io._lib")]
#[derive(Debug)]
pub(crate) struct ScratchFile {
    inner: Mutex<Option<measure::ScratchFile>>,
    engine: Arc<dyn Engine>,
    refused: Option<String>,
}

#[pymethods]
impl ScratchFile {
    #[new]
    fn new(py: Python<'_>, folder: PathBuf, nbytes: u64, engine: &str) -> PyResult<Self> {
        let choice = engine_of(engine)?;
        py.detach(|| {
            let (engine, refused) = start(choice, 1)?;
            let file = measure::ScratchFile::create(&folder, nbytes)?;
            Ok(Self { inner: Mutex::new(Some(file)), engine, refused })
        })
        .map_err(raise)
    }

    /// The engine's name, and why `auto` did not take `uring`.
    #[getter]
    fn engine(&self) -> (&'static str, Option<String>) {
        (self.engine.name(), self.refused.clone())
    }

    /// Whether transfers bypass the page cache.
    #[getter]
    fn is_direct(&self) -> PyResult<bool> {
        self.with(measure::ScratchFile::is_direct)
    }

    /// Transfers from `offset` on, round and round; `form` is bytes of a request and requests
    /// in flight, `limit` the bytes and, unless `None`, the seconds after which it ends. A figure.
    fn transfer<'py>(
        &self,
        py: Python<'py>,
        traffic: &str,
        form: (usize, usize),
        limit: (u64, Option<f64>),
        offset: u64,
    ) -> PyResult<Bound<'py, PyDict>> {
        let traffic = traffic_of(traffic)?;
        let (bytes, depth) = form;
        let limit = Limit { bytes: limit.0, time: seconds_of(limit.1)? };
        let run = |file: &measure::ScratchFile| {
            let transfers = match traffic {
                Traffic::Training => Transfers::for_training(&self.engine, depth),
                _ => Transfers::new(&self.engine, Form { bytes, depth }),
            }?;
            let refused = transfers.registration_refused().map(str::to_owned);
            transfers.run(file, traffic, offset, limit).map(|figure| (figure, refused))
        };
        let (figure, refused) = py.detach(|| self.with(run))?.map_err(raise)?;
        let fields = fields_of(py, figure)?;
        fields.set_item("registration_refused", refused)?;
        Ok(fields)
    }

    /// Writes the whole file once.
    fn fill(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.with(|file| file.fill(&self.engine)))?.map_err(raise)
    }

    /// Reads the whole file and compares it with what was written.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.with(|file| file.verify(&self.engine)))?.map_err(raise)
    }

    /// Seconds of each `fdatasync` after 4 MiB were written, and of each durable write of 4 KiB.
    fn flush_latency(
        &self,
        py: Python<'_>,
        count: usize,
        seconds: f64,
    ) -> PyResult<(Vec<f64>, Vec<f64>)> {
        let time = seconds_of(Some(seconds))?;
        let run = |file: &measure::ScratchFile| file.flush_latency(&self.engine, count, time);
        let found = py.detach(|| self.with(run))?.map_err(raise)?;
        let seconds = |times: &[Duration]| times.iter().map(Duration::as_secs_f64).collect();
        Ok((seconds(&found.sync), seconds(&found.durable_write)))
    }

    /// Closes the file, which gives its space back.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.lock().take()));
    }
}

impl ScratchFile {
    fn with<T>(&self, work: impl FnOnce(&measure::ScratchFile) -> T) -> PyResult<T> {
        match &*self.lock() {
            Some(file) => Ok(work(file)),
            None => Err(raise(Error::invalid("the scratch file was closed"))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<measure::ScratchFile>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Work to measure on all cores, by its name: `copy`, `update`, `checksum`,
/// `adamw f32`, `adamw split`, and both with ` in place`.
#[pyclass(frozen, module = "megatrain_io._lib")]
#[derive(Debug)]
pub(crate) struct Workload {
    inner: Mutex<measure::Workload>,
}

#[pymethods]
impl Workload {
    #[new]
    #[pyo3(signature = (name, parameters, kernel = None))]
    fn new(py: Python<'_>, name: &str, parameters: usize, kernel: Option<&str>) -> PyResult<Self> {
        let made = py.detach(|| measure::Workload::named(name, parameters, kernel));
        Ok(Self { inner: Mutex::new(made.map_err(raise)?) })
    }

    /// Runs the work once. Returns a figure.
    fn run<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let run = || self.inner.lock().unwrap_or_else(PoisonError::into_inner).run();
        let figure = py.detach(run);
        fields_of(py, figure)
    }
}

fn fields_of(py: Python<'_>, figure: Figure) -> PyResult<Bound<'_, PyDict>> {
    let fields = PyDict::new(py);
    fields.set_item("read", figure.read)?;
    fields.set_item("written", figure.written)?;
    fields.set_item("seconds", figure.wall.as_secs_f64())?;
    fields.set_item("cpu_seconds", figure.cpu.as_secs_f64())?;
    Ok(fields)
}

fn traffic_of(name: &str) -> PyResult<Traffic> {
    match name {
        "read" => Ok(Traffic::Read),
        "write" => Ok(Traffic::Write),
        "mixed" => Ok(Traffic::Mixed),
        "training" => Ok(Traffic::Training),
        _ => Err(PyValueError::new_err(format!("no traffic is called {name:?}"))),
    }
}

fn seconds_of(seconds: Option<f64>) -> PyResult<Duration> {
    let Some(seconds) = seconds else { return Ok(Duration::MAX) };
    Duration::try_from_secs_f64(seconds).map_err(|error| PyValueError::new_err(error.to_string()))
}

/// One step of AdamW (Loshchilov and Hutter, arXiv:1711.05101) on little-endian f32, as training makes
/// it, for comparing bits with another implementation: the new weight, `exp_avg` and `exp_avg_sq`.
/// `adamw` is `(learning_rate, beta1, beta2, eps, step)`.
#[pyfunction]
pub(crate) fn adamw_step<'py>(
    py: Python<'py>,
    weight: &[u8],
    gradient: &[u8],
    moments: (Vec<u8>, Vec<u8>),
    adamw: (f64, f64, f64, f64, u64),
    weight_decay: f64,
) -> PyResult<[Bound<'py, PyBytes>; 3]> {
    let [mut weight, gradient, mut exp_avg, mut exp_avg_sq] =
        [weight, gradient, &moments.0, &moments.1].map(floats);
    let len = weight.len();
    if [&gradient, &exp_avg, &exp_avg_sq].iter().any(|plane| plane.len() != len) {
        return Err(PyValueError::new_err("the planes differ in length"));
    }
    let (learning_rate, beta1, beta2, eps, step) = adamw;
    let adamw = AdamW { learning_rate, beta1, beta2, eps, step };
    py.detach(|| {
        let planes = [&mut weight, &mut exp_avg, &mut exp_avg_sq].map(Vec::as_mut_slice);
        adamw.update_tensor(Kernel::detect(), 1.0, weight_decay, &gradient, planes);
    });
    Ok([weight, exp_avg, exp_avg_sq].map(|plane| {
        let bytes: Vec<u8> = plane.iter().flat_map(|value| value.to_le_bytes()).collect();
        PyBytes::new(py, &bytes)
    }))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let value = |part: &[u8]| part.try_into().map_or(0.0, f32::from_le_bytes);
    bytes.chunks_exact(4).map(value).collect()
}
