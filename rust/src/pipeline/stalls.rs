//! Why callers wait, and for how long.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

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
    /// The caller wants the finished steps to be durable.
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

    /// A caller has waited so long for that cause.
    pub(super) fn add_stall(&self, cause: Cause, nanoseconds: u64) {
        self.stalls[cause as usize].fetch_add(nanoseconds, Ordering::Relaxed);
    }

    pub(super) fn add(counter: &AtomicU64, since: Instant) {
        let nanoseconds = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        counter.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}
