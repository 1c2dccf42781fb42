//! Reading ahead: weights into block buffers, update planes into chunk slots.

use std::sync::Arc;
use std::time::Instant;

use super::{Executor, Pending, PlannedUpdate, RESIDENT, Update, Work};
use crate::buffer::{Slot, SlotList};
use crate::checksum;
use crate::engine::{Completion, Operation, Request};
use crate::error::{Error, Result};
use crate::pipeline::{Lane, Timings};
use crate::store::ReadPlan;
use crate::units::Group;

impl Executor {
    /// Starts the loads of one kind of buffer, in order, as far as buffers and the disk allow.
    pub(super) fn start_loads(&mut self, class: usize) {
        let layout = Arc::clone(self.store.layout());
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
                let record = layout.chunks()[load.chunks.start].record;
                load.unread = Some(buffer.split_at(layout.record_weight_bytes(record)).0);
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
            let bytes = self.store.layout().chunks()[chunk].extent_bytes(Group::Weight);
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

    /// Serves the loads of records that stay in RAM: without I/O, once they were read. A record whose
    /// buffer is out waits alone; loads of the same record keep their order.
    pub(super) fn start_resident_loads(&mut self) {
        let mut waiting = Vec::new();
        let mut position = 0;
        while let Some(load) = self.loads[RESIDENT].get(position) {
            let record = self.store.layout().chunks()[load.chunks.start].record;
            let is_written =
                load.chunks.clone().zip(&load.needs).all(|(c, needs)| self.on_disk[c] >= *needs);
            position += 1;
            if load.started > 0 || !is_written || waiting.contains(&record) {
                waiting.push(record);
                continue;
            }
            let list = self.pool.residents.weights_of(record);
            let Some(slot) = list.and_then(SlotList::try_take) else {
                self.starved.residents.push(record);
                waiting.push(record);
                continue;
            };
            if self.held.has_weights(record) {
                position -= 1;
                if let Some(load) = self.loads[RESIDENT].remove(position) {
                    self.hand_over(load.number, slot);
                }
            } else {
                let bytes = self.store.layout().record_weight_bytes(record);
                self.loads[RESIDENT][position - 1].unread = Some(slot.split_at(bytes).0);
                self.read_weights(RESIDENT, position - 1);
                waiting.push(record);
            }
        }
    }

    /// Gives updates their memory, in order, and reads the planes that are not in RAM.
    pub(super) fn start_plane_reads(&mut self) {
        let layout = Arc::clone(self.store.layout());
        while let Some(&PlannedUpdate { step, chunk, needs }) = self.planned.front() {
            if self.on_disk[chunk] < needs {
                return;
            }
            let place = &layout.chunks()[chunk];
            let own_weights = self.pool.residents.weights_of(place.record).is_some();
            let own_planes = self.pool.residents.planes_of(chunk);
            let mut weight_out = None;
            let mut planes = None;
            if !own_weights || own_planes.is_none() {
                let Some(slot) = self.pool.chunk_slots.try_take() else {
                    self.starved.chunk_slots = true;
                    return;
                };
                let (front, rest) = slot.split_at(place.extent_bytes(Group::Weight));
                weight_out = (!own_weights).then_some(front);
                planes = own_planes.is_none().then_some(rest);
            }
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
                written: Vec::new(),
                writes_left: 0,
            });
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
        self.submit(Pending { operation, drive, offset, bytes, again, work }, Some(slot));
    }

    /// Starts an operation, or completes it at once when there is nothing on disk.
    pub(super) fn submit(&mut self, pending: Pending, slot: Option<Slot>) {
        let tag = self.next_tag;
        self.next_tag += 1;
        let Pending { operation, drive, offset, bytes, .. } = pending;
        self.took_off(tag, &pending);
        self.pending.insert(tag, pending);
        let reply = self.reply.clone();
        if bytes == 0 && operation == Operation::Read {
            // Through the same channel, so that there is one way only.
            let _ = reply.send(Completion { tag, slot, result: Ok(()) });
            return;
        }
        let file = Arc::clone(self.store.drives().file(drive));
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
        let (chunk, group, plan) = match &pending.work {
            Work::Load { chunk, plan, .. } => (*chunk, Group::Weight, plan),
            Work::Planes { chunk, plan, .. } => (*chunk, Group::Update, plan),
            Work::Write { chunk, .. } => {
                drop(slot);
                self.wrote(*chunk);
                return Ok(());
            }
            Work::Sequence => return Ok(()),
        };
        if !self.verify(chunk, group, plan, pending.again, &slot)? {
            self.submit(Pending { again: true, ..pending }, Some(slot));
            return Ok(());
        }
        match pending.work {
            Work::Load { number, chunk, plan } => self.loaded(number, chunk, &plan, slot),
            Work::Planes { chunk, rest, .. } => self.planes_read(chunk, rest, slot),
            Work::Write { .. } | Work::Sequence => {}
        }
        Ok(())
    }

    /// Verifies what was read; `Ok(false)` when it must be read once more.
    fn verify(
        &self,
        chunk: usize,
        group: Group,
        plan: &ReadPlan,
        again: bool,
        bytes: &[u8],
    ) -> Result<bool> {
        let (start, began) = (Instant::now(), self.shared.events.now());
        let outcome = self
            .workers
            .install(|| checksum::verify(&plan.binding, &bytes[..plan.bytes], &plan.sums));
        Timings::add(&self.shared.timings.verify, start);
        self.shared.events.record(Lane::Verify, "verify", Some(chunk), began);
        match outcome {
            Ok(()) => Ok(true),
            // A flip on the bus or in RAM is gone at the second reading.
            Err(_) if !again => Ok(false),
            Err(mismatch) => Err(self.store.corrupt(chunk, group, plan.offset, mismatch)),
        }
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
                let load = class.remove(position);
                let parts = load.into_iter().flat_map(|load| load.parts).flatten();
                let whole = parts.reduce(Slot::join);
                self.held.read_weights(self.store.layout().chunks()[chunk].record, &self.pool);
                if let Some(whole) = whole {
                    self.hand_over(number, whole);
                }
            }
            break;
        }
    }

    /// Gives a load's weights to the caller who waits for them.
    fn hand_over(&self, number: u64, weights: Slot) {
        let mut state = self.shared.lock();
        let index = crate::units::to_usize(number - state.first_load);
        if let Some(entry) = state.loads.get_mut(index) {
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
