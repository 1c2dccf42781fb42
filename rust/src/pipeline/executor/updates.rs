//! Updating a chunk once its planes and its gradient are here, and writing it behind.

use std::sync::Arc;
use std::time::Instant;

use super::{Executor, Pending, Work};
use crate::engine::Operation;
use crate::error::{Error, Result};
use crate::pipeline::Timings;
use crate::pipeline::update::update_chunk;
use crate::units::Group;

impl Executor {
    /// An update whose planes and gradient are here and whose step may write: all steps before it
    /// are settled, so neither copy that it could overwrite is needed by a commit under way.
    pub(super) fn ready_update(&self) -> Option<usize> {
        let open = self.steps.front()?.number;
        self.updates.iter().position(|update| {
            let record = self.store.layout().chunks()[update.chunk].record;
            update.planes.is_some() && update.step == open && self.sources[record].is_some()
        })
    }

    pub(super) fn update(&mut self, index: usize) -> Result {
        let start = Instant::now();
        let update = &mut self.updates[index];
        let chunk = update.chunk;
        let layout = Arc::clone(self.store.layout());
        let place = &layout.chunks()[chunk];
        let missing = || Error::invalid("an update without its buffers");
        let mut weight_out = update.weight_out.take().ok_or_else(missing)?;
        let mut planes = update.planes.take().ok_or_else(missing)?;
        let source = self.sources[place.record].as_mut().ok_or_else(missing)?;
        let adamw = &self.steps.front().ok_or_else(missing)?.adamw;
        let spans = self.settings.spans(adamw, place);
        let first = crate::units::to_usize(place.start);
        let (weights, gradient) = (&source.weights, &source.gradient);
        let weights = &weights[first * place.format().weight_bytes()..];
        let gradient =
            &gradient[first * size_of::<f32>()..(first + place.parameters) * size_of::<f32>()];
        let kernel = self.kernel;
        let plans = [
            self.store.plan_write(&self.working, chunk, Group::Weight, 1)?,
            self.store.plan_write(
                &self.working,
                chunk,
                Group::Update,
                place.format().update_planes().len(),
            )?,
        ];
        let bindings = [&plans[0].binding, &plans[1].binding];
        let sums = self.workers.install(|| {
            let (out, planes) = (&mut weight_out, &mut planes);
            update_chunk(kernel, &spans, place, weights, gradient, out, planes, bindings)
        });
        source.chunks_left -= 1;
        if source.chunks_left == 0 {
            // Weights and gradient return to the pool.
            self.sources[place.record] = None;
        }
        self.touched = true;
        self.updates[index].writes_left = Group::ALL.len();
        for ((group, plan), (sums, slot)) in
            Group::ALL.into_iter().zip(plans).zip(sums.into_iter().zip([weight_out, planes]))
        {
            self.updates[index].written.push((group, plan.entry, sums));
            let (drive, offset, bytes) = (plan.drive, plan.offset, slot.len());
            let (operation, again, work) = (Operation::Write, false, Work::Write { chunk });
            self.submit(Pending { operation, drive, offset, bytes, again, work }, Some(slot));
        }
        Timings::add(&self.shared.timings.update, start);
        Ok(())
    }

    pub(super) fn wrote(&mut self, chunk: usize) {
        let position = self.updates.iter().position(|u| u.chunk == chunk && u.writes_left > 0);
        let Some(position) = position else { return };
        self.updates[position].writes_left -= 1;
        if self.updates[position].writes_left > 0 {
            return;
        }
        let update = self.updates.remove(position);
        for (group, entry, sums) in &update.written {
            self.working.set(self.store.layout(), chunk, *group, *entry, sums);
        }
        self.on_disk[chunk] += 1;
        if let Some(step) = self.steps.iter_mut().find(|step| step.number == update.step) {
            step.updates_left -= 1;
        }
    }
}
