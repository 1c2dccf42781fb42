//! What callers wait for: weights, gradient buffers, the sum of squares, durability.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::memory::slot::{Slot, SlotList};
use crate::pipeline::events::{self, Lane};
use crate::pipeline::front::Pipeline;
use crate::pipeline::memory::gradient_list;
use crate::pipeline::shared::{Shared, State};
use crate::pipeline::stalls::{Cause, Causes};
use crate::units::{Group, Unit};

/// How long a wait for a gradient buffer goes on before its cause is looked at again: nobody tells of a
/// change there.
const SLICE: Duration = Duration::from_millis(2);

impl Pipeline {
    /// The weights of the schedule's next load, which must be of `unit`; waits up to `timeout`
    /// and returns `None` when it has passed.
    ///
    /// # Errors
    /// `Invalid` when the schedule says otherwise; the pipeline's failure.
    pub fn take_weights(&self, unit: usize, timeout: Duration) -> Result<Option<Slot>> {
        self.wait_for(
            timeout,
            |causes| causes.weights,
            |state| match state.loads.front_mut() {
                Some(next) if next.unit == unit => {
                    let weights = next.weights.take();
                    if weights.is_some() {
                        state.loads.pop_front();
                        state.first_load += 1;
                    }
                    Ok(weights)
                }
                next => {
                    let next = next.map_or("nothing".to_owned(), |n| self.units.unit_name(n.unit));
                    let asked = self.units.unit_name(unit);
                    Err(Error::invalid(format!(
                        "weights of {asked} were asked for; the schedule's next load is {next}"
                    )))
                }
            },
        )
    }

    /// A free gradient buffer for `unit` (its content is arbitrary); waits up to `timeout` and
    /// returns `None` when it has passed.
    ///
    /// # Errors
    /// The pipeline's failure.
    pub fn take_gradient(&self, unit: usize, timeout: Duration) -> Result<Option<Slot>> {
        self.store.check()?;
        self.check_unit(unit)?;
        let list = gradient_list(&self.pool, &self.units, unit).ok_or_else(|| {
            let name = self.units.unit_name(unit);
            Error::invalid(format!("the pool has no buffer for a gradient of {name}"))
        })?;
        self.take_free(list, timeout)
    }

    /// By chunk, a free buffer for the weights of `unit` that come back for their update (its content is
    /// arbitrary); waits up to `timeout` and returns `None` when it has passed. All that was loaded must be
    /// in it when it is submitted, padding between tensors, too: that is written as it is.
    ///
    /// # Errors
    /// `Invalid` when whole records are moved, and where the weights stay in RAM: their own buffer is
    /// submitted. The pipeline's failure.
    pub fn take_outgoing(&self, unit: usize, timeout: Duration) -> Result<Option<Slot>> {
        self.store.check()?;
        self.check_unit(unit)?;
        let name = self.units.unit_name(unit);
        if self.units.unit() != Unit::Chunk {
            return Err(Error::invalid(format!(
                "{name}: weights of whole records are submitted in the buffer that they were loaded into"
            )));
        }
        if self.pool.residents.weights_of(unit).is_some() {
            return Err(Error::invalid(format!(
                "the weights of {name} stay in RAM: submit the buffer that take_weights gave"
            )));
        }
        let bytes = self.units.chunks()[unit].extent_bytes(Group::Weight);
        if self.pool.outgoing.slot_bytes() < bytes {
            return Err(Error::invalid(format!(
                "the pool has no buffer for weights of {name} to come back"
            )));
        }
        let slot = self.take_free(&self.pool.outgoing, timeout)?;
        Ok(slot.map(|slot| slot.split_at(bytes).0))
    }

    /// A free slot of a list from which updates give back.
    fn take_free(&self, list: &SlotList, timeout: Duration) -> Result<Option<Slot>> {
        let start = Instant::now();
        let mut wait = Wait::new(&self.shared);
        let mut slot = list.try_take();
        // Not `wait_for`: nobody tells of a slot that came free.
        loop {
            let state = self.shared.lock();
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let left = timeout.saturating_sub(start.elapsed());
            if slot.is_some() || left.is_zero() {
                return Ok(slot);
            }
            wait.for_cause(state.causes.gradient);
            drop(state);
            slot = list.take(left.min(SLICE));
        }
    }

    /// The sum of the squares of all gradients of the pending step, in the order of the records,
    /// also by chunk; waits up to `timeout` for the last one, and returns `None` when it has passed.
    ///
    /// # Errors
    /// `NotFinite` when one is NaN or infinite; the pipeline's failure.
    pub fn squares(&self, timeout: Duration) -> Result<Option<f64>> {
        self.wait_for(
            timeout,
            |_| Cause::Update,
            |state| {
                let is_whole = state.squares.units == state.gradients;
                Ok(is_whole.then(|| state.squares.sum()))
            },
        )
    }

    /// Waits until every finished step is durable: written, and committed if that was asked for.
    /// `false` when `timeout` has passed.
    ///
    /// # Errors
    /// `Invalid` while gradients wait for a step that applies them; the pipeline's failure.
    pub fn wait_durable(&self, timeout: Duration) -> Result<bool> {
        let durable = self.wait_for(
            timeout,
            |_| Cause::Commit,
            |state| {
                if state.waiting.is_some() {
                    return Err(Error::invalid("gradients wait for a step that applies them"));
                }
                Ok((state.durable == state.finished).then_some(()))
            },
        )?;
        Ok(durable.is_some())
    }

    /// Asks `look` again whenever the executor has changed something, until it finds what it looks for or
    /// `timeout` has passed.
    fn wait_for<T>(
        &self,
        timeout: Duration,
        cause: impl Fn(&Causes) -> Cause,
        mut look: impl FnMut(&mut State) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        self.store.check()?;
        let start = Instant::now();
        let mut wait = Wait::new(&self.shared);
        let mut state = self.shared.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let found = look(&mut state)?;
            let left = timeout.saturating_sub(start.elapsed());
            if found.is_some() || left.is_zero() {
                return Ok(found);
            }
            wait.for_cause(cause(&state.causes));
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// One caller's wait: the time from one `for_cause` to the next, or to the end, counts for the first one's
/// cause.
struct Wait<'a> {
    shared: &'a Shared,
    slice: Option<(Cause, u64)>,
}

impl<'a> Wait<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self { shared, slice: None }
    }

    /// From now on the caller waits for this.
    fn for_cause(&mut self, cause: Cause) {
        if self.slice.is_none_or(|(current, _)| current != cause) {
            self.end_slice();
            self.slice = Some((cause, events::monotonic()));
        }
    }

    fn end_slice(&mut self) {
        let Some((cause, start)) = self.slice.take() else { return };
        let nanoseconds = events::monotonic().saturating_sub(start);
        self.shared.timings.add_stall(cause, nanoseconds);
        if self.shared.events.now().is_some() {
            self.shared.events.record(Lane::Stall, cause.name(), None, Some(start));
        }
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.end_slice();
    }
}

#[cfg(test)]
mod tests;
