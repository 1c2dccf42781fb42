//! Commits: the store's operations in a fixed order, before a first write and when a step is whole.

use std::sync::Arc;

use crate::error::Result;
use crate::io::engine::Completion;
use crate::pipeline::events::Lane;
use crate::pipeline::executor::context::Context;
use crate::pipeline::executor::requests::{Request, Requests, Work};
use crate::pipeline::executor::steps::Steps;
use crate::pipeline::executor::working_state::WorkingState;
use crate::store::{Next, Sequence, Sequenced};

/// A sequence under way.
struct Running {
    sequence: Sequence,
    commits: bool,
    /// When the commit began, while events are recorded.
    began: Option<u64>,
}

#[derive(Default)]
pub(super) struct Commits {
    running: Option<Running>,
}

impl Commits {
    /// Whether a sequence is under way.
    pub(super) fn are_running(&self) -> bool {
        self.running.is_some()
    }

    /// Starts what must be durable before a store that was just opened is written to.
    pub(super) fn start_writing(&mut self, cx: &Context, requests: &mut Requests) -> Result {
        let sequence = cx.store.start_writing()?;
        self.go_on(cx, requests, Running { sequence, commits: false, began: None })?;
        Ok(())
    }

    /// Makes the oldest steps durable of which all writes have completed: the drain before the flush.
    pub(super) fn make_durable(
        &mut self,
        cx: &Context,
        requests: &mut Requests,
        working: &mut WorkingState,
        steps: &mut Steps,
    ) -> Result {
        while self.running.is_none()
            && let Some(blob) = steps.take_written()
        {
            let Some(blob) = blob else {
                oldest_is_durable(cx, steps);
                continue;
            };
            let sequence = working.start_commit(&cx.store, &blob)?;
            let began = cx.events().now();
            if self.go_on(cx, requests, Running { sequence, commits: true, began })? {
                committed(working, cx, steps);
            }
        }
        Ok(())
    }

    /// An operation of the sequence under way has completed.
    pub(super) fn landed(
        &mut self,
        cx: &Context,
        requests: &mut Requests,
        working: &mut WorkingState,
        steps: &mut Steps,
        completion: Completion,
    ) -> Result {
        let Some(mut running) = self.running.take() else { return Ok(()) };
        let Completion { slot, result, .. } = completion;
        cx.store.completed(&mut running.sequence, slot, result)?;
        if self.go_on(cx, requests, running)? {
            committed(working, cx, steps);
        }
        Ok(())
    }

    /// Submits a sequence's next operations; `true` when it was a commit, and has ended.
    fn go_on(
        &mut self,
        cx: &Context,
        requests: &mut Requests,
        mut running: Running,
    ) -> Result<bool> {
        loop {
            match cx.store.next_operation(&mut running.sequence)? {
                Next::Operation(Sequenced { operation, drive, offset, slot, bytes }) => {
                    let (file, work) = (Arc::clone(cx.store.drives().file(drive)), Work::Sequence);
                    let again = false;
                    requests.start(
                        cx,
                        Request { operation, file, offset, bytes, work, again },
                        slot,
                    );
                }
                Next::Wait => {
                    self.running = Some(running);
                    return Ok(false);
                }
                Next::End => {
                    if running.commits {
                        cx.events().record(Lane::Commit, "commit", None, running.began);
                    }
                    return Ok(running.commits);
                }
            }
        }
    }
}

fn committed(working: &mut WorkingState, cx: &Context, steps: &mut Steps) {
    working.residents.committed();
    oldest_is_durable(cx, steps);
}

fn oldest_is_durable(cx: &Context, steps: &mut Steps) {
    steps.pop();
    cx.shared.lock().durable += 1;
    cx.shared.changed.notify_all();
}
