//! The schedule: the ordered chunk operations of a step, known before it starts. It is built in one
//! place (Python's `schedule.py`); here it is only checked.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::store::layout::Layout;

/// What happens to a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Its weights are read into its record's buffer.
    Load,
    /// As a load, and on the way it is updated with the gradient that the step before deferred: its update
    /// planes are read, too, and both groups are written.
    Apply,
    /// Its update planes are read, it is updated, and both groups are written.
    Update,
    /// Its gradient is deferred until the norm of all is known.
    Defer,
}

/// One operation of the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkOp {
    /// What happens.
    pub kind: Kind,
    /// Index of the chunk in the store.
    pub chunk: usize,
}

/// The operations of one step, in the order in which compute will need them.
#[derive(Clone, Debug)]
pub struct CheckedSchedule {
    operations: Vec<ChunkOp>,
    loads: Vec<usize>,
    updates: usize,
    applied: BTreeSet<usize>,
    updated: BTreeSet<usize>,
    deferred: BTreeSet<usize>,
    layout: Arc<Layout>,
}

impl CheckedSchedule {
    /// Checks the operations against `Store::units`: each concerns a record as one run of all its chunks,
    /// and by chunk each chunk is a record of its own; so it is in all that a schedule says of records. A
    /// record is applied at most once, before anything else happens to it; it is updated at most once, and
    /// its gradient is deferred at most once, behind that. Nothing is loaded after either in the same step.
    ///
    /// # Errors
    /// `Invalid` naming the first operation that breaks a rule.
    pub fn new(layout: &Arc<Layout>, operations: Vec<ChunkOp>) -> Result<Self> {
        let mut loads = Vec::new();
        let (mut applied, mut updated, mut deferred) =
            (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut expected: Option<(Kind, Range<usize>)> = None;
        for (index, operation) in operations.iter().enumerate() {
            let broken = |rule: &str| {
                Err(Error::invalid(format!(
                    "schedule operation {index} ({:?} of chunk {}): {rule}",
                    operation.kind, operation.chunk
                )))
            };
            let Some(chunk) = layout.chunks().get(operation.chunk) else {
                return broken("the store has no such chunk");
            };
            let (kind, mut run) = expected
                .take()
                .filter(|(_, run)| !run.is_empty())
                .unwrap_or_else(|| (operation.kind, layout.records()[chunk.record].clone()));
            if kind != operation.kind || run.next() != Some(operation.chunk) {
                return broken("a record's chunks must follow each other, all of them");
            }
            expected = Some((kind, run));
            if operation.chunk != layout.records()[chunk.record].start {
                continue;
            }
            let record = chunk.record;
            if kind != Kind::Load && !chunk.format().is_trainable() {
                return broken("its record is not trained");
            }
            if deferred.contains(&record) || (kind != Kind::Defer && updated.contains(&record)) {
                return broken(
                    "the record was already updated, or its gradient deferred, in this step",
                );
            }
            match kind {
                Kind::Apply if loads.contains(&record) => {
                    return broken("its record was loaded before in this step");
                }
                Kind::Apply => drop(applied.insert(record)),
                Kind::Update => drop(updated.insert(record)),
                Kind::Defer => drop(deferred.insert(record)),
                Kind::Load => {}
            }
            if matches!(kind, Kind::Load | Kind::Apply) {
                loads.push(record);
            }
        }
        if expected.is_some_and(|(_, run)| !run.is_empty()) {
            return Err(Error::invalid("the schedule ends in the middle of a record"));
        }
        let updates = chunks(layout, &updated);
        let layout = Arc::clone(layout);
        Ok(Self { operations, loads, updates, applied, updated, deferred, layout })
    }

    /// Whether this schedule was checked against that very layout.
    #[must_use]
    pub fn is_for(&self, layout: &Arc<Layout>) -> bool {
        Arc::ptr_eq(&self.layout, layout)
    }

    /// The layout that it was checked against.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// All operations.
    #[must_use]
    pub fn operations(&self) -> &[ChunkOp] {
        &self.operations
    }

    /// The records that are loaded, in order.
    #[must_use]
    pub fn loads(&self) -> &[usize] {
        &self.loads
    }

    /// Number of chunks that are updated with gradients of this step, in this step.
    #[must_use]
    pub fn updates(&self) -> usize {
        self.updates
    }

    /// The records that are updated with what the step before deferred.
    #[must_use]
    pub fn applied(&self) -> &BTreeSet<usize> {
        &self.applied
    }

    /// The records that are updated with gradients of this step, in this step.
    #[must_use]
    pub fn updated(&self) -> &BTreeSet<usize> {
        &self.updated
    }

    /// The records whose gradients are deferred.
    #[must_use]
    pub fn deferred(&self) -> &BTreeSet<usize> {
        &self.deferred
    }

    /// Number of records that get a gradient.
    #[must_use]
    pub fn gradients(&self) -> usize {
        self.updated.union(&self.deferred).count()
    }
}

/// Number of chunks of some records.
pub(super) fn chunks(layout: &Layout, records: &BTreeSet<usize>) -> usize {
    records.iter().map(|record| layout.records()[*record].len()).sum()
}

#[cfg(test)]
mod tests;
