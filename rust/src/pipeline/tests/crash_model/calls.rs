//! What the trainer calls, step by step.

use std::sync::Arc;

use crate::pipeline::{After, CheckedSchedule, ChunkOp, Kind};
use crate::store::Store;
use crate::units::Unit;

/// One call of the trainer.
#[derive(Clone, Debug)]
pub(super) enum Call {
    Begin {
        schedule: Arc<CheckedSchedule>,
        commits: bool,
    },
    /// Take the weights of a unit and drop them: the forward pass.
    Pass(usize),
    /// Take them for the backward pass.
    Fetch(usize),
    /// Submit the gradient of a unit, with its weights if the step updates with them.
    Train {
        unit: usize,
        updates: bool,
    },
    /// Say that a unit got no gradient, and give its weights back.
    Skip {
        unit: usize,
        updates: bool,
    },
    /// Wait for the sum of the squares of all gradients.
    Norm,
    End {
        commit: bool,
        after: After,
    },
    WaitDurable,
}

/// Forward over all records, with the updates that wait, then backward over those that are trained, which
/// updates them, defers their gradients, or both.
pub(super) fn schedule(
    store: &Store,
    unit: Unit,
    applied: &[usize],
    trained: &[usize],
    (updates, defers): (bool, bool),
) -> Arc<CheckedSchedule> {
    let chunks = |record: usize, kind| {
        store.layout().records()[record].clone().map(move |chunk| ChunkOp { kind, chunk })
    };
    let mut operations = Vec::new();
    for record in 0..store.layout().records().len() {
        let kind = if applied.contains(&record) { Kind::Apply } else { Kind::Load };
        operations.extend(chunks(record, kind));
    }
    for &record in trained.iter().rev() {
        operations.extend(chunks(record, Kind::Load));
        if updates {
            operations.extend(chunks(record, Kind::Update));
        }
        if defers {
            operations.extend(chunks(record, Kind::Defer));
        }
    }
    Arc::new(CheckedSchedule::new(store.units(unit), operations).expect("valid"))
}
