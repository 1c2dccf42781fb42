//! Units that are chunks: what is computed elsewhere, with a few chunks of memory here. That training
//! by chunk changes no bit is in the tests of training: `run` does both.

use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::memory::ledger::Ledger;
use crate::memory::pool::{self, PoolSizes};
use crate::memory::slot::Slot;
use crate::optimizer::kernel::Kernel;
use crate::optimizer::norm;
use crate::pipeline::{Options, Pipeline, Residents};
use crate::store::layout::tests::manifest;
use crate::store::{OpenOptions, Store};
use crate::units::Unit;

use super::support::*;

fn of_chunks() -> Setup {
    Setup { unit: Unit::Chunk, slots: 1, ..Setup::default() }
}

fn open(folder: &tempfile::TempDir, setup: &Setup) -> Arc<Store> {
    let path = folder.path().join("store");
    setup.create(&path);
    setup.open(&path)
}

/// Record 2 has the chunks 9, 10 and 11.
#[test]
fn an_abort_amid_the_chunks_of_a_record_goes_back_to_the_last_commit() {
    let choices = [
        Residents::default(),
        Residents { records: vec![1, 2], chunks: vec![0, 9, 10], gradients: vec![] },
    ];
    for (residents, submitted) in choices.iter().flat_map(|r| (1..3).map(move |n| (r, n))) {
        let folder = tempfile::tempdir().expect("a folder");
        let setup = Setup { residents: residents.clone(), ..of_chunks() };
        let store = open(&folder, &setup);
        let (schedule, pipeline) = (schedule(&store, Unit::Chunk), setup.pipeline(&store));
        train_step(&pipeline, &schedule, 1, true).expect("a step");
        pipeline.begin(Arc::clone(&schedule), adamw(9), false).expect("begun");
        forward(&pipeline).expect("read");
        let away = fetch_record(&pipeline, 2).expect("read");
        for (unit, weights) in (9..).zip(away).take(submitted) {
            submit_unit(&pipeline, unit, weights, |_| 0.5).expect("submitted");
        }
        // One of them has come back for the next chunk, which is not submitted.
        let held = pipeline.take_gradient(9 + submitted, LONG).expect("free").expect("in time");
        pipeline.abort().expect("aborted");
        drop(held);
        assert_eq!(&*store.committed().blob, b"step 1");
        for step in 2..=3 {
            train_step(&pipeline, &schedule, step, true).expect("a step");
        }
        assert!(pipeline.wait_durable(LONG).expect("durable"));
        assert!(read_all(&store, setup.format) == expected(3), "{residents:?}, {submitted}");
    }
}

/// Tensors that cross the borders of chunks, with padding between them that is not finite.
#[test]
fn the_norm_has_the_same_bits_by_chunk() {
    let tensors = |record: usize| {
        let end = len(RECORDS[record]);
        vec![0..100, 128..4096 + 5, 4096 + 128..2 * 4096 - 1, 2 * 4096..end]
    };
    let value = |record: usize, index: usize| {
        let is_padding = !tensors(record).iter().any(|tensor| tensor.contains(&index));
        if is_padding { f32::NAN } else { gradient(3, record, index) / 3.0 }
    };
    let whole: f64 = (0..3)
        .map(|record| {
            let values: Vec<_> = (0..len(RECORDS[record])).map(|i| value(record, i)).collect();
            norm::squares_of_runs(Kernel::Scalar, &tensors(record), &values).iter().sum::<f64>()
        })
        .sum();
    for (chunk_parameters, unit) in [(4096, Unit::Record), (4096, Unit::Chunk), (8192, Unit::Chunk)]
    {
        let folder = tempfile::tempdir().expect("a folder");
        let setup = Setup { chunk_parameters, unit, ..of_chunks() };
        let records = RECORDS.map(|parameters| (setup.format, parameters));
        let mut manifest = manifest(chunk_parameters, &records);
        let places = (0..3).flat_map(|r| tensors(r).into_iter().map(move |place| (r, place)));
        let tensor = |(index, (record, place)): (usize, (usize, std::ops::Range<usize>))| {
            let shape = vec![place.len() as u64];
            let name = format!("tensor.{index}");
            crate::store::layout::Tensor { name, record, offset: place.start as u64, shape }
        };
        manifest.tensors = places.enumerate().map(tensor).collect();
        let files = setup.files(&folder.path().join("store"));
        let options = OpenOptions::default();
        let store = Store::create_empty(&files, manifest, options, &Ledger::new());
        let store = Arc::new(store.expect("created"));
        let pipeline = setup.pipeline(&store);
        pipeline.begin(schedule(&store, unit), adamw(1), false).expect("begun");
        forward(&pipeline).expect("read");
        for record in (0..3).rev() {
            assert_eq!(pipeline.squares(Duration::ZERO).expect("finite"), None, "one is missing");
            train_record(&pipeline, record, |index| value(record, index)).expect("trained");
        }
        let squares = pipeline.squares(LONG).expect("finite").expect("in time");
        assert_eq!(squares.to_bits(), whole.to_bits(), "{chunk_parameters}, {unit:?}");
    }
}

#[test]
fn a_chunk_whose_gradient_is_not_finite_is_refused_by_the_name_of_its_record() {
    let folder = tempfile::tempdir().expect("a folder");
    let setup = of_chunks();
    let store = open(&folder, &setup);
    let (schedule, pipeline) = (schedule(&store, Unit::Chunk), setup.pipeline(&store));
    pipeline.begin(Arc::clone(&schedule), adamw(1), true).expect("begun");
    forward(&pipeline).expect("read");
    let infinite = |index| if index == 2 * 4096 { f32::INFINITY } else { 0.1 };
    let trained = train_record(&pipeline, 2, infinite);
    let error = trained.and_then(|()| pipeline.squares(LONG)).expect_err("infinite");
    assert!(matches!(&error, Error::NotFinite { record } if record == "layer.2"), "{error}");
    pipeline.abort().expect("aborted");
    train_step(&pipeline, &schedule, 1, true).expect("a step");
    assert!(pipeline.wait_durable(LONG).expect("durable"));
    assert!(read_all(&store, setup.format) == expected(1));
}

#[test]
fn what_is_for_another_granularity_is_refused() {
    let (_folder, _, store, by_record, pipeline) = imported();
    let refused = |result: Result<Option<Slot>>| result.expect_err("refused").to_string();
    let error = refused(pipeline.take_outgoing(0, LONG));
    assert!(error.contains("whole records"), "{error}");
    let begun = pipeline.begin(schedule(&store, Unit::Chunk), adamw(1), false);
    assert!(begun.expect_err("by chunk").to_string().contains("one is by chunk"));
    drop(pipeline);
    let residents = Residents { records: vec![0], ..Residents::default() };
    let setup = Setup { residents, ..of_chunks() };
    let pipeline = setup.pipeline(&store);
    assert!(pipeline.begin(by_record, adamw(1), false).is_err());
    assert!(refused(pipeline.take_outgoing(0, LONG)).contains("chunk 0 stay in RAM"));
    assert!(pipeline.take_outgoing(12, LONG).is_err(), "no such chunk");
    pipeline.begin(schedule(&store, Unit::Chunk), adamw(1), false).expect("begun");
    let error = refused(pipeline.take_weights(1, LONG));
    assert!(error.contains("next load is chunk 0"), "{error}");
    let gradient = || Slot::standalone(4 * 4096, &Ledger::new(), "test").expect("memory");
    let submit = |unit, weights| {
        pipeline.submit(unit, weights, gradient()).expect_err("refused").to_string()
    };
    assert!(submit(5, None).contains("submitted with the weights"));
    assert!(submit(0, Some(gradient())).contains("stay in RAM"));
}

#[test]
fn a_pool_without_a_buffer_for_what_comes_back_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let setup = of_chunks();
    let store = open(&folder, &setup);
    let mut options = setup.options(&store);
    let outgoing = std::mem::take(&mut options.pool.outgoing);
    let start = |options: &Options| Pipeline::start(Arc::clone(&store), options).map(drop);
    let error = start(&options).expect_err("none").to_string();
    assert!(error.contains("chunk 0 of layer.0 come back"), "{error}");
    // They are for nothing else.
    options.pool.outgoing = outgoing;
    let weights = std::mem::take(&mut options.pool.weights);
    assert!(
        start(&options).expect_err("none").to_string().contains("no buffer for the 16384 bytes")
    );
    // Where all weights stay, nothing comes back; what only reads updates nothing.
    let everything = Residents { records: (0..12).collect(), ..Residents::default() };
    let pool = PoolSizes { outgoing: pool::Kind::default(), ..options.pool.clone() };
    start(&Options { pool, residents: everything, ..options.clone() }).expect("all stay");
    let pool = PoolSizes { weights, ..PoolSizes::default() };
    start(&Options { pool, tensors: vec![], ..options }).expect("reads only");
}
