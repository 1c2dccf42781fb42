//! A store seen without opening it: who holds it, what it says of itself, its removal.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use megatrain_io::Error;
use megatrain_io::io::{DioAlignment, DirectFile, Drives, LOCK_NOTICE, Owner};
use megatrain_io::store;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::raise;
use crate::uuid::uuid_text;

/// Opens and locks the files of a store. `waiting` is called once, after a second, with who holds one;
/// a signal ends the wait.
pub(crate) fn lock(
    py: Python<'_>,
    paths: &[PathBuf],
    waiting: Option<&Py<PyAny>>,
) -> PyResult<Drives> {
    while_waiting(py, waiting, |wait| Drives::open_waiting(paths, wait))
}

/// Opens by `open`, which is given what to call while another process holds a file.
fn while_waiting<T: Send>(
    py: Python<'_>,
    waiting: Option<&Py<PyAny>>,
    open: impl Send + FnOnce(&mut dyn FnMut(&Owner, Duration) -> Result<(), Error>) -> Result<T, Error>,
) -> PyResult<T> {
    let (mut raised, mut told) = (None, false);
    let opened = py.detach(|| {
        open(&mut |owner, waited| {
            let is_due = waited >= LOCK_NOTICE && !told;
            let outcome = Python::attach(|py| {
                py.check_signals()?;
                if let Some(waiting) = waiting.filter(|_| is_due) {
                    waiting.call1(py, (owner.to_string(),))?;
                }
                PyResult::Ok(())
            });
            told |= is_due;
            outcome.map_err(|error| {
                raised = Some(error);
                Error::invalid("the wait was ended")
            })
        })
    });
    match raised {
        Some(error) => Err(error),
        None => opened.map_err(raise),
    }
}

/// A file that this process holds, so that nobody can open it as a store.
#[pyclass(frozen, module = "megatrain_io._lib")]
#[derive(Debug)]
pub(crate) struct HeldFile {
    inner: Mutex<Option<DirectFile>>,
}

#[pymethods]
impl HeldFile {
    #[new]
    #[pyo3(signature = (path, waiting = None))]
    fn new(py: Python<'_>, path: PathBuf, waiting: Option<Py<PyAny>>) -> PyResult<Self> {
        let open =
            |wait: &mut dyn FnMut(&Owner, Duration) -> _| DirectFile::open_waiting(&path, wait);
        let file = while_waiting(py, waiting.as_ref(), open)?;
        Ok(Self { inner: Mutex::new(Some(file)) })
    }

    /// Removes the file, durably, and releases it.
    fn remove(&self, py: Python<'_>) -> PyResult<()> {
        let file = self.take().ok_or_else(|| raise(Error::invalid("the file was let go")))?;
        py.detach(|| file.remove()).map_err(raise)
    }

    /// Releases the file, so that others can open it.
    fn release(&self) {
        drop(self.take());
    }
}

impl HeldFile {
    fn take(&self) -> Option<DirectFile> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Who holds the file: `process`, `command`, `since`, `has_ended`, and all of it as `text`; `None`
/// when nobody does. Waits for nothing.
#[pyfunction]
pub(crate) fn owner_of(py: Python<'_>, path: PathBuf) -> PyResult<Option<Bound<'_, PyDict>>> {
    let owner = py.detach(|| DirectFile::owner_of(&path)).map_err(raise)?;
    owner
        .map(|owner| {
            let fields = PyDict::new(py);
            fields.set_item("text", owner.to_string())?;
            let Owner { process, command, since, has_ended } = owner;
            fields.set_item("process", process)?;
            fields.set_item("command", command)?;
            fields.set_item("since", since)?;
            fields.set_item("has_ended", has_ended)?;
            Ok(fields)
        })
        .transpose()
}

/// `(memory, offset)`: what the kernel says that direct transfers of files in `folder` must be aligned to,
/// in bytes; zeros where they have none. `None` where it does not say.
#[pyfunction]
pub(crate) fn dio_alignment(py: Python<'_>, folder: PathBuf) -> PyResult<Option<(u32, u32)>> {
    let found = py.detach(|| DioAlignment::in_folder(&folder)).map_err(raise)?;
    Ok(found.map(|alignment| (alignment.memory, alignment.offset)))
}

/// What a store says of itself, without its lock: `uuid`, `manifest` (JSON), `generation`, `blob`,
/// `is_clean`, `is_of_this_boot`, `is_direct`. Nothing is verified but superblock, table and blob.
#[pyfunction]
pub(crate) fn inspect(py: Python<'_>, paths: Vec<PathBuf>) -> PyResult<Bound<'_, PyDict>> {
    let found = py.detach(|| store::Store::inspect(&paths)).map_err(raise)?;
    let manifest = serde_json::to_string(&found.manifest)
        .map_err(|error| raise(Error::invalid(error.to_string())))?;
    let fields = PyDict::new(py);
    fields.set_item("uuid", uuid_text(found.uuid))?;
    fields.set_item("manifest", manifest)?;
    fields.set_item("generation", found.generation)?;
    fields.set_item("blob", PyBytes::new(py, &found.blob))?;
    fields.set_item("is_clean", found.is_clean)?;
    fields.set_item("is_of_this_boot", found.is_of_this_boot)?;
    fields.set_item("is_direct", found.is_direct)?;
    Ok(fields)
}
