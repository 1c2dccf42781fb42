//! What callers and the executor share.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::memory::slot::Slot;
use crate::pipeline::events::Recorder;
use crate::pipeline::squares::Squares;
use crate::pipeline::stalls::{Causes, Timings};

/// A load of the schedule that the caller has not taken yet.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) unit: usize,
    pub(super) weights: Option<Slot>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Number of the first load in `loads`, counted from the pipeline's start.
    pub(super) first_load: u64,
    pub(super) loads: VecDeque<Loaded>,
    pub(super) failure: Option<Error>,
    /// The step that was begun last, which is pending until it is finished; how many are finished, and how
    /// many durable: written, and committed if that was asked for.
    pub(super) newest: u64,
    pub(super) finished: u64,
    pub(super) durable: u64,
    /// Of the step that was begun last: whether it is to be committed, the units whose gradients it
    /// defers, those that it updates with them at once, and how many get a gradient.
    pub(super) commits: bool,
    pub(super) defers: BTreeSet<usize>,
    pub(super) updates: BTreeSet<usize>,
    pub(super) gradients: usize,
    /// The squares of its gradients so far.
    pub(super) squares: Squares,
    /// Units whose gradients the last step deferred, to be applied by the next one.
    pub(super) waiting: Option<BTreeSet<usize>>,
    /// Whether a step was finished without a commit since the last one that is committed.
    pub(super) is_uncommitted: bool,
    /// What callers wait for, if they do.
    pub(super) causes: Causes,
}

impl State {
    /// Whether a step was begun and is not finished.
    pub(super) fn is_pending(&self) -> bool {
        self.newest != self.finished
    }

    /// Nobody takes the weights of the loads so far any more.
    pub(super) fn forget_loads(&mut self) {
        self.first_load += self.loads.len() as u64;
        self.loads.clear();
    }
}

/// What caller and executor share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    pub(super) changed: Condvar,
    pub(super) timings: Timings,
    pub(super) events: Recorder,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete under the lock; a panic elsewhere cannot leave it half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
