//! The store of tensors, and tickets.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use megatrain_io::memory::Slot;
use megatrain_io::tensors::{self, Allocation};
use megatrain_io::{Error, Group, to_usize};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PySlice;

use crate::dlpack::Buffer;
use crate::error::raise;
use crate::pipeline::{PATIENCE, wait};
use crate::store::Store;

/// A transfer or commit under way; it goes on whether or not anybody waits for it.
#[pyclass(frozen, module = "megatrain_io._lib")]
#[derive(Debug)]
pub(crate) struct Transfer {
    inner: tensors::Transfer,
    /// What a read fills, and how much of it.
    filled: Option<(Arc<Allocation>, usize)>,
}

#[pymethods]
impl Transfer {
    /// Whether it has ended, well or not.
    #[getter]
    fn done(&self, py: Python<'_>) -> bool {
        py.detach(|| self.inner.wait(Duration::ZERO)).is_some()
    }

    /// Waits until it has ended; raises what it failed with, if it did.
    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, || self.inner.wait(PATIENCE).transpose())
    }

    /// The memory that a read has filled.
    fn buffer(&self) -> PyResult<Buffer> {
        let (allocation, nbytes) = self
            .filled
            .as_ref()
            .ok_or_else(|| raise(Error::invalid("this ticket is not that of a prefetch")))?;
        Ok(Buffer::of_allocation(Arc::clone(allocation), *nbytes))
    }
}

/// Tensors of one store, by record: memory, transfers, commit.
#[pyclass(frozen, module = "megatrain_io._lib")]
#[derive(Debug)]
pub(crate) struct RecordTensors {
    inner: Mutex<Option<Arc<tensors::RecordTensors>>>,
}

#[pymethods]
impl RecordTensors {
    /// With `account` the memory stands under that name, and no tensor elsewhere can be put or read.
    #[new]
    #[pyo3(signature = (store, memory_nbytes, account = None))]
    fn new(
        py: Python<'_>,
        store: &Store,
        memory_nbytes: usize,
        account: Option<&str>,
    ) -> PyResult<Self> {
        let store = store.get()?;
        let made = py.detach(|| match account {
            None => tensors::RecordTensors::start(store, memory_nbytes),
            Some(name) => tensors::RecordTensors::start_without_copies(store, memory_nbytes, name),
        });
        let made = made.map_err(raise)?;
        Ok(Self { inner: Mutex::new(Some(Arc::new(made))) })
    }

    /// Why the memory could not be registered with the kernel, if so.
    #[getter]
    fn registration_refused(&self) -> PyResult<Option<String>> {
        Ok(self.get()?.registration_refused().map(str::to_owned))
    }

    /// `(huge, nbytes)`: bytes of the memory that lay in huge pages when it was made, and that could.
    #[getter]
    fn huge_pages(&self) -> PyResult<Option<(u64, u64)>> {
        Ok(self.get()?.huge_pages().map(|found| (found.huge, found.bytes)))
    }

    /// Bytes of the memory that are free, and bytes of the longest free run.
    fn free_nbytes(&self) -> PyResult<(usize, usize)> {
        Ok(self.get()?.arena().free_bytes())
    }

    /// Memory for `nbytes`, arbitrary content; `None` when no free run is as long.
    fn allocate(&self, nbytes: usize) -> PyResult<Option<Buffer>> {
        let found = self.get()?.allocate(nbytes).map_err(raise)?;
        Ok(found.map(|allocation| Buffer::of_allocation(allocation, nbytes)))
    }

    /// Writes a tensor, given as its bytes. Memory of the store is written where it lies; other bytes
    /// are copied before this returns.
    fn put(&self, py: Python<'_>, record: usize, content: &Bound<'_, PyAny>) -> PyResult<Transfer> {
        let tensors = self.get()?;
        let inner = match memory_of(&tensors, record, content)? {
            Some(memory) => tensors.put(record, &memory).map_err(raise)?,
            None => put_copied(py, &tensors, record, content)?,
        };
        Ok(Transfer { inner, filled: None })
    }

    /// Reads a tensor into writable bytes. Waits for it.
    fn read_into(&self, py: Python<'_>, record: usize, content: &Bound<'_, PyAny>) -> PyResult<()> {
        let tensors = self.get()?;
        match memory_of(&tensors, record, content)? {
            Some(memory) => {
                let ticket = tensors.fill(record, &memory).map_err(raise)?;
                wait(py, || ticket.wait(PATIENCE).transpose())
            }
            None => read_copied(py, &tensors, record, content),
        }
    }

    /// Writes memory of the store, as long as it was allocated, as the front of a tensor: some of its
    /// first chunks, or all.
    fn put_front(&self, record: usize, content: &Bound<'_, PyAny>) -> PyResult<Transfer> {
        let tensors = self.get()?;
        let memory = allocation_of(&tensors, content)?;
        let inner = tensors.put(record, &memory).map_err(raise)?;
        Ok(Transfer { inner, filled: None })
    }

    /// Begins to read the front of a tensor into memory of the store, as much as was allocated.
    fn fill_front(&self, record: usize, content: &Bound<'_, PyAny>) -> PyResult<Transfer> {
        let tensors = self.get()?;
        let memory = allocation_of(&tensors, content)?;
        let inner = tensors.fill(record, &memory).map_err(raise)?;
        Ok(Transfer { inner, filled: None })
    }

    /// Begins to read a tensor into memory of the store; `None` when no free run is as long.
    fn prefetch(&self, record: usize) -> PyResult<Option<Transfer>> {
        let tensors = self.get()?;
        let nbytes = nbytes_of(&tensors, record)?;
        let Some(memory) = tensors.allocate(nbytes).map_err(raise)? else { return Ok(None) };
        let inner = tensors.fill(record, &memory).map_err(raise)?;
        Ok(Some(Transfer { inner, filled: Some((memory, nbytes)) }))
    }

    /// Makes everything that was put before durable, all at once.
    fn commit(&self) -> PyResult<Transfer> {
        let inner = self.get()?.commit().map_err(raise)?;
        Ok(Transfer { inner, filled: None })
    }

    /// Ends when everything that was asked for before has ended.
    fn drain(&self) -> PyResult<Transfer> {
        let inner = self.get()?.drain().map_err(raise)?;
        Ok(Transfer { inner, filled: None })
    }

    /// Waits for all transfers, and stops. What was not committed is dropped, but for scratch stores.
    fn close(&self, py: Python<'_>) {
        let taken = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(taken));
    }
}

impl RecordTensors {
    fn get(&self) -> PyResult<Arc<tensors::RecordTensors>> {
        let tensors = self.inner.lock().unwrap_or_else(PoisonError::into_inner).clone();
        tensors.ok_or_else(|| raise(Error::invalid("the store is closed")))
    }
}

fn nbytes_of(tensors: &tensors::RecordTensors, record: usize) -> PyResult<usize> {
    tensors.chunks(record).map_err(raise)?;
    Ok(tensors.bytes(record))
}

/// The store's memory that these bytes are, all of it.
fn allocation_of(
    tensors: &tensors::RecordTensors,
    content: &Bound<'_, PyAny>,
) -> PyResult<Arc<Allocation>> {
    let content = PyBuffer::<u8>::get(content)?;
    let memory = tensors.allocation_at(content.buf_ptr().addr());
    memory.filter(|memory| memory.asked() == content.len_bytes()).ok_or_else(|| {
        PyValueError::new_err(
            "these bytes are not memory that the store allocated, from end to end",
        )
    })
}

/// The store's memory that these bytes are, if they are; they must be as many as the tensor has.
fn memory_of(
    tensors: &tensors::RecordTensors,
    record: usize,
    content: &Bound<'_, PyAny>,
) -> PyResult<Option<Arc<Allocation>>> {
    let content = PyBuffer::<u8>::get(content)?;
    let (needed, given) = (nbytes_of(tensors, record)?, content.len_bytes());
    if given != needed || !content.is_c_contiguous() {
        return Err(PyValueError::new_err(format!(
            "record {record} has {needed} contiguous bytes, got {given}"
        )));
    }
    // A part of a tensor is not its memory: the rest of its pages belongs to the whole.
    let memory = tensors.allocation_at(content.buf_ptr().addr());
    Ok(memory.filter(|memory| memory.asked() == needed))
}

/// A part of some bytes, not copied.
fn part_of(
    py: Python<'_>,
    content: &Bound<'_, PyAny>,
    place: &Range<usize>,
) -> PyResult<PyBuffer<u8>> {
    let border = |at: usize| isize::try_from(at).map_err(|e| PyValueError::new_err(e.to_string()));
    let slice = PySlice::new(py, border(place.start)?, border(place.end)?, 1);
    PyBuffer::get(&content.get_item(slice)?)
}

/// The bytes of each chunk of a tensor, padding left out.
fn places(tensors: &tensors::RecordTensors, record: usize) -> PyResult<Vec<Range<usize>>> {
    let chunks = tensors.chunks(record).map_err(raise)?;
    let nbytes = nbytes_of(tensors, record)?;
    let byte = |place: u64| to_usize(place).min(nbytes);
    let places = tensors.store().layout().chunks()[chunks].iter();
    Ok(places.map(|c| byte(c.start)..byte(c.start + c.parameters as u64)).collect())
}

fn staging_slot(py: Python<'_>, tensors: &tensors::RecordTensors) -> PyResult<Slot> {
    if tensors.staging().count() == 0 {
        return Err(raise(Error::invalid("this store takes tensors in its own memory only")));
    }
    wait(py, || {
        tensors.store().check()?;
        Ok(tensors.staging().take(PATIENCE))
    })
}

/// Copies chunk after chunk; the one before is written meanwhile.
fn put_copied(
    py: Python<'_>,
    tensors: &tensors::RecordTensors,
    record: usize,
    content: &Bound<'_, PyAny>,
) -> PyResult<tensors::Transfer> {
    let chunks = tensors.chunks(record).map_err(raise)?;
    let (put, ticket) = tensors.start_copied(&chunks);
    for (chunk, place) in chunks.clone().zip(places(tensors, record)?) {
        let copied = staging_slot(py, tensors).and_then(|mut slot| {
            let extent = tensors.store().layout().chunks()[chunk].extent_bytes(Group::Weight);
            slot[place.len()..extent].fill(0);
            part_of(py, content, &place)?.copy_to_slice(py, &mut slot[..place.len()])?;
            tensors.put_chunk(&put, chunk, slot).map_err(raise)
        });
        if let Err(error) = copied {
            // A part of the tensor is new: nobody may take it for whole.
            let _ = tensors.give_up(chunk..chunks.end);
            return Err(error);
        }
    }
    Ok(ticket)
}

/// Copies chunk after chunk; those behind are read meanwhile.
fn read_copied(
    py: Python<'_>,
    tensors: &tensors::RecordTensors,
    record: usize,
    content: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let chunks = tensors.chunks(record).map_err(raise)?;
    let mut places = places(tensors, record)?.into_iter();
    let mut unread = chunks;
    let mut reading: VecDeque<tensors::Transfer> = VecDeque::new();
    loop {
        while let Some(chunk) = unread.clone().next()
            && (reading.is_empty() || tensors.staging().free_count() > 0)
        {
            let slot = staging_slot(py, tensors)?;
            reading.push_back(tensors.read_chunk(chunk, slot).map_err(raise)?);
            unread.next();
        }
        let (Some(ticket), Some(place)) = (reading.pop_front(), places.next()) else {
            return Ok(());
        };
        wait(py, || ticket.wait(PATIENCE).transpose())?;
        let slot = ticket.take_slot();
        let slot = slot.ok_or_else(|| raise(Error::invalid("the read has no bytes")))?;
        part_of(py, content, &place)?.copy_from_slice(py, &slot[..place.len()])?;
    }
}
