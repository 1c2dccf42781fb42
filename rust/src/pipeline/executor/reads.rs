//! Reading ahead: weights into block buffers, update planes into chunk slots.

use std::sync::Arc;
use std::time::Instant;

use super::{Executor, Part, Pending, PlannedUpdate, RESIDENT, RESIDENTS_AHEAD, Update, Work};
use crate::error::{Error, Result};
use crate::io::engine::{Completion, Operation, Request};
use crate::memory::slot::{Slot, SlotList};
use crate::pipeline::memory::kept_bytes;
use crate::pipeline::{Lane, Timings};
use crate::store::ReadPlan;
use crate::store::checksum::{self, Binding, Mismatch};
use crate::units::Group;

impl Executor {
    /// Starts the loads of one kind of buffer, in order, as far as buffers and the disk allow.
    pub(super) fn start_loads(&mut self, class: usize) {
        if self.taken_back.is_some() {
            return;
        }
        let pieces = Arc::clone(&self.pieces);
        for position in 0..self.loads[class].len() {
            let load = &mut self.loads[class][position];
            if load.started == load.chunks.len() {
                continue;
            }
            if load.unread.is_none() {
                let list = [&self.pool.block_buffers, &self.pool.outer_buffers][class];
                let Some(buffer) = list.try_take() else {
                    self.starved.buffers[class] = true;
                    return;
                };
                let piece = pieces.chunks()[load.chunks.start].record;
                load.unread = Some(buffer.split_at(pieces.record_weight_bytes(piece)).0);
            }
            if !self.read_weights(class, position) {
                return;
            }
        }
    }

    /// Starts the reads of one load that has its buffer; `false` when a chunk is still to be written.
    fn read_weights(&mut self, class: usize, position: usize) -> bool {
        while let Some(load) = self.loads[class].get_mut(position)
            && load.started < load.chunks.len()
        {
            let chunk = load.chunks.start + load.started;
            if self.on_disk[chunk] < load.needs[load.started] {
                return false;
            }
            let Some(unread) = load.unread.take() else { return false };
            let bytes = self.pieces.chunks()[chunk].extent_bytes(Group::Weight);
            let (part, unread) = unread.split_at(bytes);
            load.started += 1;
            load.unread = (load.started < load.chunks.len()).then_some(unread);
            let number = load.number;
            let plan = self.store.plan_read(&self.working, chunk, Group::Weight);
            let place = (plan.drive, plan.offset);
            self.read(place, plan.bytes, part, Work::Load { number, chunk, plan });
        }
        true
    }

    /// Serves the loads of pieces that stay in RAM: without I/O, once they were read. A piece whose
    /// buffer is out waits alone; loads of the same piece keep their order.
    pub(super) fn start_resident_loads(&mut self) {
        if self.taken_back.is_some() {
            return;
        }
        let mut waiting = Vec::new();
        let mut position = 0;
        let ahead = if self.pieces.is_by_chunk() { RESIDENTS_AHEAD } else { usize::MAX };
        while position < ahead
            && let Some(load) = self.loads[RESIDENT].get(position)
        {
            let piece = self.pieces.chunks()[load.chunks.start].record;
            let is_written =
                load.chunks.clone().zip(&load.needs).all(|(c, needs)| self.on_disk[c] >= *needs);
            position += 1;
            if load.started > 0 || !is_written || waiting.contains(&piece) {
                waiting.push(piece);
                continue;
            }
            let list = self.pool.residents.weights_of(piece);
            let Some(slot) = list.and_then(SlotList::try_take) else {
                self.starved.residents.push(piece);
                waiting.push(piece);
                continue;
            };
            if self.held.has_weights(piece) {
                position -= 1;
                if let Some(load) = self.loads[RESIDENT].remove(position) {
                    self.deliver(piece, load.number, load.applies, slot);
                }
            } else {
                let bytes = self.pieces.record_weight_bytes(piece);
                self.loads[RESIDENT][position - 1].unread = Some(slot.split_at(bytes).0);
                self.read_weights(RESIDENT, position - 1);
                waiting.push(piece);
            }
        }
    }

    /// Gives updates their memory, in order, and reads the planes that are not in RAM.
    pub(super) fn start_plane_reads(&mut self) {
        let pieces = Arc::clone(&self.pieces);
        while let Some(&PlannedUpdate { step, chunk, needs, applies }) = self.planned.front() {
            if self.on_disk[chunk] < needs
                || self.taken_back.is_some_and(|back| applies || back != step)
            {
                return;
            }
            let place = &pieces.chunks()[chunk];
            let own_weights = self.pool.residents.weights_of(place.record).is_some();
            let own_planes = self.pool.residents.planes_of(chunk);
            let on_drive = applies && self.kept.holds(chunk);
            if on_drive && !self.kept.is_written(chunk) {
                return;
            }
            // The caller computes with weights that were updated on their way, while they are written.
            let commits = self.steps.iter().any(|s| s.number == step && s.commits);
            let has_out = !own_weights || (applies && commits);
            let mut parts = [None, None, None];
            if has_out || own_planes.is_none() || on_drive {
                let Some(mut rest) = self.pool.chunk_slots.try_take() else {
                    self.starved.chunk_slots = true;
                    return;
                };
                let wanted = [has_out, own_planes.is_none(), on_drive];
                let sizes = [
                    place.extent_bytes(Group::Weight),
                    place.extent_bytes(Group::Update),
                    kept_bytes(place.parameters),
                ];
                for ((part, size), is_wanted) in parts.iter_mut().zip(sizes).zip(wanted) {
                    if is_wanted {
                        let next = rest.split_off(size);
                        *part = Some(std::mem::replace(&mut rest, next));
                    }
                }
            }
            let [weight_out, mut planes, gradient] = parts;
            if let Some(list) = own_planes {
                // Free: the last update of the chunk has ended.
                let Some(slot) = list.try_take() else { return };
                planes = Some(slot);
            }
            let Some(planes) = planes else { return };
            let planes = planes.split_at(place.extent_bytes(Group::Update)).0;
            self.planned.pop_front();
            let is_read = self.held.has_planes(chunk);
            self.updates.push(Update {
                step,
                chunk,
                weight_out,
                planes: None,
                is_read,
                gradient: if on_drive { Part::Coming } else { Part::Whole },
                applies,
                written: Vec::new(),
                writes_left: 0,
            });
            if let Some(slot) = gradient {
                self.read_kept(chunk, step, slot);
            }
            if is_read {
                if let Some(update) = self.updates.last_mut() {
                    update.planes = Some(planes);
                }
                continue;
            }
            let plan = self.store.plan_read(&self.working, chunk, Group::Update);
            let (front, rest) = planes.split_at(plan.bytes);
            let place = (plan.drive, plan.offset);
            self.read(place, plan.bytes, front, Work::Planes { chunk, plan, rest });
        }
    }

    fn read(&mut self, place: (usize, u64), bytes: usize, slot: Slot, work: Work) {
        let (operation, (drive, offset), again) = (Operation::Read, place, false);
        let file = Arc::clone(self.store.drives().file(drive));
        self.submit(Pending { operation, file, offset, bytes, again, work }, Some(slot));
    }

    /// Starts an operation, or completes it at once when there is nothing on disk.
    pub(super) fn submit(&mut self, pending: Pending, slot: Option<Slot>) {
        let tag = self.next_tag;
        self.next_tag += 1;
        let Pending { operation, offset, bytes, .. } = pending;
        let file = Arc::clone(&pending.file);
        self.took_off(tag, &pending);
        self.pending.insert(tag, pending);
        let reply = self.reply.clone();
        if bytes == 0 && operation == Operation::Read {
            // Through the same channel, so that there is one way only.
            let _ = reply.send(Completion { tag, slot, result: Ok(()) });
            return;
        }
        self.store.engine().0.submit(Request { operation, file, offset, slot, bytes, tag, reply });
    }

    pub(super) fn complete(&mut self, completion: Completion) {
        let Some(pending) = self.pending.remove(&completion.tag) else { return };
        self.landed(completion.tag, &pending);
        let Completion { slot, result, .. } = completion;
        if matches!(pending.work, Work::Sequence) {
            // Also when the executor has failed: a commit under way is seen to its end.
            if let Some(mut running) = self.running.take() {
                match self.store.completed(&mut running.sequence, slot, result) {
                    Ok(()) => self.go_on(running),
                    Err(error) => self.fail(error),
                }
            }
            return;
        }
        if !self.is_active() {
            return;
        }
        let outcome = match (result, slot) {
            (Ok(()), Some(slot)) => self.use_completed(pending, slot),
            (Err(error), Some(slot)) if error.is_worth_a_retry() && !pending.again => {
                self.submit(Pending { again: true, ..pending }, Some(slot));
                Ok(())
            }
            (Ok(()), None) => Err(Error::invalid("the engine kept a slot")),
            (Err(error), _) => Err(error),
        };
        if let Err(error) = outcome {
            self.fail(error);
        }
    }

    fn use_completed(&mut self, pending: Pending, slot: Slot) -> Result {
        let found = match &pending.work {
            Work::Load { chunk, plan, .. } | Work::Planes { chunk, plan, .. } => {
                self.verify(*chunk, &plan.binding, &plan.sums, &slot[..plan.bytes])
            }
            Work::Gradient { chunk, step } => {
                let binding = self.kept.binding(*chunk, *step);
                self.verify(*chunk, &binding, self.kept.sums(*chunk), &slot)
            }
            Work::Write { chunk, .. } => {
                drop(slot);
                self.wrote(*chunk);
                return Ok(());
            }
            Work::Keep { chunk } => {
                drop(slot);
                self.kept.wrote(*chunk);
                return Ok(());
            }
            Work::Sequence => return Ok(()),
        };
        match found {
            Ok(()) => {}
            // A flip on the bus or in RAM is gone at the second reading.
            Err(_) if !pending.again => {
                self.submit(Pending { again: true, ..pending }, Some(slot));
                return Ok(());
            }
            Err(mismatch) => return Err(self.corrupt(&pending, mismatch)),
        }
        match pending.work {
            Work::Load { number, chunk, plan } => self.loaded(number, chunk, &plan, slot),
            Work::Planes { chunk, rest, .. } => self.planes_read(chunk, rest, slot),
            Work::Gradient { chunk, .. } => self.kept_read(chunk, slot),
            Work::Write { .. } | Work::Keep { .. } | Work::Sequence => {}
        }
        Ok(())
    }

    fn corrupt(&self, pending: &Pending, mismatch: Mismatch) -> Error {
        match &pending.work {
            Work::Load { chunk, plan, .. } => {
                self.store.corrupt(*chunk, Group::Weight, plan.offset, mismatch)
            }
            Work::Planes { chunk, plan, .. } => {
                self.store.corrupt(*chunk, Group::Update, plan.offset, mismatch)
            }
            work => {
                let chunk = work.chunk().unwrap_or(0);
                let record = self.store.layout().chunks()[chunk].record;
                let unit = (mismatch.unit * checksum::UNIT_BYTES) as u64;
                Error::CorruptGradient {
                    path: pending.file.path().into(),
                    record: self.store.manifest().records[record].name.clone(),
                    offset: pending.offset + unit,
                    expected: mismatch.expected,
                    found: mismatch.found,
                }
            }
        }
    }

    /// Verifies what was read.
    fn verify(
        &self,
        chunk: usize,
        binding: &Binding,
        sums: &[u32],
        bytes: &[u8],
    ) -> Result<(), Mismatch> {
        let (start, began) = (Instant::now(), self.shared.events.now());
        let outcome = self.workers.install(|| checksum::verify(binding, bytes, sums));
        Timings::add(&self.shared.timings.verify, start);
        self.shared.events.record(Lane::Verify, "verify", Some(chunk), began);
        outcome
    }

    fn loaded(&mut self, number: u64, chunk: usize, plan: &ReadPlan, mut slot: Slot) {
        slot[plan.bytes..].fill(0);
        for class in &mut self.loads {
            let Some(position) = class.iter().position(|load| load.number == number) else {
                continue;
            };
            let load = &mut class[position];
            load.parts[chunk - load.chunks.start] = Some(slot);
            load.missing -= 1;
            if load.missing == 0 {
                let Some(load) = class.remove(position) else { return };
                let piece = self.pieces.chunks()[chunk].record;
                let whole = load.parts.into_iter().flatten().reduce(Slot::join);
                self.held.read_weights(piece, &self.pool);
                if let Some(whole) = whole {
                    self.deliver(piece, number, load.applies, whole);
                }
            }
            break;
        }
    }

    /// Gives a load's weights to the caller who waits for them; if nobody does any more, to the pool.
    pub(super) fn hand_over(&self, number: u64, weights: Slot) {
        let mut state = self.shared.lock();
        let index = number.checked_sub(state.first_load).map(crate::units::to_usize);
        if let Some(entry) = index.and_then(|index| state.loads.get_mut(index)) {
            entry.weights = Some(weights);
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    fn planes_read(&mut self, chunk: usize, mut rest: Slot, slot: Slot) {
        rest.fill(0);
        if let Some(update) = self.updates.iter_mut().find(|u| u.chunk == chunk && !u.is_read) {
            update.planes = Some(slot.join(rest));
            update.is_read = true;
            self.held.read_planes(chunk, &self.pool);
        }
    }
}
