//! Why callers wait, and for how long.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::Shared;
use super::events::{self, Lane};

/// What a caller waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cause {
    /// Weights or planes are being read, or verified.
    #[default]
    Read,
    /// No buffer is free: none for weights, or no chunk slot for the next update.
    Pool,
    /// A write must complete first: of the chunk to be read, or of the commit before an update.
    Write,
    /// Updates are being computed.
    Update,
    /// The caller wants the steps that have ended to be durable.
    Commit,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Read, Self::Pool, Self::Write, Self::Update, Self::Commit];

    /// Its name in a trace.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Pool => "pool",
            Self::Write => "write",
            Self::Update => "update",
            Self::Commit => "commit",
        }
    }
}

/// What a caller waits for if it waits now. The executor knows, and publishes each change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Causes {
    /// For the schedule's next load.
    pub(super) weights: Cause,
    /// For a free gradient buffer.
    pub(super) gradient: Cause,
}

/// Where the time of the pipeline's callers and of its own work went, in nanoseconds.
#[derive(Debug, Default)]
pub struct Timings {
    stalls: [AtomicU64; Cause::ALL.len()],
    /// AdamW and the checksums of what it wrote.
    pub update: AtomicU64,
    /// Verifying what was read.
    pub verify: AtomicU64,
}

impl Timings {
    /// How long callers waited for that cause.
    #[must_use]
    pub fn stalled(&self, cause: Cause) -> u64 {
        self.stalls[cause as usize].load(Ordering::Relaxed)
    }

    pub(super) fn add(counter: &AtomicU64, since: Instant) {
        let nanoseconds = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        counter.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

/// One caller's wait: the time from one `for_cause` to the next, or to the end, counts for the first one's
/// cause.
pub(super) struct Wait<'a> {
    shared: &'a Shared,
    slice: Option<(Cause, u64)>,
}

impl<'a> Wait<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        Self { shared, slice: None }
    }

    /// From now on the caller waits for this.
    pub(super) fn for_cause(&mut self, cause: Cause) {
        if self.slice.is_none_or(|(current, _)| current != cause) {
            self.end_slice();
            self.slice = Some((cause, events::monotonic()));
        }
    }

    fn end_slice(&mut self) {
        let Some((cause, start)) = self.slice.take() else { return };
        let nanoseconds = events::monotonic().saturating_sub(start);
        self.shared.timings.stalls[cause as usize].fetch_add(nanoseconds, Ordering::Relaxed);
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
mod tests {
    use super::*;

    #[test]
    fn each_slice_of_a_wait_is_recorded_for_its_cause() {
        let shared = Shared::default();
        shared.events.begin();
        let mut wait = Wait::new(&shared);
        for cause in [Cause::Read, Cause::Read, Cause::Update] {
            wait.for_cause(cause);
        }
        drop(wait);
        drop(Wait::new(&shared));
        let events = shared.events.take().events;
        let names: Vec<_> = events.iter().map(|event| event.name).collect();
        assert_eq!(names, ["read", "update"]);
        assert!(events[0].start <= events[0].end && events[0].end <= events[1].start);
        let counted = Cause::ALL.map(|cause| shared.timings.stalled(cause) > 0);
        assert_eq!(counted, [true, false, false, true, false]);
    }
}
