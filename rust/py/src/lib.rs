//! `megatrain_io._lib`: the extension module. Its whole surface is on this screen; `_lib.pyi`
//! describes it and `mypy.stubtest` keeps that true. Only `store.paged_store`,
//! `store.inspect`, `machine.extension` and `machine.measure` of the package import it.

use pyo3::prelude::*;
use pyo3::types::PyDict;

#[cfg(bench_without_checksums)]
compile_error!(
    "without checksums there are benchmarks only: what trains verifies every byte it reads"
);

mod dlpack;
mod error;
mod inspect;
mod measure;
mod pipeline;
mod store;
mod tensors;
mod uuid;

#[pymodule]
#[pyo3(name = "_lib")]
mod lib {
    #[pymodule_export]
    use crate::dlpack::Buffer;
    #[pymodule_export]
    use crate::dlpack::allocate;
    #[pymodule_export]
    use crate::error::error_examples;
    #[pymodule_export]
    use crate::inspect::{HeldFile, dio_alignment, inspect, owner_of};
    #[pymodule_export]
    use crate::measure::{ScratchFile, Workload, adamw_step};
    #[pymodule_export]
    use crate::pipeline::{CheckedSchedule, Pipeline};
    #[pymodule_export]
    use crate::store::{Ledger, Store, StoreCreator};
    #[pymodule_export]
    use crate::tensors::{RecordTensors, Transfer};
    #[pymodule_export]
    use crate::{adamw_kernels, build_info, probe_uring, state_formats, store_memory};
}

/// Version of the core, build profile (`release` or `debug`) and whether io_uring was compiled in.
#[pyfunction]
fn build_info() -> (&'static str, &'static str, bool) {
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    (env!("CARGO_PKG_VERSION"), profile, cfg!(feature = "uring"))
}

/// The AdamW kernels that this processor can run, the fastest last.
#[pyfunction]
fn adamw_kernels() -> Vec<String> {
    megatrain_io::optimizer::Kernel::available().iter().map(ToString::to_string).collect()
}

/// The formats of a record's state by name: `planes` lists `(name, dtype, nbytes)`, that of the weight first;
/// `step_nbytes` is what a step of training reads and what it writes, where nothing stays in RAM. Bytes are
/// those of one parameter.
#[pyfunction]
fn state_formats(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    use megatrain_io::{Group, StateFormat};
    let formats = PyDict::new(py);
    for format in StateFormat::ALL {
        let planes = Group::ALL.into_iter().flat_map(|group| format.planes(group));
        let planes = planes.map(|plane| (plane.plane.name(), plane.dtype.name(), plane.bytes()));
        let fields = PyDict::new(py);
        fields.set_item("planes", planes.collect::<Vec<_>>())?;
        fields.set_item("step_nbytes", format.spec().step_bytes())?;
        formats.set_item(format.spec().name, fields)?;
    }
    Ok(formats)
}

/// Bytes that a store with this manifest takes in RAM, once it is open.
#[pyfunction]
fn store_memory(manifest: &[u8]) -> PyResult<u64> {
    use megatrain_io::store::{Layout, Manifest};
    Manifest::parse(manifest)
        .and_then(|manifest| Layout::new(&manifest))
        .map(|layout| megatrain_io::store::Store::memory_bytes(&layout))
        .map_err(pyo3::exceptions::PyValueError::new_err)
}

/// Why io_uring cannot be used here, or `None` when it can: a real ring is set up.
#[pyfunction]
fn probe_uring(py: Python<'_>) -> Option<String> {
    use megatrain_io::io::{Choice, start};
    py.detach(|| start(Choice::Uring, 1)).err().map(|error| error.to_string())
}
