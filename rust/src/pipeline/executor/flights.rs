//! Records transfers and commits, while events are recorded.

use std::collections::HashMap;

use super::{Executor, Pending, Work};
use crate::io::engine::Operation;
use crate::pipeline::events::Lane;
use crate::units::Group;

/// What is in flight and is recorded.
#[derive(Debug, Default)]
pub(super) struct Flights {
    /// Whether each lane is taken, of reads and of writes.
    lanes: [Vec<bool>; 2],
    /// Lane and start by tag.
    starts: HashMap<u64, (usize, u64)>,
    /// When the commit under way began.
    pub(super) commit: Option<u64>,
}

impl Executor {
    /// Takes note of an operation that starts; nothing on disk, nothing to record.
    pub(super) fn took_off(&mut self, tag: u64, pending: &Pending) {
        let Some(now) = self.shared.events.now() else { return };
        if pending.bytes > 0 && !matches!(pending.work, Work::Sequence) {
            let lanes = &mut self.flights.lanes[direction(pending)];
            let lane = lanes.iter().position(|taken| !taken).unwrap_or(lanes.len());
            lanes.resize(lanes.len().max(lane + 1), false);
            lanes[lane] = true;
            self.flights.starts.insert(tag, (lane, now));
        }
    }

    /// Records an operation that has completed, whatever came of it.
    pub(super) fn landed(&mut self, tag: u64, pending: &Pending) {
        let Some((lane, start)) = self.flights.starts.remove(&tag) else { return };
        self.flights.lanes[direction(pending)][lane] = false;
        let (lane, name) = match pending.work {
            Work::Load { .. } => (Lane::Read(lane), "read weights"),
            Work::Planes { .. } => (Lane::Read(lane), "read planes"),
            Work::Gradient { .. } => (Lane::Read(lane), "read gradient"),
            Work::Write { group: Group::Weight, .. } => (Lane::Write(lane), "write weights"),
            Work::Write { group: Group::Update, .. } => (Lane::Write(lane), "write planes"),
            Work::Keep { .. } => (Lane::Write(lane), "write gradient"),
            Work::Sequence => return,
        };
        self.shared.events.record(lane, name, pending.work.chunk(), Some(start));
    }

    /// Records the commit that began at `flights.commit`.
    pub(super) fn commit_ended(&mut self) {
        let began = self.flights.commit.take();
        self.shared.events.record(Lane::Commit, "commit", None, began);
    }
}

fn direction(pending: &Pending) -> usize {
    usize::from(pending.operation != Operation::Read)
}
