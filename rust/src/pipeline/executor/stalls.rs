//! What callers wait for: the executor knows, and publishes it.

use super::{Executor, Part, RESIDENT};
use crate::pipeline::stalls::{Cause, Causes};

impl Executor {
    /// Tells the callers what they wait for, if that has changed.
    pub(super) fn publish_causes(&mut self) {
        let causes = Causes { weights: self.loads_wait_for(), gradient: self.updates_wait_for() };
        if causes != self.causes {
            self.causes = causes;
            self.shared.lock().causes = causes;
            self.shared.changed.notify_all();
        }
    }

    /// What the first load that was not handed over waits for.
    fn loads_wait_for(&self) -> Cause {
        // Weights that are updated on their way to the caller come before all that are only read.
        if self.on_their_way > 0 {
            return self.updates_wait_for();
        }
        let fronts =
            self.loads.iter().enumerate().filter_map(|(c, queue)| Some((c, queue.front()?)));
        let Some((class, load)) = fronts.min_by_key(|(_, load)| load.number) else {
            return Cause::Read;
        };
        let rest = load.chunks.clone().zip(&load.needs).skip(load.started);
        let mut unwritten = rest.filter(|(chunk, needs)| self.on_disk[*chunk] < **needs);
        let has_buffer = load.started > 0 || load.unread.is_some();
        // Of what stays in RAM the buffer is free only when it was written.
        let first = unwritten.next().filter(|_| has_buffer || class == RESIDENT);
        match first {
            Some((chunk, _)) if self.is_being_written(chunk) => Cause::Write,
            Some(_) => self.updates_wait_for(),
            None if has_buffer => Cause::Read,
            None => Cause::Pool,
        }
    }

    /// What the first update that has its gradient and was not computed waits for: what frees gradient
    /// buffers, and what comes before a write.
    fn updates_wait_for(&self) -> Cause {
        let chunks = self.pieces.chunks();
        let has_gradient = |chunk: usize| self.sources[chunks[chunk].record].is_some();
        let open = self.steps.front().map(|step| step.number);
        let mut with_memory = self.updates.iter().filter(|update| update.writes_left == 0);
        // They get their memory in order: those that have it come first.
        if let Some(update) = with_memory.find(|update| has_gradient(update.chunk)) {
            return if update.planes.is_none() || matches!(update.gradient, Part::Coming) {
                Cause::Read
            } else if Some(update.step) == open && self.store.is_writable() {
                Cause::Update
            } else {
                Cause::Write
            };
        }
        match self.planned.front() {
            Some(next) if self.on_disk[next.chunk] < next.needs => Cause::Write,
            _ => Cause::Pool,
        }
    }

    fn is_being_written(&self, chunk: usize) -> bool {
        self.updates.iter().any(|update| update.chunk == chunk && update.writes_left > 0)
    }
}
