//! Gradients that wait for their norm change no bit, wherever they wait and whatever a buffer holds.

use crate::pipeline::{After, Kind, Residents};
use crate::units::{StateFormat, Unit};

use super::support::*;

/// Every second step is clipped.
fn scale(step: u64) -> f32 {
    if step.is_multiple_of(2) { 0.5 } else { 1.0 }
}

/// Five steps, and a flush of what the last one has deferred.
fn run_deferred(setup: Setup, gradients: &[Kind]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let what = format!("{gradients:?}, {:?}, {:?}", setup.unit, setup.residents);
    let setup = Setup { gradients_beside: Some(folder.path().join("gradients")), ..setup };
    setup.create(&path);
    let store = setup.open(&path);
    let pipeline = setup.pipeline(&store);
    let schedule = |first, gradients| schedule_of(&store, setup.unit, first, gradients);
    let first = |waiting| if waiting { Kind::Apply } else { Kind::Load };
    let mut waiting = false;
    for step in 1..=5 {
        let schedule = schedule(first(waiting), gradients);
        pipeline.begin(schedule, adamw(step), true).expect("begun");
        forward(&pipeline).expect("read");
        for record in (0..3).rev() {
            let of = |index| gradient(step, record, index);
            train_record(&pipeline, record, of).expect("trained");
        }
        waiting = !gradients.contains(&Kind::Update) || scale(step) < 1.0;
        let after = if waiting { After::Applied(scale(step)) } else { After::Stands };
        pipeline.end(Some(format!("step {step}").into_bytes()), after).expect("ended");
    }
    if waiting {
        pipeline.begin(schedule(Kind::Apply, &[]), adamw(6), false).expect("begun");
        forward(&pipeline).expect("read");
        pipeline.end(None, After::Stands).expect("ended");
    }
    assert!(pipeline.wait_durable(LONG).expect("durable"));
    assert_eq!(&*store.committed().blob, b"step 5", "{what}");
    assert!(read_all(&store, setup.format) == expected_scaled(5, scale), "{what}");
}

fn run_deferred_everywhere(gradients: &[Kind]) {
    let residents = |records: &[usize], chunks: &[usize], gradients: &[usize]| Residents {
        records: records.to_vec(),
        chunks: chunks.to_vec(),
        gradients: gradients.to_vec(),
    };
    let all: Vec<usize> = (0..12).collect();
    let choices = [
        residents(&[], &[], &[]),
        residents(&[], &[], &[0, 1, 2]),
        residents(&[1], &[0, 4, 11], &[2]),
        residents(&[0, 1, 2], &all, &[1]),
    ];
    for (unit, residents) in
        Unit::ALL.into_iter().flat_map(|unit| choices.each_ref().map(|r| (unit, r)))
    {
        for (slots, format, drives) in [(1, StateFormat::F32, 1), (2, StateFormat::Bf16, 2)] {
            let residents = residents.clone();
            run_deferred(
                Setup { unit, residents, slots, format, drives, ..Setup::default() },
                gradients,
            );
        }
    }
}

#[test]
fn gradients_that_wait_change_no_bit() {
    run_deferred_everywhere(&[Kind::Defer]);
}

#[test]
fn updates_that_are_taken_back_change_no_bit() {
    run_deferred_everywhere(&[Kind::Update, Kind::Defer]);
}

/// Whoever computes elsewhere and only defers a gradient has no use for the weights here.
#[test]
fn a_gradient_is_deferred_without_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let gradients_beside = Some(folder.path().join("gradients"));
    let setup = Setup { unit: Unit::Chunk, slots: 1, gradients_beside, ..Setup::default() };
    setup.create(&path);
    let store = setup.open(&path);
    let pipeline = setup.pipeline(&store);
    let schedule = |first, kinds: &[Kind]| schedule_of(&store, Unit::Chunk, first, kinds);
    pipeline.begin(schedule(Kind::Load, &[Kind::Defer]), adamw(1), true).expect("begun");
    forward(&pipeline).expect("read");
    for record in (0..3).rev() {
        let units = units_of(&pipeline, record);
        for unit in units.clone() {
            drop(pipeline.take_weights(unit, LONG).expect("read").expect("in time"));
        }
        for unit in units {
            let start = len(store.layout().chunks()[unit].start);
            let mut buffer = pipeline.take_gradient(unit, LONG).expect("free").expect("in time");
            for (index, bytes) in buffer.chunks_mut(4).enumerate() {
                bytes.copy_from_slice(&gradient(1, record, start + index).to_le_bytes());
            }
            pipeline.submit(unit, None, buffer).expect("submitted");
        }
    }
    pipeline.end(Some(b"step 1".to_vec()), After::Applied(1.0)).expect("ended");
    pipeline.begin(schedule(Kind::Apply, &[]), adamw(2), false).expect("begun");
    forward(&pipeline).expect("read");
    pipeline.end(None, After::Stands).expect("ended");
    assert!(pipeline.wait_durable(LONG).expect("durable"));
    assert!(read_all(&store, setup.format) == expected(1));
}
