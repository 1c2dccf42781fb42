//! Reading ahead: weights into block buffers, update planes into chunk slots.

use std::sync::Arc;
use std::time::Instant;

use super::{Executor, Pending, PlannedUpdate, Update, Work};
use crate::buffer::Slot;
use crate::checksum;
use crate::engine::{Completion, Operation, Request};
use crate::error::{Error, Result};
use crate::pipeline::Timings;
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
            while let Some(load) = self.loads[class].get_mut(position)
                && load.started < load.chunks.len()
            {
                let chunk = load.chunks.start + load.started;
                if self.on_disk[chunk] < load.needs[load.started] {
                    return;
                }
                let Some(unread) = load.unread.take() else { return };
                let (part, unread) =
                    unread.split_at(layout.chunks()[chunk].extent_bytes(Group::Weight));
                load.started += 1;
                load.unread = (load.started < load.chunks.len()).then_some(unread);
                let number = load.number;
                let plan = self.store.plan_read(&self.working, chunk, Group::Weight);
                let place = (plan.drive, plan.offset);
                self.read(place, plan.bytes, part, Work::Load { number, chunk, plan });
            }
        }
    }

    pub(super) fn start_plane_reads(&mut self) {
        while let Some(next) = self.planned.front() {
            if self.on_disk[next.chunk] < next.needs {
                return;
            }
            let Some(slot) = self.pool.chunk_slots.try_take() else {
                self.starved.chunk_slots = true;
                return;
            };
            let Some(PlannedUpdate { step, chunk, .. }) = self.planned.pop_front() else { return };
            let place = &self.store.layout().chunks()[chunk];
            let (weight_out, rest) = slot.split_at(place.extent_bytes(Group::Weight));
            let (planes, unused) = rest.split_at(place.extent_bytes(Group::Update));
            drop(unused);
            let plan = self.store.plan_read(&self.working, chunk, Group::Update);
            let (front, rest) = planes.split_at(plan.bytes);
            self.updates.push(Update {
                step,
                chunk,
                weight_out: Some(weight_out),
                planes: None,
                is_read: false,
                written: Vec::new(),
                writes_left: 0,
            });
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
            Work::Write { chunk } => {
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
        let start = Instant::now();
        let outcome = self
            .workers
            .install(|| checksum::verify(&plan.binding, &bytes[..plan.bytes], &plan.sums));
        Timings::add(&self.shared.timings.verify, start);
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
                let mut state = self.shared.lock();
                let index = crate::units::to_usize(number - state.first_load);
                if let Some(entry) = state.loads.get_mut(index) {
                    entry.weights = whole;
                }
                drop(state);
                self.shared.changed.notify_all();
            }
            break;
        }
    }

    fn planes_read(&mut self, chunk: usize, mut rest: Slot, slot: Slot) {
        rest.fill(0);
        if let Some(update) = self.updates.iter_mut().find(|u| u.chunk == chunk && !u.is_read) {
            update.planes = Some(slot.join(rest));
            update.is_read = true;
        }
    }
}
