//! Gradients that wait for the norm of all: in buffers of their own, or on the drive and back for the
//! update.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::engine::Operation;
use crate::io::file::DirectFile;
use crate::memory::slot::{Slot, SlotList};
use crate::pipeline::executor::context::Context;
use crate::pipeline::executor::requests::{Request, Requests, Work};
use crate::pipeline::gradient_files::{GradientFiles, places};
use crate::pipeline::memory::deferred_bytes;
use crate::store::checksum::{self, Binding, Mismatch};
use crate::units::Group;

/// A chunk's gradient on the drive.
#[derive(Debug, Default)]
struct OnDrive {
    /// Drive and offset; `None` where its unit has a buffer of its own.
    place: Option<(usize, u64)>,
    /// Checksums of it as it was written last.
    sums: Vec<u32>,
    /// Writes that are to come or in flight, and whether one is in flight.
    unwritten: usize,
    is_in_flight: bool,
}

pub(super) struct DeferredGradients {
    files: Vec<Arc<DirectFile>>,
    chunks: Vec<OnDrive>,
    /// Those that are to be written, with the step that defers them and the unit.
    queue: VecDeque<(u64, usize, Slot)>,
}

impl DeferredGradients {
    /// `own` are the units that have a buffer of their own.
    pub(super) fn new(cx: &Context, files: &GradientFiles, own: &[usize]) -> Self {
        let files = files.files().to_vec();
        let places = match files.is_empty() {
            true => vec![None; cx.units.chunks().len()],
            false => places(&cx.units, own).0,
        };
        let on_drive = |place| OnDrive { place, ..OnDrive::default() };
        let chunks = places.into_iter().map(on_drive).collect();
        Self { files, chunks, queue: VecDeque::new() }
    }

    /// Whether the gradient of a chunk waits on the drive when it is deferred.
    pub(super) fn is_on_drive(&self, chunk: usize) -> bool {
        self.chunks[chunk].place.is_some()
    }

    /// The same of a unit, by the chunks that it is made of.
    pub(super) fn is_unit_on_drive(&self, chunks: &Range<usize>) -> bool {
        self.is_on_drive(chunks.start)
    }

    /// A unit's gradient will be written: whoever wants to read it waits.
    pub(super) fn expect(&mut self, chunks: Range<usize>) {
        self.chunks[chunks].iter_mut().for_each(|chunk| chunk.unwritten += 1);
    }

    /// Takes the gradient of a unit that is expected, to write it.
    pub(super) fn defer(&mut self, step: u64, unit: usize, gradient: Slot) {
        self.queue.push_back((step, unit, gradient));
    }

    /// Starts writing, each gradient when the last write to its place has landed.
    pub(super) fn start_writes(&mut self, cx: &Context, requests: &mut Requests) -> Result {
        while let Some(&(step, unit, _)) = self.queue.front() {
            let chunks = cx.units.records()[unit].clone();
            if self.chunks[chunks.clone()].iter().any(|chunk| chunk.is_in_flight) {
                return Ok(());
            }
            let Some((_, _, mut rest)) = self.queue.pop_front() else { return Ok(()) };
            for chunk in chunks {
                let bytes = deferred_bytes(cx.units.chunks()[chunk].parameters);
                let next = rest.split_off(bytes);
                let part = std::mem::replace(&mut rest, next);
                let binding = binding(cx, chunk, step);
                self.chunks[chunk].sums = cx.workers.install(|| checksum::sums(&binding, &part));
                self.chunks[chunk].is_in_flight = true;
                let work = Work::WriteGradient { chunk };
                let request = self.request(Operation::Write, chunk, bytes, work)?;
                requests.start(cx, request, Some(part));
            }
        }
        Ok(())
    }

    pub(super) fn wrote(&mut self, chunk: usize) {
        self.chunks[chunk].unwritten -= 1;
        self.chunks[chunk].is_in_flight = false;
    }

    /// Whether all that was deferred of a chunk is written.
    pub(super) fn is_written(&self, chunk: usize) -> bool {
        self.chunks[chunk].unwritten == 0
    }

    /// Reads the gradient of a chunk into the front of `slot`.
    pub(super) fn read(
        &self,
        cx: &Context,
        requests: &mut Requests,
        chunk: usize,
        step: u64,
        slot: Slot,
    ) -> Result {
        let bytes = deferred_bytes(cx.units.chunks()[chunk].parameters);
        let work = Work::ReadGradient { chunk, step };
        let request = self.request(Operation::Read, chunk, bytes, work)?;
        requests.start(cx, request, Some(slot.split_at(bytes).0));
        Ok(())
    }

    /// Verifies what was read of a chunk.
    pub(super) fn verify(
        &self,
        cx: &Context,
        chunk: usize,
        step: u64,
        bytes: &[u8],
    ) -> Result<(), Mismatch> {
        cx.verify(chunk, &binding(cx, chunk, step), &self.chunks[chunk].sums, bytes)
    }

    /// The gradient of a unit out of its own buffer; `None` where it comes from the drive.
    pub(super) fn take(&self, cx: &Context, unit: usize) -> Result<Option<Slot>> {
        if self.is_unit_on_drive(&cx.units.records()[unit]) {
            return Ok(None);
        }
        let own = cx.pool.residents.gradient_of(unit).and_then(SlotList::try_take);
        own.map(Some).ok_or_else(|| {
            let name = cx.units.unit_name(unit);
            Error::invalid(format!("the gradient of {name} was not deferred, or is lent"))
        })
    }

    /// Nothing is in flight any more, and nothing that was deferred is wanted.
    pub(super) fn clear(&mut self) {
        self.queue.clear();
        for chunk in &mut self.chunks {
            chunk.unwritten = 0;
            chunk.is_in_flight = false;
        }
    }

    fn request(
        &self,
        operation: Operation,
        chunk: usize,
        bytes: usize,
        work: Work,
    ) -> Result<Request> {
        let place = self.chunks[chunk].place;
        let (file, offset) = place
            .and_then(|(drive, offset)| Some((Arc::clone(self.files.get(drive)?), offset)))
            .ok_or_else(|| Error::invalid(format!("no file for the gradient of chunk {chunk}")))?;
        Ok(Request { operation, file, offset, bytes, work, again: false })
    }
}

/// What the checksums of a chunk's gradient are bound to. The bit keeps it from being taken for a store's
/// generation.
fn binding(cx: &Context, chunk: usize, step: u64) -> Binding {
    let chunk = u32::try_from(chunk).unwrap_or(u32::MAX);
    Binding { store: cx.store.uuid(), chunk, group: Group::Update, generation: step | 1 << 63 }
}
