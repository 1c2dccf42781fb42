//! What callers wait for: weights, gradient buffers, the sum of squares, durability.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::stalls::{Cause, Wait};
use super::{Pipeline, SLICE};
use crate::buffer::Slot;
use crate::error::{Error, Result};
use crate::pipeline::memory::gradient_list;

impl Pipeline {
    /// The weights of the schedule's next load, which must be of `record`; waits up to `timeout`
    /// and returns `None` when it has passed.
    ///
    /// # Errors
    /// `Invalid` when the schedule says otherwise; the pipeline's failure.
    pub fn take_weights(&self, record: usize, timeout: Duration) -> Result<Option<Slot>> {
        self.store.check()?;
        let start = Instant::now();
        let mut wait = Wait::new(&self.shared);
        let mut state = self.shared.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            match state.loads.front_mut() {
                Some(next) if next.record == record => {
                    if let Some(weights) = next.weights.take() {
                        state.loads.pop_front();
                        state.first_load += 1;
                        return Ok(Some(weights));
                    }
                }
                next => {
                    let next =
                        next.map_or("nothing".to_owned(), |n| format!("record {}", n.record));
                    return Err(Error::invalid(format!(
                        "weights of record {record} were asked for; the schedule's next load is {next}"
                    )));
                }
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            wait.for_cause(state.causes.weights);
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// A free gradient buffer for `record` (its content is arbitrary); waits up to `timeout` and
    /// returns `None` when it has passed.
    ///
    /// # Errors
    /// The pipeline's failure.
    pub fn take_gradient(&self, record: usize, timeout: Duration) -> Result<Option<Slot>> {
        self.store.check()?;
        self.check_record(record)?;
        let start = Instant::now();
        let list = gradient_list(&self.pool, &self.store, record);
        let mut wait = Wait::new(&self.shared);
        let mut slot = list.try_take();
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

    /// The sum of the squares of all gradients of the step that was begun, in the order of the records; waits
    /// up to `timeout` for the last one, and returns `None` when it has passed.
    ///
    /// # Errors
    /// `NotFinite` when one is NaN or infinite; the pipeline's failure.
    pub fn squares(&self, timeout: Duration) -> Result<Option<f64>> {
        self.store.check()?;
        let start = Instant::now();
        let mut wait = Wait::new(&self.shared);
        let mut state = self.shared.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let left = timeout.saturating_sub(start.elapsed());
            if state.squares.len() == state.gradients {
                return Ok(Some(state.squares.values().sum()));
            }
            if left.is_zero() {
                return Ok(None);
            }
            wait.for_cause(Cause::Update);
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until every step that has ended is written, and committed if that was asked for.
    /// `false` when `timeout` has passed.
    ///
    /// # Errors
    /// `Invalid` while gradients wait for a step that applies them; the pipeline's failure.
    pub fn wait_settled(&self, timeout: Duration) -> Result<bool> {
        self.store.check()?;
        let start = Instant::now();
        let mut wait = Wait::new(&self.shared);
        let mut state = self.shared.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.waiting.is_some() {
                return Err(Error::invalid("gradients wait for a step that applies them"));
            }
            let left = timeout.saturating_sub(start.elapsed());
            if state.settled == state.ended || left.is_zero() {
                return Ok(state.settled == state.ended);
            }
            wait.for_cause(Cause::Commit);
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}
