//! Store, creator and ledger.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use megatrain_io::io::{Choice, Fault, Operation, Point};
use megatrain_io::memory::Slot;
use megatrain_io::store::{self, Chunk, Manifest, OpenOptions, ValueType};
use megatrain_io::{Error, Group};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::raise;
use crate::inspect;
use crate::uuid::uuid_text;

/// Bytes of allocated memory by account, now and at their peak.
#[pyclass(frozen, module = "megatrain_io._lib")]
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) inner: megatrain_io::memory::Ledger,
}

#[pymethods]
impl Ledger {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Sets the bytes that `account` holds now.
    fn set(&self, account: &str, nbytes: u64) {
        self.inner.set(account, nbytes);
    }

    /// `{account: (current, peak)}` in bytes.
    fn balances(&self) -> BTreeMap<String, (u64, u64)> {
        self.inner.balances().into_iter().map(|(name, b)| (name, (b.current, b.peak))).collect()
    }

    /// `(current, peak)` of all accounts together, in bytes.
    fn total(&self) -> (u64, u64) {
        let total = self.inner.total();
        (total.current, total.peak)
    }
}

/// A store that an import fills; it is one only when it is finished.
#[pyclass(frozen, module = "megatrain_io._lib")]
#[derive(Debug)]
pub(crate) struct StoreCreator {
    inner: Mutex<Option<(store::StoreCreator, Slot)>>,
    chunks: Vec<Chunk>,
    uuid: [u8; 16],
}

#[pymethods]
impl StoreCreator {
    #[new]
    fn new(
        py: Python<'_>,
        paths: Vec<PathBuf>,
        manifest: &[u8],
        engine: &str,
        ledger: &Ledger,
    ) -> PyResult<Self> {
        let manifest = Manifest::parse(manifest).map_err(|e| raise(Error::invalid(e)))?;
        let engine = engine_of(engine)?;
        py.detach(|| {
            let creator = store::StoreCreator::new(&paths, manifest, engine, &ledger.inner)?;
            let chunks = creator.layout()?.chunks().to_vec();
            let largest = chunks
                .iter()
                .flat_map(|c| Group::ALL.map(|g| c.extent_bytes(g)))
                .max()
                .unwrap_or(0);
            let slot = Slot::standalone(largest, &ledger.inner, "import")?;
            let uuid = creator.uuid()?;
            Ok(Self { inner: Mutex::new(Some((creator, slot))), chunks, uuid })
        })
        .map_err(raise)
    }

    /// UUID of the store that is being made.
    #[getter]
    fn uuid(&self) -> String {
        uuid_text(self.uuid)
    }

    /// `(record, start, parameters)` of every chunk.
    fn chunks(&self) -> Vec<(usize, u64, usize)> {
        self.chunks.iter().map(|c| (c.record, c.start, c.parameters)).collect()
    }

    /// Writes the weights of one chunk, given as the little-endian bytes of all its parameters,
    /// padding included: `float32`, `bfloat16`, or `raw` for a record that is not trained.
    fn write_chunk(
        &self,
        py: Python<'_>,
        chunk: usize,
        values: &[u8],
        dtype: &str,
    ) -> PyResult<()> {
        let place = self
            .chunks
            .get(chunk)
            .ok_or_else(|| PyValueError::new_err(format!("no chunk {chunk}")))?;
        let of = match dtype {
            "float32" => ValueType::F32,
            "bfloat16" => ValueType::Bf16,
            "raw" => ValueType::Raw,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "dtype {dtype:?}: float32, bfloat16 or raw"
                )));
            }
        };
        let width = of.bytes(place.format());
        if values.len() != place.parameters * width {
            let expected = place.parameters * width;
            return Err(PyValueError::new_err(format!(
                "chunk {chunk} takes {expected} bytes, got {}",
                values.len()
            )));
        }
        // Taken out for the time of the write: waiting for a lock while holding the interpreter would
        // stop both threads. A write that fails drops the creator, which removes the file.
        let taken = self.lock().take();
        let (mut creator, slot) = taken.ok_or_else(|| {
            raise(Error::invalid("the store is finished, or a write to it failed or is under way"))
        })?;
        let slot = py.detach(|| creator.write_values(chunk, values, of, slot)).map_err(raise)?;
        *self.lock() = Some((creator, slot));
        Ok(())
    }

    /// Commits generation 1 and returns the store's UUID.
    fn finish(&self, py: Python<'_>, blob: &[u8]) -> PyResult<String> {
        let taken = self.lock().take();
        let (creator, _) = taken.ok_or_else(|| raise(Error::invalid("the store is finished")))?;
        py.detach(|| creator.finish(blob)).map(uuid_text).map_err(raise)
    }

    /// Removes what was written, unless the store is finished.
    fn abandon(&self, py: Python<'_>) {
        let taken = self.lock().take();
        py.detach(|| drop(taken));
    }
}

impl StoreCreator {
    fn lock(&self) -> MutexGuard<'_, Option<(store::StoreCreator, Slot)>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open store, locked against other processes.
#[pyclass(frozen, module = "megatrain_io._lib")]
#[derive(Debug)]
pub(crate) struct Store {
    inner: Mutex<Option<Arc<store::Store>>>,
}

#[pymethods]
impl Store {
    /// `faults` are for tests: `(operation, n, errno, short)` lets the n-th operation of that name
    /// (`read`, `write`, `write_durable`, `sync`) since the open fail, after half of it if `short`.
    #[new]
    #[pyo3(signature = (paths, engine, ledger, waiting = None, faults = Vec::new()))]
    fn new(
        py: Python<'_>,
        paths: Vec<PathBuf>,
        engine: &str,
        ledger: &Ledger,
        waiting: Option<Py<PyAny>>,
        faults: Vec<(String, u64, i32, bool)>,
    ) -> PyResult<Self> {
        let faults = faults.into_iter().map(fault_of).collect::<PyResult<_>>()?;
        let options = OpenOptions { engine: engine_of(engine)?, faults };
        let drives = inspect::lock(py, &paths, waiting.as_ref())?;
        let opened = py.detach(|| store::Store::open_in(drives, options, &ledger.inner));
        let store = opened.map_err(raise)?;
        Ok(Self { inner: Mutex::new(Some(Arc::new(store))) })
    }

    /// The store's UUID.
    #[getter]
    fn uuid(&self) -> PyResult<String> {
        Ok(uuid_text(self.get()?.uuid()))
    }

    /// Number of the newest committed state; 1 is the import.
    #[getter]
    fn generation(&self) -> PyResult<u64> {
        Ok(self.get()?.committed().generation)
    }

    /// The trainer's own state, committed with that generation.
    #[getter]
    fn blob<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.get()?.committed().blob))
    }

    /// How often each chunk was updated in that generation: AdamW's t, the same in all chunks of a record, 0 where it is
    /// not trained; `None` where the store was made with a format before 0.4, and has one number for all.
    fn updates(&self) -> PyResult<Option<Vec<u32>>> {
        Ok(self.get()?.updates())
    }

    /// What the store holds, as JSON.
    #[getter]
    fn manifest(&self) -> PyResult<String> {
        serde_json::to_string(self.get()?.manifest())
            .map_err(|e| PyValueError::new_err(e.to_string()))
    }

    /// Name of the engine in use, and why it is not io_uring if that was left open.
    #[getter]
    fn engine(&self) -> PyResult<(String, Option<String>)> {
        let store = self.get()?;
        let (engine, note) = store.engine();
        Ok((engine.name().to_owned(), note.map(str::to_owned)))
    }

    /// Whether transfers bypass the page cache.
    #[getter]
    fn is_direct(&self) -> PyResult<bool> {
        Ok(self.get()?.drives().are_direct())
    }

    /// `(memory, offset)`: what the kernel says that direct transfers must be aligned to, in bytes; of
    /// the first drive that has none of them, if there is one.
    #[getter]
    fn dio_alignment(&self) -> PyResult<Option<(u32, u32)>> {
        let store = self.get()?;
        let drives = store.drives();
        let file = drives.iter().find(|file| !file.is_direct()).unwrap_or(drives.main());
        let alignment = file.dio_alignment();
        Ok(alignment.map(|alignment| (alignment.memory, alignment.offset)))
    }

    /// The newer generation that did not hold when the store was opened, if there was one.
    #[getter]
    fn fell_back_from(&self) -> PyResult<Option<u64>> {
        Ok(self.get()?.fell_back_from())
    }

    /// Extents that opening verified, or `None` when it did not have to.
    #[getter]
    fn verified_at_open(&self) -> PyResult<Option<usize>> {
        Ok(self.get()?.verified_at_open().map(|report| report.extents))
    }

    /// Bytes read and written through the engine since the store was opened.
    fn io_bytes(&self) -> PyResult<(u64, u64)> {
        Ok(self.get()?.engine().0.counters().totals())
    }

    /// `(record, start, parameters)` of every chunk.
    fn chunks(&self) -> PyResult<Vec<(usize, u64, usize)>> {
        Ok(self
            .get()?
            .layout()
            .chunks()
            .iter()
            .map(|c| (c.record, c.start, c.parameters))
            .collect())
    }

    /// Little-endian bytes of one plane of one chunk in the committed state: `weight`, `exp_avg`,
    /// `exp_avg_sq`, or `master` (the fp32 weights).
    fn read_plane<'py>(
        &self,
        py: Python<'py>,
        chunk: usize,
        plane: &str,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let store = self.get()?;
        let bytes = py.detach(|| store.read_plane(chunk, plane)).map_err(raise)?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Compares every checksum of the committed state. Returns `generation`, `extents`, `nbytes` and
    /// `damaged`: for each extent the `message`, and what it says as fields.
    fn verify<'py>(
        &self,
        py: Python<'py>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let store = self.get()?;
        let report = counted(py, progress.as_ref(), |progress| store.verify(progress))?;
        report_of(py, &store, &report)
    }

    /// The same for the state before the committed one, and the trainer's own state of it as `blob`; `None` when
    /// there is none any more.
    fn verify_older<'py>(
        &self,
        py: Python<'py>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let store = self.get()?;
        let older = counted(py, progress.as_ref(), |progress| store.verify_older(progress))?;
        let Some(older) = older else { return Ok(None) };
        let result = report_of(py, &store, &older.report)?;
        result.set_item("blob", PyBytes::new(py, &older.blob))?;
        Ok(Some(result))
    }

    /// Gives the committed state up, durably, if it is damaged and the one before it is whole. Returns the
    /// generation that the store went back to, and it is to be closed then; `None` when the committed state is whole.
    fn go_back(&self, py: Python<'_>, progress: Option<Py<PyAny>>) -> PyResult<Option<u64>> {
        let store = self.get()?;
        counted(py, progress.as_ref(), |progress| store.go_back(progress))
    }

    /// Marks the store clean on the drive, and closes it. Pipelines over it must be closed.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let taken = self.lock().take();
        let Some(store) = taken else { return Ok(()) };
        py.detach(|| match store.check() {
            Ok(()) => store.mark_clean(),
            // A store that failed is verified at the next open: nothing to mark.
            Err(_) => Ok(()),
        })
        .map_err(raise)
    }
}

impl Store {
    pub(crate) fn get(&self) -> PyResult<Arc<store::Store>> {
        let store = self.lock().clone();
        store.ok_or_else(|| raise(Error::invalid("the store is closed")))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<store::Store>>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Calls what counts with `progress`, which may raise, as Ctrl-C does: that ends it.
fn counted<T: Send>(
    py: Python<'_>,
    progress: Option<&Py<PyAny>>,
    work: impl FnOnce(&mut dyn FnMut(usize, usize) -> bool) -> Result<T, Error> + Send,
) -> PyResult<T> {
    let mut raised = None;
    let result = py.detach(|| {
        work(&mut |done, all| {
            raised = Python::attach(|py| {
                let called = progress.map(|progress| progress.call1(py, (done, all)));
                called.transpose().and_then(|_| py.check_signals())
            })
            .err();
            raised.is_none()
        })
    });
    match raised {
        Some(error) => Err(error),
        None => result.map_err(raise),
    }
}

/// `generation`, `extents`, `nbytes` and `damaged` of a report.
fn report_of<'py>(
    py: Python<'py>,
    store: &store::Store,
    report: &store::Report,
) -> PyResult<Bound<'py, PyDict>> {
    let result = PyDict::new(py);
    result.set_item("generation", report.generation)?;
    result.set_item("extents", report.extents)?;
    result.set_item("nbytes", report.bytes)?;
    let damaged = report.damaged.iter().map(|damage| fields_of(py, store, damage));
    result.set_item("damaged", damaged.collect::<PyResult<Vec<_>>>()?)?;
    Ok(result)
}

/// What is known of a damaged extent; without checksums where it could not even be read.
fn fields_of<'py>(
    py: Python<'py>,
    store: &store::Store,
    damage: &store::DamagedExtent,
) -> PyResult<Bound<'py, PyDict>> {
    let place = &store.layout().chunks()[damage.chunk];
    let (offset, sums) = match &damage.error {
        Error::Corrupt { offset, expected, found, .. } => {
            (Some(*offset), Some((*expected, *found)))
        }
        Error::Io { offset, .. } | Error::Truncated { offset, .. } => (Some(*offset), None),
        _ => (None, None),
    };
    let fields = PyDict::new(py);
    fields.set_item("record", &store.manifest().records[place.record].name)?;
    fields.set_item("chunk", damage.chunk - store.layout().records()[place.record].start)?;
    fields.set_item("group", damage.group.name())?;
    fields.set_item("tensors", store.tensors_in(damage.chunk))?;
    fields.set_item("path", store.drives().file(place.drive).path())?;
    fields.set_item("offset", offset)?;
    fields.set_item("expected", sums.map(|(expected, _)| expected))?;
    fields.set_item("found", sums.map(|(_, found)| found))?;
    fields.set_item("message", damage.error.to_string())?;
    Ok(fields)
}

fn fault_of(
    (operation, number, errno, short): (String, u64, i32, bool),
) -> PyResult<(Point, Fault)> {
    let operation = match operation.as_str() {
        "read" => Operation::Read,
        "write" => Operation::Write,
        "write_durable" => Operation::WriteDurable,
        "sync" => Operation::Sync,
        _ => return Err(PyValueError::new_err(format!("no operation {operation:?}"))),
    };
    let fault = if short { Fault::Short(errno) } else { Fault::Fail(errno) };
    Ok((Point::Of(operation, number), fault))
}

pub(crate) fn engine_of(name: &str) -> PyResult<Choice> {
    match name {
        "auto" => Ok(Choice::Auto),
        "uring" => Ok(Choice::Uring),
        "threads" => Ok(Choice::Threads),
        _ => Err(PyValueError::new_err(format!("engine {name:?}: auto, uring or threads"))),
    }
}
