//! A store that is trained through the pipeline must end with the bits of the same training in
//! memory, whatever the chunk size, pool, engine and number of threads.

use std::sync::Arc;

use crate::error::Error;
use crate::io::engine::choice::Choice;
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::pipeline::After;
use crate::store::BLOB_BYTES_MAX;
use crate::units::{Group, PAGE_BYTES, StateFormat, Unit};

use super::support::*;

#[test]
fn paged_training_has_the_bits_of_in_memory_training() {
    for format in [StateFormat::F32, StateFormat::Bf16] {
        run(Setup { format, ..Setup::default() });
    }
}

#[test]
fn chunk_size_pool_engine_and_threads_change_no_bit() {
    for chunk_parameters in [8192, 1 << 16] {
        run(Setup { chunk_parameters, ..Setup::default() });
    }
    run(Setup { slots: 1, ..Setup::default() });
    run(Setup { engine: Choice::Threads, ..Setup::default() });
    run(Setup { drives: 2, ..Setup::default() });
    run(Setup {
        drives: 3,
        engine: Choice::Threads,
        format: StateFormat::Bf16,
        ..Setup::default()
    });
    run(Setup { threads: 1, ..Setup::default() });
}

#[test]
fn an_aborted_step_leaves_the_last_commit_and_the_handle_usable() {
    let (_folder, setup, store, schedule, pipeline) = imported();
    train_step(&pipeline, &schedule, 1, true).expect("a step");
    // The second step is written in part, but never finished.
    pipeline.begin(Arc::clone(&schedule), adamw(9), false).expect("begun");
    forward(&pipeline).expect("read");
    let weights = pipeline.take_weights(2, LONG).expect("read").expect("in time");
    let gradient = pipeline.take_gradient(2, LONG).expect("free").expect("in time");
    pipeline.submit(2, Some(weights), gradient).expect("submitted");
    pipeline.abort().expect("aborted");
    assert_eq!(&*store.committed().blob, b"step 1");
    for step in 2..=3 {
        train_step(&pipeline, &schedule, step, true).expect("a step");
    }
    assert!(pipeline.wait_durable(LONG).expect("durable"));
    assert!(read_all(&store, setup.format) == expected(3));
}

#[test]
fn steps_between_commits_are_written_in_place_and_lost_together() {
    let (folder, setup, store, schedule, pipeline) = imported();
    for step in 1..=5 {
        train_step(&pipeline, &schedule, step, step % 2 == 0).expect("a step");
    }
    assert!(pipeline.wait_durable(LONG).expect("durable"));
    drop(pipeline);
    drop(store);
    let store = setup.open(&folder.path().join("store"));
    assert_eq!(&*store.committed().blob, b"step 4");
    assert!(read_all(&store, setup.format) == expected(4));
}

#[test]
fn a_flipped_byte_stops_the_step_and_names_its_tensor() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let setup = Setup::default();
    setup.create(&path);
    let store = setup.open(&path);
    let plan = store.plan_read(&store.committed().table, 4, Group::Weight);
    let mut byte = [0; 1];
    store.drives().main().read_at(&mut byte, 0).ok();
    let buffered = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&setup.files(&path)[0])
        .expect("open");
    std::os::unix::fs::FileExt::write_at(&buffered, &[0xab; 3], plan.offset + 5).expect("spoiled");
    buffered.sync_all().expect("flushed");
    let pipeline = setup.pipeline(&store);
    let error = train_step(&pipeline, &schedule(&store, Unit::Record), 1, true).expect_err("found");
    assert!(
        matches!(&error, Error::Corrupt { what, .. } if what.contains("layer.1.weight")),
        "{error}"
    );
    assert!(pipeline.wait_durable(LONG).is_err(), "the failure stays");
    drop(pipeline);
    let report = store.verify(&mut |_, _| true).expect("read");
    assert_eq!(report.damaged.len(), 1);
    assert_eq!(report.damaged[0].chunk, 4);
}

#[test]
fn asking_for_weights_out_of_order_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let setup = Setup::default();
    setup.create(&path);
    let store = setup.open(&path);
    let pipeline = setup.pipeline(&store);
    pipeline.begin(schedule(&store, Unit::Record), adamw(1), false).expect("begun");
    let error = pipeline.take_weights(1, LONG).expect_err("record 0 comes first");
    assert!(error.to_string().contains("next load is record 0"), "{error}");
}

#[test]
fn a_step_that_has_ended_survives_abort_and_stop() {
    let (_folder, setup, store, schedule, pipeline) = imported();
    train_step(&pipeline, &schedule, 1, true).expect("a step");
    pipeline.begin(Arc::clone(&schedule), adamw(2), false).expect("begun");
    // The updates of step 1 may still be under way: they are finished first.
    pipeline.abort().expect("aborted");
    assert_eq!(&*store.committed().blob, b"step 1");
    train_step(&pipeline, &schedule, 2, true).expect("a step");
    drop(pipeline);
    assert_eq!(&*store.committed().blob, b"step 2");
    assert!(read_all(&store, setup.format) == expected(2));
}

#[test]
fn what_contradicts_the_step_is_refused() {
    let (_folder, _, _, schedule, pipeline) = imported();
    assert!(pipeline.end(None, After::Stands).is_err(), "no step is pending");
    pipeline.begin(Arc::clone(&schedule), adamw(1), false).expect("begun");
    assert!(pipeline.begin(Arc::clone(&schedule), adamw(1), false).is_err(), "not finished");
    let small = || Slot::standalone(PAGE_BYTES, &Ledger::new(), "test").expect("memory");
    assert!(pipeline.submit(0, Some(small()), small()).is_err(), "too small");
    assert!(pipeline.submit(9, Some(small()), small()).is_err(), "no such record");
    assert!(
        pipeline.end(Some(vec![0; BLOB_BYTES_MAX + 1]), After::Stands).is_err(),
        "a blob too large"
    );
    pipeline.end(None, After::Stands).expect("sent");
    let error = pipeline.wait_durable(LONG).expect_err("gradients are missing");
    assert!(error.to_string().contains("without the gradient of record 0"), "{error}");
}
