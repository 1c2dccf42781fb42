//! Every Rust error becomes a Python exception that is written in `megatrain_io/errors.py`.

use megatrain_io::Error;
use pyo3::PyErr;
use pyo3::prelude::*;

mod exceptions {
    #![allow(missing_docs, reason = "the classes are documented in errors.py")]
    pyo3::import_exception!(megatrain_io.errors, BufferInUseError);
    pyo3::import_exception!(megatrain_io.errors, CorruptionError);
    pyo3::import_exception!(megatrain_io.errors, DoesNotFitError);
    pyo3::import_exception!(megatrain_io.errors, FormatError);
    pyo3::import_exception!(megatrain_io.errors, MegatrainIoError);
    pyo3::import_exception!(megatrain_io.errors, NoSpaceError);
    pyo3::import_exception!(megatrain_io.errors, NotFiniteError);
    pyo3::import_exception!(megatrain_io.errors, StorageError);
    pyo3::import_exception!(megatrain_io.errors, StoreFailedError);
    pyo3::import_exception!(megatrain_io.errors, StoreInUseError);
    pyo3::import_exception!(megatrain_io.errors, UnsupportedError);
    pyo3::import_exception!(megatrain_io.errors, UsedAfterForkError);
}
use exceptions::*;

/// The exception for an error. A new variant does not compile until it has a class here.
pub(crate) fn raise(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Io { .. } | Error::Truncated { .. } | Error::NameLost { .. } => {
            StorageError::new_err(text)
        }
        Error::NoMemory { .. } => DoesNotFitError::new_err(text),
        Error::NoSpace { .. } => NoSpaceError::new_err(text),
        Error::InUse { .. } => StoreInUseError::new_err(text),
        Error::Format { .. } => FormatError::new_err(text),
        Error::Corrupt { .. } | Error::CorruptGradient { .. } => CorruptionError::new_err(text),
        Error::Failed { .. } | Error::Lost { .. } => StoreFailedError::new_err(text),
        Error::BufferInUse { .. } | Error::Changed { .. } => BufferInUseError::new_err(text),
        Error::NotFinite { .. } => NotFiniteError::new_err(text),
        Error::UsedAfterFork { .. } => UsedAfterForkError::new_err(text),
        Error::Unsupported { .. } => UnsupportedError::new_err(text),
        Error::Invalid { .. } => MegatrainIoError::new_err(text),
    }
}

/// One exception of each kind that the core can raise, for the tests.
#[pyfunction]
pub(crate) fn error_examples(py: Python<'_>) -> Vec<Py<PyAny>> {
    Error::examples().into_iter().map(|error| raise(error).into_value(py).into_any()).collect()
}
