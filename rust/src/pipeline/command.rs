//! What callers tell the executor.

use std::sync::Arc;

use crossbeam_channel::Sender;

use crate::error::Result;
use crate::memory::slot::Slot;
use crate::optimizer::hyperparameters::Hyperparameters;
use crate::pipeline::schedule::CheckedSchedule;

/// What becomes of the gradients that a step has deferred.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum After {
    /// Nothing was deferred, or the updates that the step has made stand.
    Stands,
    /// The next step applies them, multiplied by this; updates that the step has made are taken back.
    Applied(f32),
}

/// What a caller wants of the executor.
pub(super) enum Command {
    Begin {
        schedule: Arc<CheckedSchedule>,
        hyperparameters: Hyperparameters,
        commits: bool,
        first_load: u64,
        number: u64,
    },
    Submit {
        unit: usize,
        weights: Option<Slot>,
        gradient: Slot,
    },
    /// A unit got no gradient; its weights come back.
    Skip {
        unit: usize,
        weights: Option<Slot>,
    },
    End {
        commit: Option<Vec<u8>>,
        after: After,
    },
    Abort {
        reply: Sender<Result>,
    },
    Stop,
}
