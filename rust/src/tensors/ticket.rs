//! What was asked of the thread that owns the transfers, and how it ended.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use crate::error::{Error, Result};
use crate::memory::slot::Slot;

/// How a transfer ended; with its slot where the caller is to have that.
pub(super) type Outcome = Result<Option<Slot>>;

/// Something that was asked for. Dropping it does not stop it.
#[derive(Debug)]
pub struct Transfer {
    parts: Receiver<Outcome>,
    state: Mutex<Awaited>,
    process: u32,
}

#[derive(Debug)]
struct Awaited {
    left: usize,
    outcome: Outcome,
}

impl Transfer {
    /// One of `parts` parts, of which each sends its outcome.
    pub(super) fn new(parts: usize) -> (Sender<Outcome>, Self) {
        let (sender, receiver) = unbounded();
        let state = Mutex::new(Awaited { left: parts, outcome: Ok(None) });
        (sender, Self { parts: receiver, state, process: std::process::id() })
    }

    /// Waits up to `timeout`, and returns `None` when it has passed.
    pub fn wait(&self, timeout: Duration) -> Option<Result> {
        let (owner, child) = (self.process, std::process::id());
        if owner != child {
            // A fork has no thread that could answer.
            return Some(Err(Error::UsedAfterFork { owner, child }));
        }
        let end = Instant::now() + timeout;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.left > 0 {
            let outcome =
                match self.parts.recv_timeout(end.saturating_duration_since(Instant::now())) {
                    Ok(outcome) => outcome,
                    Err(RecvTimeoutError::Timeout) => return None,
                    Err(RecvTimeoutError::Disconnected) => {
                        state.left = 1;
                        Err(Error::invalid("the thread of the store has stopped"))
                    }
                };
            state.left -= 1;
            if state.outcome.is_ok() {
                state.outcome = outcome;
            }
        }
        Some(state.outcome.as_ref().map(|_| ()).map_err(Error::clone))
    }

    /// The slot that came back with the outcome, once.
    pub fn take_slot(&self) -> Option<Slot> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.outcome.as_mut().ok()?.take()
    }
}
