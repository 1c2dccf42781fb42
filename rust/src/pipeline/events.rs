//! What the pipeline did, and when: for a trace. Nothing is recorded unless somebody asks for it.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::time::{ClockId, clock_gettime};

/// Events that are kept until they are taken; those beyond are counted and dropped.
const EVENTS_MAX: usize = 1 << 20;

/// What is shown in one line; of each, events follow one another and never overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Reads overlap: each has the lowest lane that is free when it starts.
    Read(usize),
    /// Writes, likewise.
    Write(usize),
    /// Verifying what was read.
    Verify,
    /// Computing updates.
    Update,
    /// From the last write's completion to the step's durability.
    Commit,
    /// The caller waits.
    Stall,
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(number) => write!(f, "read {number}"),
            Self::Write(number) => write!(f, "write {number}"),
            Self::Verify => f.write_str("verify"),
            Self::Update => f.write_str("update"),
            Self::Commit => f.write_str("commit"),
            Self::Stall => f.write_str("stall"),
        }
    }
}

/// Something that took time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Where it is shown.
    pub lane: Lane,
    /// What it was; of a stall, its cause.
    pub name: &'static str,
    /// The chunk it was about, if one.
    pub chunk: Option<usize>,
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub start: u64,
    /// Likewise; not before `start`. That of a transfer is when the pipeline took note of it.
    pub end: u64,
}

/// What was recorded since it was last taken.
#[derive(Debug, Default)]
pub struct Events {
    /// In the order of their ends.
    pub events: Vec<Event>,
    /// How many more there were, for which there was no room.
    pub dropped: u64,
}

/// Keeps events, once it was told to begin.
#[derive(Debug)]
pub(super) struct Recorder {
    is_on: AtomicBool,
    recorded: Mutex<Events>,
    limit: usize,
}

impl Default for Recorder {
    fn default() -> Self {
        Self::with_limit(EVENTS_MAX)
    }
}

impl Recorder {
    fn with_limit(limit: usize) -> Self {
        Self { is_on: AtomicBool::new(false), recorded: Mutex::default(), limit }
    }

    pub(super) fn begin(&self) {
        self.is_on.store(true, Ordering::Relaxed);
    }

    /// The time, if events are recorded.
    pub(super) fn now(&self) -> Option<u64> {
        self.is_on.load(Ordering::Relaxed).then(monotonic)
    }

    /// Records what began at `start` and ends now; nothing without a start.
    pub(super) fn record(
        &self,
        lane: Lane,
        name: &'static str,
        chunk: Option<usize>,
        start: Option<u64>,
    ) {
        let Some(start) = start else { return };
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        if recorded.events.len() == self.limit {
            recorded.dropped += 1;
        } else {
            recorded.events.push(Event { lane, name, chunk, start, end: monotonic() });
        }
    }

    pub(super) fn take(&self) -> Events {
        std::mem::take(&mut *self.recorded.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC`, the clock of Python's `time.monotonic_ns`.
pub(super) fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let [seconds, nanoseconds] = [now.tv_sec, now.tv_nsec].map(|n| u64::try_from(n).unwrap_or(0));
    seconds * 1_000_000_000 + nanoseconds
}

#[cfg(test)]
mod tests;
