//! Slots as tensors. DLPack's deleter fires when the last tensor over a buffer is gone, so we know
//! when a slot may be used again; it needs no interpreter lock.
#![allow(unsafe_code, reason = "the DLPack ABI is raw structs and C callbacks")]

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use megatrain_io::memory::{Region, Slot};
use megatrain_io::tensors::Allocation;
use megatrain_io::{Dtype, Error};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::error::raise;
use crate::store::Ledger;

const CAPSULE_NAME: &CStr = c"dltensor";
const CPU: i32 = 1;

/// DLPack's code and bits of an element.
fn code_and_bits(dtype: Dtype) -> (u8, u8) {
    match dtype {
        Dtype::Bf16 => (4, 16),
        Dtype::F32 => (2, 32),
        Dtype::I16 => (0, 16),
        Dtype::U8 => (1, 8),
        Dtype::U16 => (1, 16),
        Dtype::U32 => (1, 32),
    }
}

#[repr(C)]
struct DlDataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    dtype: DlDataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct DlManagedTensor {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DlManagedTensor)>,
}

/// A slot that tensors may look into; it can be taken back only when none does.
#[derive(Debug)]
struct Cell {
    memory: Memory,
    exports: AtomicUsize,
}

#[derive(Debug)]
enum Memory {
    Slot(Mutex<Option<Slot>>),
    /// Of a store of tensors: transfers take its slot and bring it back, whoever looks into it.
    Allocation(Arc<Allocation>),
    /// All of a pool, for its address and length: its bytes belong to slots.
    Region(Arc<Region>),
}

/// What one exported tensor keeps alive.
struct Export {
    managed: DlManagedTensor,
    shape: [i64; 1],
    cell: Arc<Cell>,
}

/// A buffer of the pool, seen as a one-dimensional tensor (`torch.from_dlpack`).
#[pyclass(frozen, module = "megatrain_io._lib")]
#[derive(Debug)]
pub(crate) struct Buffer {
    cell: Arc<Cell>,
    dtype: Dtype,
    elements: usize,
    what: String,
}

impl Buffer {
    pub(crate) fn new(slot: Slot, dtype: Dtype, elements: usize, what: String) -> Self {
        debug_assert!(elements * dtype.bytes() <= slot.len());
        Self::over(Memory::Slot(Mutex::new(Some(slot))), dtype, elements, what)
    }

    /// The first `nbytes` of memory for tensors.
    pub(crate) fn of_allocation(allocation: Arc<Allocation>, nbytes: usize) -> Self {
        debug_assert!(nbytes <= allocation.asked());
        Self::over(Memory::Allocation(allocation), Dtype::U8, nbytes, "memory of a store".into())
    }

    /// All of a pool's memory. What is exported keeps it mapped.
    pub(crate) fn of_region(region: Arc<Region>) -> Self {
        let nbytes = region.bytes();
        Self::over(Memory::Region(region), Dtype::U8, nbytes, "memory of the pool".into())
    }

    fn over(memory: Memory, dtype: Dtype, elements: usize, what: String) -> Self {
        let cell = Arc::new(Cell { memory, exports: AtomicUsize::new(0) });
        Self { cell, dtype, elements, what }
    }

    /// The slot, if no tensor is alive over it.
    pub(crate) fn take(&self) -> PyResult<Slot> {
        let Memory::Slot(slot) = &self.cell.memory else {
            let error = format!("the {} goes back with its last tensor", self.what);
            return Err(raise(Error::invalid(error)));
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let exports = self.cell.exports.load(Ordering::Acquire);
        if exports > 0 {
            return Err(raise(Error::BufferInUse { what: self.what.clone(), exports }));
        }
        slot.take().ok_or_else(|| {
            raise(Error::invalid(format!("the buffer ({}) was already given back", self.what)))
        })
    }
}

#[pymethods]
impl Buffer {
    /// Tensors and views alive over this buffer.
    #[getter]
    fn exports(&self) -> usize {
        self.cell.exports.load(Ordering::Acquire)
    }

    /// What the buffer holds, for messages.
    #[getter]
    fn what(&self) -> &str {
        &self.what
    }

    /// Gives the buffer back to the pool.
    fn release(&self) -> PyResult<()> {
        self.take().map(drop)
    }

    /// The DLPack device: CPU.
    #[expect(clippy::unused_self, reason = "the protocol calls it on the object")]
    fn __dlpack_device__(&self) -> (i32, i32) {
        (CPU, 0)
    }

    /// A DLPack capsule over the whole buffer, without a copy.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(i64, i64)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        // Streams and versions change nothing for memory of the host.
        let _ = (stream, max_version);
        if copy == Some(true) || dl_device.is_some_and(|device| device != (CPU, 0)) {
            return Err(PyBufferError::new_err(
                "a buffer of the pool is exported without a copy, on the CPU",
            ));
        }
        // Held until the export is counted.
        let mut guard = match &self.cell.memory {
            Memory::Slot(slot) => Some(slot.lock().unwrap_or_else(PoisonError::into_inner)),
            Memory::Allocation(_) | Memory::Region(_) => None,
        };
        let address = match (&mut guard, &self.cell.memory) {
            (_, Memory::Allocation(allocation)) => allocation.address(),
            (_, Memory::Region(region)) => Some(region.address()),
            (slot, Memory::Slot(_)) => slot.as_mut().and_then(|s| s.as_mut()).map(Slot::address),
        };
        let Some(address) = address else {
            return Err(PyBufferError::new_err(format!(
                "the buffer ({}) was given back",
                self.what
            )));
        };
        let (code, bits) = code_and_bits(self.dtype);
        let elements =
            i64::try_from(self.elements).map_err(|e| PyBufferError::new_err(e.to_string()))?;
        let mut export = Box::new(Export {
            managed: DlManagedTensor {
                tensor: DlTensor {
                    data: address.cast(),
                    device_type: CPU,
                    device_id: 0,
                    ndim: 1,
                    dtype: DlDataType { code, bits, lanes: 1 },
                    shape: std::ptr::null_mut(),
                    strides: std::ptr::null_mut(),
                    byte_offset: 0,
                },
                context: std::ptr::null_mut(),
                deleter: Some(delete),
            },
            shape: [elements],
            cell: Arc::clone(&self.cell),
        });
        export.managed.tensor.shape = export.shape.as_mut_ptr();
        self.cell.exports.fetch_add(1, Ordering::AcqRel);
        let export = Box::into_raw(export);
        // SAFETY: `export` was made by `Box::into_raw` one line above and is not null; the address of
        // a field of it is valid as long as the box, which `delete` alone frees.
        let managed = unsafe { &raw mut (*export).managed };
        // SAFETY: writes the field that `delete` reads; nobody else has the pointer yet.
        unsafe { (*managed).context = export.cast() };
        // SAFETY: the name is static, the pointer not null, and we hold the interpreter (`py`).
        let capsule = unsafe {
            ffi::PyCapsule_New(managed.cast(), CAPSULE_NAME.as_ptr(), Some(destroy_capsule))
        };
        if capsule.is_null() {
            // SAFETY: nobody took the export: it is deleted here, once.
            unsafe { delete(managed) };
        }
        // SAFETY: a new reference, or null with an error set, as this function wants it.
        unsafe { Bound::from_owned_ptr_or_err(py, capsule) }
    }
}

/// Memory of its own as a buffer of bytes: zeroed, huge pages, not inherited by forks, entered in the
/// ledger under `account` until the last tensor over it is gone.
#[pyfunction]
pub(crate) fn allocate(nbytes: usize, ledger: &Ledger, account: &str) -> PyResult<Buffer> {
    let slot = Slot::standalone(nbytes, &ledger.inner, account).map_err(raise)?;
    Ok(Buffer::new(slot, Dtype::U8, nbytes, account.to_owned()))
}

/// DLPack's deleter: the last tensor over this export is gone. May run without the interpreter.
///
/// # Safety
/// `managed` comes from `__dlpack__` and is deleted once, by the tensor's owner.
unsafe extern "C" fn delete(managed: *mut DlManagedTensor) {
    // SAFETY: by this function's contract the export is alive.
    let context = unsafe { (*managed).context };
    // SAFETY: `context` is what `Box::into_raw` gave in `__dlpack__`; it is boxed again only here.
    let export: Box<Export> = unsafe { Box::from_raw(context.cast()) };
    export.cell.exports.fetch_sub(1, Ordering::AcqRel);
}

/// Runs when a capsule dies: deletes the export unless a consumer took it (and renamed the capsule).
///
/// # Safety
/// Called by the interpreter with a capsule that `__dlpack__` made.
unsafe extern "C" fn destroy_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter hands over a living capsule and holds its lock.
    let untouched = unsafe { ffi::PyCapsule_IsValid(capsule, CAPSULE_NAME.as_ptr()) } == 1;
    if !untouched {
        return;
    }
    // SAFETY: valid under this name, as just checked.
    let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, CAPSULE_NAME.as_ptr()) };
    if let Some(managed) = NonNull::new(managed.cast::<DlManagedTensor>()) {
        // SAFETY: no consumer took the export, so deleting it falls to us, once.
        unsafe { delete(managed.as_ptr()) };
    }
}
