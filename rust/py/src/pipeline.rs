//! The pipeline and its schedule, as Python sees them.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use megatrain_io::memory::{self, BufferKind, PoolSizes, Slot};
use megatrain_io::optimizer::{AdamW, Hyperparameters, Kernel};
use megatrain_io::pipeline::{
    self, After, Cause, ChunkOp, GradientFiles, Kind, Options, Residents, TensorSettings,
};
use megatrain_io::{Dtype, Error, StateFormat, Unit};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::dlpack::Buffer;
use crate::error::raise;
use crate::store::Store;

/// How long a wait goes on before signals (Ctrl-C) are looked at.
pub(crate) const PATIENCE: Duration = Duration::from_millis(100);

/// Lane, name, chunk, start and end of an event; times are nanoseconds of `time.monotonic_ns`.
type EventTuple = (String, &'static str, Option<usize>, u64, u64);

/// The chunk operations of one step, checked against a store.
#[pyclass(frozen, module = "megatrain_io._lib")]
#[derive(Debug)]
pub(crate) struct CheckedSchedule {
    inner: Arc<pipeline::CheckedSchedule>,
}

#[pymethods]
impl CheckedSchedule {
    /// `operations` is a list of `("load" | "apply" | "update" | "defer", chunk)`; `unit` as for the
    /// pipeline that it is for.
    #[new]
    #[pyo3(signature = (store, operations, unit="record"))]
    fn new(store: &Store, operations: Vec<(String, usize)>, unit: &str) -> PyResult<Self> {
        let operations = operations
            .into_iter()
            .map(|(kind, chunk)| match kind.as_str() {
                "load" => Ok(ChunkOp { kind: Kind::Load, chunk }),
                "apply" => Ok(ChunkOp { kind: Kind::Apply, chunk }),
                "update" => Ok(ChunkOp { kind: Kind::Update, chunk }),
                "defer" => Ok(ChunkOp { kind: Kind::Defer, chunk }),
                _ => Err(PyValueError::new_err(format!(
                    "operation {kind:?}: load, apply, update or defer"
                ))),
            })
            .collect::<PyResult<Vec<_>>>()?;
        let (store, unit) = (store.get()?, unit_of(unit)?);
        let schedule =
            pipeline::CheckedSchedule::new(store.units(unit), operations).map_err(raise)?;
        Ok(Self { inner: Arc::new(schedule) })
    }
}

/// Reads ahead, updates and writes behind, while the caller computes.
#[pyclass(frozen, module = "megatrain_io._lib")]
#[derive(Debug)]
pub(crate) struct Pipeline {
    inner: Mutex<Option<Arc<pipeline::Pipeline>>>,
}

#[pymethods]
impl Pipeline {
    /// `pool` has `(bytes, count)` of `chunk_slots` and `outgoing`, and lists `(format, bytes, count)` of each kind
    /// of buffer for `weights` and `gradients`, where format `None` is for records of all; `tensors` lists
    /// `(record, offset, elements, weight_decay, lr_scale)` of every trained tensor in order; `residents`
    /// lists the units whose weights stay in RAM, the chunks whose update planes do, and the units
    /// whose gradients have a buffer of their own; `gradient_files` is where other gradients wait that are deferred.
    /// A unit is what one buffer holds: `"record"` or `"chunk"`.
    #[new]
    #[pyo3(signature = (store, pool, threads, kernel, tensors, residents, gradient_files, unit="record"))]
    #[expect(clippy::too_many_arguments, reason = "each is set once, in one place")]
    fn new(
        py: Python<'_>,
        store: &Store,
        pool: PoolArguments,
        threads: usize,
        kernel: Option<&str>,
        tensors: Vec<(usize, u64, u64, f64, f64)>,
        residents: (Vec<usize>, Vec<usize>, Vec<usize>),
        gradient_files: Vec<PathBuf>,
        unit: &str,
    ) -> PyResult<Self> {
        let kernel = kernel.map(kernel_of).transpose()?;
        let unit = unit_of(unit)?;
        let tensors = tensors
            .into_iter()
            .map(|(record, offset, elements, weight_decay, lr_scale)| TensorSettings {
                record,
                offset,
                elements,
                weight_decay,
                lr_scale,
            })
            .collect();
        let (records, chunks, gradients) = residents;
        let residents = Residents { records, chunks, gradients };
        let (store, pool) = (store.get()?, pool.sizes()?);
        let start = || {
            let gradient_files = if gradient_files.is_empty() {
                GradientFiles::default()
            } else {
                let units = store.units(unit);
                GradientFiles::create(&gradient_files, units, &residents.gradients)?
            };
            let options =
                Options { pool, threads, kernel, tensors, residents, gradient_files, unit };
            pipeline::Pipeline::start(store, &options)
        };
        let pipeline = py.detach(start).map_err(raise)?;
        Ok(Self { inner: Mutex::new(Some(Arc::new(pipeline))) })
    }

    /// Why the pool could not be registered with the kernel, if so.
    #[getter]
    fn registration_refused(&self) -> PyResult<Option<String>> {
        Ok(self.get()?.registration_refused().map(str::to_owned))
    }

    /// `(huge, nbytes)`: bytes of the pool that lay in huge pages when it was made, and that could.
    #[getter]
    fn huge_pages(&self) -> PyResult<Option<(u64, u64)>> {
        Ok(self.get()?.huge_pages().map(|found| (found.huge, found.bytes)))
    }

    /// Begins a step: its reads start at once. `hyperparameters` has the `optimizer`'s name and what that
    /// one needs; `commits` says whether `end` will get a blob.
    fn begin(
        &self,
        schedule: &CheckedSchedule,
        hyperparameters: &Bound<'_, PyAny>,
        commits: bool,
    ) -> PyResult<()> {
        let hyperparameters = hyperparameters_of(hyperparameters)?;
        self.get()?.begin(Arc::clone(&schedule.inner), hyperparameters, commits).map_err(raise)
    }

    /// The weights of the schedule's next load, which must be of `unit`. Waits for them, `patience`
    /// seconds where that is given: then `None` when they have passed.
    #[pyo3(signature = (unit, patience=None))]
    fn take_weights(
        &self,
        py: Python<'_>,
        unit: usize,
        patience: Option<f64>,
    ) -> PyResult<Option<Buffer>> {
        let pipeline = self.get()?;
        let slot = wait_at_most(py, patience, |timeout| pipeline.take_weights(unit, timeout))?;
        slot.map(|slot| weights_buffer(&pipeline, unit, slot)).transpose()
    }

    /// A free fp32 gradient buffer for `unit`; its content is arbitrary. Waits for one as `take_weights`.
    #[pyo3(signature = (unit, patience=None))]
    fn take_gradient(
        &self,
        py: Python<'_>,
        unit: usize,
        patience: Option<f64>,
    ) -> PyResult<Option<Buffer>> {
        let pipeline = self.get()?;
        let slot = wait_at_most(py, patience, |timeout| pipeline.take_gradient(unit, timeout))?;
        let Some(slot) = slot else { return Ok(None) };
        let elements = elements_of(&pipeline, unit)?;
        let what = format!("gradient of {}", pipeline.describe(unit).map_err(raise)?);
        Ok(Some(Buffer::new(slot, Dtype::F32, elements, what)))
    }

    /// By chunk, a free buffer for the weights of `unit` that come back for their update; its content is
    /// arbitrary. Waits for one as `take_weights`.
    #[pyo3(signature = (unit, patience=None))]
    fn take_outgoing(
        &self,
        py: Python<'_>,
        unit: usize,
        patience: Option<f64>,
    ) -> PyResult<Option<Buffer>> {
        let pipeline = self.get()?;
        let slot = wait_at_most(py, patience, |timeout| pipeline.take_outgoing(unit, timeout))?;
        slot.map(|slot| weights_buffer(&pipeline, unit, slot)).transpose()
    }

    /// Hands the gradient of a whole unit over, with its weights, or without where the step does not
    /// update with it; no tensor over either may live.
    fn submit(&self, unit: usize, weights: Option<&Buffer>, gradient: &Buffer) -> PyResult<()> {
        let (weights, gradient) = (weights.map(Buffer::take).transpose()?, gradient.take()?);
        self.get()?.submit(unit, weights, gradient).map_err(raise)
    }

    /// Say that a unit got no gradient in this step: it is not updated, nor counted as updated. Weights that stay in RAM
    /// are handed over, and go back to the pool; others may be.
    fn skip(&self, unit: usize, weights: Option<&Buffer>) -> PyResult<()> {
        let weights = weights.map(Buffer::take).transpose()?;
        self.get()?.skip(unit, weights).map_err(raise)
    }

    /// The one mapping beneath all buffers of the pool, to register it with a device by address and length.
    /// A tensor over it keeps it mapped; nobody may read or write through it.
    fn pool_memory(&self) -> PyResult<Buffer> {
        Ok(Buffer::of_region(Arc::clone(&self.get()?.pool().region)))
    }

    /// The sum of the squares of all gradients of the step. Waits for the last one.
    fn squares(&self, py: Python<'_>) -> PyResult<f64> {
        let pipeline = self.get()?;
        wait(py, || pipeline.squares(PATIENCE))
    }

    /// Ends the step; with a blob it is committed in the background. `applied`: the next step
    /// applies the gradients that were deferred, multiplied by it; `None`: the step's updates stand.
    fn end(&self, blob: Option<Vec<u8>>, applied: Option<f32>) -> PyResult<()> {
        let after = applied.map_or(After::Stands, After::Applied);
        self.get()?.end(blob, after).map_err(raise)
    }

    /// Waits until every finished step is durable: written, and committed if that was asked for.
    fn wait_durable(&self, py: Python<'_>) -> PyResult<()> {
        let pipeline = self.get()?;
        wait(py, || pipeline.wait_durable(PATIENCE).map(|durable| durable.then_some(())))
    }

    /// Drops the pending step, back to the last commit; a step that is finished with a blob is committed
    /// first.
    fn abort(&self, py: Python<'_>) -> PyResult<()> {
        let pipeline = self.get()?;
        py.detach(|| pipeline.abort()).map_err(raise)
    }

    /// Seconds since the start: `stall_read`, `stall_pool`, `stall_write`, `stall_update`, `stall_commit`,
    /// `update`, `verify`.
    fn timings(&self) -> PyResult<Vec<(String, f64)>> {
        let pipeline = self.get()?;
        let timings = pipeline.timings();
        let seconds = |nanoseconds| Duration::from_nanos(nanoseconds).as_secs_f64();
        let stalls = Cause::ALL
            .map(|cause| (format!("stall_{}", cause.name()), seconds(timings.stalled(cause))));
        let work = [("update", &timings.update), ("verify", &timings.verify)]
            .map(|(name, counter)| (name.to_owned(), seconds(counter.load(Ordering::Relaxed))));
        Ok(stalls.into_iter().chain(work).collect())
    }

    /// Records events from now on, for `take_events`.
    fn record_events(&self) -> PyResult<()> {
        self.get()?.record_events();
        Ok(())
    }

    /// `(lane, name, chunk, start, end)` of each event since the last call, and how many more were dropped;
    /// times are nanoseconds of `time.monotonic_ns`.
    fn take_events(&self) -> PyResult<(Vec<EventTuple>, u64)> {
        let taken = self.get()?.take_events();
        let events = taken
            .events
            .into_iter()
            .map(|event| (event.lane.to_string(), event.name, event.chunk, event.start, event.end))
            .collect();
        Ok((events, taken.dropped))
    }

    /// Writes the finished steps, drops a pending one, and stops.
    fn close(&self, py: Python<'_>) {
        let taken = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(taken));
    }
}

impl Pipeline {
    fn get(&self) -> PyResult<Arc<pipeline::Pipeline>> {
        let pipeline = self.inner.lock().unwrap_or_else(PoisonError::into_inner).clone();
        pipeline.ok_or_else(|| raise(Error::invalid("the pipeline is closed")))
    }
}

/// Format, bytes and count of a kind of buffer.
type KindTuple = (Option<String>, usize, usize);

/// Sizes of all kinds of slot.
#[derive(Debug, FromPyObject)]
pub(crate) struct PoolArguments {
    #[pyo3(item)]
    chunk_slots: (usize, usize),
    #[pyo3(item)]
    weights: Vec<KindTuple>,
    #[pyo3(item)]
    outgoing: (usize, usize),
    #[pyo3(item)]
    gradients: Vec<KindTuple>,
}

impl PoolArguments {
    fn sizes(&self) -> PyResult<PoolSizes> {
        let kind = |(bytes, count)| memory::Kind { bytes, count };
        let buffers = |kinds: &[KindTuple]| {
            kinds
                .iter()
                .map(|(format, bytes, count)| {
                    let format = format.as_deref().map(format_of).transpose()?;
                    Ok(BufferKind { format, slots: kind((*bytes, *count)) })
                })
                .collect::<PyResult<Vec<_>>>()
        };
        Ok(PoolSizes {
            chunk_slots: kind(self.chunk_slots),
            weights: buffers(&self.weights)?,
            outgoing: kind(self.outgoing),
            gradients: buffers(&self.gradients)?,
        })
    }
}

/// What an `AdamWStep` has.
#[derive(Debug, FromPyObject)]
struct AdamWArguments {
    learning_rate: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    /// Counted from 1; of stores whose records have no count of their own.
    step: u64,
}

fn hyperparameters_of(step: &Bound<'_, PyAny>) -> PyResult<Hyperparameters> {
    match step.getattr("optimizer")?.extract::<String>()?.as_str() {
        "adamw" => {
            let AdamWArguments { learning_rate, beta1, beta2, eps, step } = step.extract()?;
            Ok(Hyperparameters::AdamW(AdamW { learning_rate, beta1, beta2, eps, step }))
        }
        other => Err(PyValueError::new_err(format!("optimizer {other:?}: adamw"))),
    }
}

/// Waits without the interpreter lock, looking at signals in between.
pub(crate) fn wait<T: Send>(
    py: Python<'_>,
    poll: impl Fn() -> megatrain_io::Result<Option<T>> + Sync,
) -> PyResult<T> {
    loop {
        if let Some(value) = py.detach(&poll).map_err(raise)? {
            return Ok(value);
        }
        py.check_signals()?;
    }
}

/// Waits as `wait`, for `patience` seconds at most where that is given.
fn wait_at_most<T: Send>(
    py: Python<'_>,
    patience: Option<f64>,
    poll: impl Fn(Duration) -> megatrain_io::Result<Option<T>> + Sync,
) -> PyResult<Option<T>> {
    let Some(seconds) = patience else { return wait(py, || poll(PATIENCE)).map(Some) };
    let timeout = Duration::try_from_secs_f64(seconds)
        .map_err(|e| PyValueError::new_err(format!("patience of {seconds} seconds: {e}")))?;
    py.detach(|| poll(timeout)).map_err(raise)
}

fn weights_buffer(pipeline: &pipeline::Pipeline, unit: usize, slot: Slot) -> PyResult<Buffer> {
    let units = pipeline.units();
    let dtype = units.chunks()[units.records()[unit].start].format().weight_dtype();
    let what = format!("weights of {}", pipeline.describe(unit).map_err(raise)?);
    Ok(Buffer::new(slot, dtype, elements_of(pipeline, unit)?, what))
}

fn elements_of(pipeline: &pipeline::Pipeline, unit: usize) -> PyResult<usize> {
    let parameters = pipeline.units().record_parameters(unit);
    usize::try_from(parameters).map_err(|e| PyValueError::new_err(e.to_string()))
}

fn unit_of(name: &str) -> PyResult<Unit> {
    Unit::named(name).ok_or_else(|| {
        let names = Unit::ALL.map(Unit::name).join(" or ");
        PyValueError::new_err(format!("unit {name:?}: {names}"))
    })
}

fn format_of(name: &str) -> PyResult<StateFormat> {
    let named = StateFormat::ALL.into_iter().find(|format| format.spec().name == name);
    named.ok_or_else(|| PyValueError::new_err(format!("no state format is called {name:?}")))
}

fn kernel_of(name: &str) -> PyResult<Kernel> {
    let known = Kernel::available();
    known.iter().find(|kernel| kernel.to_string() == name).copied().ok_or_else(|| {
        let names: Vec<String> = known.iter().map(ToString::to_string).collect();
        PyValueError::new_err(format!("kernel {name:?}: this processor has {}", names.join(", ")))
    })
}
