//! Updating a chunk once its planes and its gradient are here, and writing it behind.

use std::sync::Arc;
use std::time::Instant;

use super::{Executor, Part, Pending, Work};
use crate::error::{Error, Result};
use crate::io::engine::Operation;
use crate::memory::slot::Slot;
use crate::pipeline::update::{Weights, update_chunk};
use crate::pipeline::{Lane, Timings};
use crate::units::Group;

impl Executor {
    /// An update whose planes and gradient are here and whose step may write: all steps before it
    /// are settled, so neither copy that it could overwrite is needed by a commit under way.
    pub(super) fn ready_update(&self) -> Option<usize> {
        let open = self.steps.front()?.number;
        self.updates.iter().position(|update| {
            let piece = self.pieces.chunks()[update.chunk].record;
            update.planes.is_some()
                && update.step == open
                && !matches!(update.gradient, Part::Coming)
                && self.sources[piece].is_some()
        })
    }

    pub(super) fn update(&mut self, index: usize) -> Result {
        let (start, began) = (Instant::now(), self.shared.events.now());
        let update = &mut self.updates[index];
        let chunk = update.chunk;
        let pieces = Arc::clone(&self.pieces);
        let place = &pieces.chunks()[chunk];
        let missing = || Error::invalid("an update without its buffers");
        let mut planes = update.planes.take().ok_or_else(missing)?;
        let mut weight_out = update.weight_out.take();
        let source = self.sources[place.record].as_mut().ok_or_else(missing)?;
        let number = chunk - pieces.records()[place.record].start;
        let mut weights = source.weights[number].take().ok_or_else(missing)?;
        let step = self.steps.front().ok_or_else(missing)?;
        let spans = self.settings.spans(&step.adamw, &self.store.layout().chunks()[chunk]);
        let part = std::mem::replace(&mut update.gradient, Part::Whole);
        let bytes = place.parameters * size_of::<f32>();
        let gradient = match (&part, &source.gradient) {
            (Part::Here(slot), _) => &slot[..bytes],
            (_, Some(whole)) => {
                let first = crate::units::to_usize(place.start) * size_of::<f32>();
                &whole[first..first + bytes]
            }
            _ => return Err(missing()),
        };
        // What stays in RAM is written only for a commit.
        let residents = &self.pool.residents;
        let stays =
            [residents.weights_of(place.record).is_some(), residents.planes_of(chunk).is_some()];
        let plan = |group: Group, planes: usize| match stays[group as usize] && !step.commits {
            true => Ok(None),
            false => self.store.plan_write(&self.working, chunk, group, planes).map(Some),
        };
        let plans =
            [plan(Group::Weight, 1)?, plan(Group::Update, place.format().update_planes().len())?];
        self.held.change(place.record, chunk);
        let kernel = self.kernel;
        let bindings = plans.each_ref().map(|plan| plan.as_ref().map(|plan| &plan.binding));
        let sums = self.workers.install(|| {
            let weights = match weight_out.as_mut() {
                Some(out) => Weights::Apart(&weights, out),
                None => Weights::InPlace(&mut weights),
            };
            update_chunk(kernel, &spans, place, weights, gradient, &mut planes, bindings)
        });
        drop(part);
        let new_weights = if update.applies {
            // Compute has its own: what is in flight belongs to the engine.
            if let Some(out) = &weight_out {
                weights.copy_from_slice(out);
            }
            source.weights[number] = Some(weights);
            weight_out
        } else {
            Some(weight_out.unwrap_or(weights))
        };
        source.chunks_left -= 1;
        let is_last = source.chunks_left == 0;
        self.updates[index].writes_left = plans.iter().flatten().count();
        self.touched |= self.updates[index].writes_left > 0;
        let slots = [new_weights, Some(planes)];
        for (((group, plan), sums), slot) in Group::ALL.into_iter().zip(plans).zip(sums).zip(slots)
        {
            let Some(plan) = plan else { continue };
            self.updates[index].written.push((group, plan.entry, sums));
            let slot = slot.ok_or_else(missing)?;
            let (offset, bytes) = (plan.offset, slot.len());
            let (operation, again, work) = (Operation::Write, false, Work::Write { chunk, group });
            let file = Arc::clone(self.store.drives().file(plan.drive));
            self.submit(Pending { operation, file, offset, bytes, again, work }, Some(slot));
        }
        if is_last {
            self.end_source(place.record);
        }
        Timings::add(&self.shared.timings.update, start);
        self.shared.events.record(Lane::Update, "update", Some(chunk), began);
        if self.updates[index].writes_left == 0 {
            self.end_update(index);
            self.ended_in_ram = true;
        }
        Ok(())
    }

    /// All chunks of a piece are updated: its weights go to the caller or the pool, its gradient to the
    /// drive or the pool.
    fn end_source(&mut self, piece: usize) {
        let Some(source) = self.sources[piece].take() else { return };
        self.on_their_way -= usize::from(source.hand_over.is_some());
        if let (Some(step), Some(gradient)) = (source.kept_by, source.gradient) {
            self.keeping.push_back((step, piece, gradient));
            self.ended_in_ram = true;
        }
        if let Some(number) = source.hand_over
            && let Some(weights) = source.weights.into_iter().flatten().reduce(Slot::join)
        {
            self.hand_over(number, weights);
        }
    }

    pub(super) fn wrote(&mut self, chunk: usize) {
        let position = self.updates.iter().position(|u| u.chunk == chunk && u.writes_left > 0);
        let Some(position) = position else { return };
        self.updates[position].writes_left -= 1;
        if self.updates[position].writes_left == 0 {
            self.end_update(position);
        }
    }

    fn end_update(&mut self, position: usize) {
        let update = self.updates.remove(position);
        let chunk = update.chunk;
        for (group, entry, sums) in &update.written {
            self.working.set(self.store.layout(), chunk, *group, *entry, sums);
        }
        self.on_disk[chunk] += 1;
        if let Some(step) = self.steps.iter_mut().find(|step| step.number == update.step) {
            step.updates_left -= 1;
        }
    }
}
