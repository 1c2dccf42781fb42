//! What stays in RAM changes no bit, and is written for a commit alone.

use std::sync::Arc;

use crate::pipeline::{CheckedSchedule, Kind, Residents};
use crate::units::{Group, StateFormat, Unit};

use super::support::*;

/// The chunks are 3 + 6 + 3: a block, a larger record, a block with a short last chunk.
#[test]
fn what_stays_in_ram_changes_no_bit() {
    let residents = |records: &[usize], chunks: &[usize]| Residents {
        gradients: vec![],
        records: records.to_vec(),
        chunks: chunks.to_vec(),
    };
    let all: Vec<usize> = (0..12).collect();
    let choices = [
        residents(&[2], &[]),
        residents(&[], &[0, 5, 11]),
        residents(&[1], &[2, 3, 4]),
        residents(&[0, 1, 2], &all),
    ];
    for residents in choices {
        for (format, commit_every) in [(StateFormat::F32, 1), (StateFormat::Bf16, 3)] {
            let residents = residents.clone();
            run(Setup { format, commit_every, residents, slots: 1, ..Setup::default() });
        }
    }
}

/// What stays is read once, written for a commit alone, and lost with the steps since.
#[test]
fn what_stays_is_read_once_and_written_for_a_commit() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let residents =
        Residents { records: vec![0, 1, 2], chunks: (0..12).collect(), gradients: vec![] };
    let setup = Setup { residents, ..Setup::default() };
    setup.create(&path);
    let store = setup.open(&path);
    let (schedule, pipeline) = (schedule(&store, Unit::Record), setup.pipeline(&store));
    let moved = || store.engine().0.counters().totals();
    let durable = || assert!(pipeline.wait_durable(LONG).expect("durable"));
    train_step(&pipeline, &schedule, 1, false).expect("a step");
    durable();
    let before = moved();
    train_step(&pipeline, &schedule, 2, false).expect("a step");
    durable();
    assert_eq!(moved(), before, "a step without a commit moves nothing");
    train_step(&pipeline, &schedule, 3, true).expect("a step");
    durable();
    let (read, written) = (moved().0 - before.0, moved().1 - before.1);
    let state: usize =
        store.layout().chunks().iter().flat_map(|c| Group::ALL.map(|g| c.extent_bytes(g))).sum();
    assert_eq!(read, 0);
    assert!(written >= state as u64 && written < 2 * state as u64, "{written} for {state}");
    // Two steps in RAM alone, and a third that is not finished: back to the third.
    for step in 4..=5 {
        train_step(&pipeline, &schedule, step, false).expect("a step");
    }
    pipeline.begin(Arc::clone(&schedule), adamw(9), false).expect("begun");
    pipeline.abort().expect("aborted");
    assert_eq!(&*store.committed().blob, b"step 3");
    for step in 4..=5 {
        train_step(&pipeline, &schedule, step, step == 5).expect("a step");
    }
    durable();
    assert!(read_all(&store, setup.format) == expected(5));
}

#[test]
fn a_commit_without_what_changed_in_ram_alone_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let residents = Residents { records: vec![0], chunks: vec![], gradients: vec![] };
    let setup = Setup { residents, ..Setup::default() };
    setup.create(&path);
    let store = setup.open(&path);
    let (whole, pipeline) = (schedule(&store, Unit::Record), setup.pipeline(&store));
    train_step(&pipeline, &whole, 1, false).expect("a step");
    let loads = whole.operations().iter().filter(|op| op.kind == Kind::Load).copied().take(3);
    let reading = Arc::new(CheckedSchedule::new(store.layout(), loads.collect()).expect("valid"));
    pipeline.begin(reading, adamw(2), true).expect("sent");
    let error = pipeline.wait_durable(LONG).and_then(|_| pipeline.take_weights(0, LONG));
    let error = error.expect_err("chunk 0 is left out");
    assert!(error.to_string().contains("does not update chunk 0"), "{error}");
}
