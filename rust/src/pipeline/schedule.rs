//! The schedule: the ordered chunk operations of a step, known before it starts. It is built in one
//! place (Python's `schedule.py`); here it is only checked.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::layout::Layout;

/// What happens to a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Its weights are read into its record's buffer.
    Load,
    /// Its update planes are read, it is updated, and both groups are written.
    Update,
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
pub struct Schedule {
    operations: Vec<ChunkOp>,
    loads: Vec<usize>,
    updates: usize,
    layout: Arc<Layout>,
}

impl Schedule {
    /// Checks the operations against the layout: a record is loaded as one run of all its chunks, a
    /// chunk is updated at most once, a record is updated whole, and nothing is loaded after its
    /// update in the same step.
    ///
    /// # Errors
    /// `Invalid` naming the first operation that breaks a rule.
    pub fn new(layout: &Arc<Layout>, operations: Vec<ChunkOp>) -> Result<Self> {
        let mut loads = Vec::new();
        let mut updated = vec![false; layout.chunks().len()];
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
            if updated[operation.chunk] {
                return broken("the chunk was already updated in this step");
            }
            if kind == Kind::Update {
                if !chunk.format().is_trainable() {
                    return broken("its record is not trained");
                }
                updated[operation.chunk] = true;
            } else if operation.chunk == layout.records()[chunk.record].start {
                loads.push(chunk.record);
            }
            expected = Some((kind, run));
        }
        if expected.is_some_and(|(_, run)| !run.is_empty()) {
            return Err(Error::invalid("the schedule ends in the middle of a record"));
        }
        let updates = updated.iter().filter(|u| **u).count();
        Ok(Self { operations, loads, updates, layout: Arc::clone(layout) })
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

    /// Number of chunks that are updated.
    #[must_use]
    pub fn updates(&self) -> usize {
        self.updates
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::tests::manifest;
    use crate::units::StateFormat;

    #[test]
    fn broken_orders_are_refused_by_operation() {
        let formats = [(StateFormat::F32, 8192), (StateFormat::Raw16, 4096)];
        let layout = Arc::new(Layout::new(&manifest(4096, &formats)).expect("valid"));
        let op = |kind, chunk| ChunkOp { kind, chunk };
        use Kind::{Load, Update};
        let good = vec![
            op(Load, 0),
            op(Load, 1),
            op(Load, 2),
            op(Load, 0),
            op(Load, 1),
            op(Update, 0),
            op(Update, 1),
        ];
        let schedule = Schedule::new(&layout, good).expect("valid");
        assert_eq!((schedule.loads(), schedule.updates()), (&[0, 1, 0][..], 2));
        let bad = [
            vec![op(Load, 0)],
            vec![op(Load, 1), op(Load, 0)],
            vec![op(Load, 7)],
            vec![op(Update, 2)],
            vec![op(Load, 0), op(Update, 1)],
            vec![op(Update, 0), op(Update, 1), op(Load, 0), op(Load, 1)],
        ];
        for operations in bad {
            assert!(Schedule::new(&layout, operations.clone()).is_err(), "{operations:?}");
        }
    }
}
