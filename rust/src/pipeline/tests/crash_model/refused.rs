//! A gradient that is not finite, while the step before is still being written.

use super::calls::schedule;
use super::causes::{RECORDS, Stand};
use std::sync::Arc;

use super::base::Base;
use crate::error::Error;
use crate::pipeline::command::Command;
use crate::pipeline::{After, CheckedSchedule, ChunkOp, Kind, Residents};
use crate::store::manifest::Durability;
use crate::units::Unit;
use std::time::Duration;

const NO_WAIT: Duration = Duration::ZERO;

/// Takes the weights of a record as soon as they are there: the drive does no more than it must.
fn take(stand: &mut Stand, record: usize) -> crate::memory::slot::Slot {
    loop {
        for _ in 0..4 {
            stand.turn();
            if let Some(weights) = stand.front.take_weights(record, NO_WAIT).expect("no failure") {
                return weights;
            }
        }
        stand.drive.deliver();
    }
}

fn gradient(stand: &Stand, record: usize, value: f32) -> crate::memory::slot::Slot {
    let slot = stand.front.take_gradient(record, NO_WAIT).expect("no failure");
    let mut slot = slot.expect("its own");
    for bytes in slot.chunks_exact_mut(4) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
    slot
}

#[test]
fn the_step_before_is_finished_though_its_writes_are_in_flight() {
    for durability in [Durability::Step, Durability::Scratch] {
        let base = Base::new(&RECORDS, durability, 1);
        let residents = Residents { gradients: vec![0, 1], ..Residents::default() };
        let mut stand = Stand::new(&base, 4, 3, residents);
        stand.schedule = schedule(stand.front.store(), Unit::Record, &[], &[0, 1], (false, true));
        stand.begin(1, true);
        drop([take(&mut stand, 0), take(&mut stand, 1)]);
        for record in [1, 0] {
            let weights = take(&mut stand, record);
            let gradient = gradient(&stand, record, 0.5);
            stand.front.submit(record, Some(weights), gradient).expect("submitted");
        }
        stand.rest();
        stand.front.end(Some(b"step 1".to_vec()), After::Applied(0.5)).expect("ended");
        // The last record's weights go on from the forward to the backward pass.
        let layout = stand.front.store().layout();
        let whole = |record: usize, kind| {
            layout.records()[record].clone().map(move |chunk| ChunkOp { kind, chunk })
        };
        let operations = whole(0, Kind::Apply).chain(whole(1, Kind::Apply));
        let operations = operations.chain(whole(1, Kind::Defer)).collect();
        stand.schedule = Arc::new(CheckedSchedule::new(layout, operations).expect("valid"));
        stand.begin(2, true);
        drop(take(&mut stand, 0));
        let weights = take(&mut stand, 1);
        let gradient = gradient(&stand, 1, f32::INFINITY);
        stand.front.submit(1, Some(weights), gradient).expect("submitted");
        assert_ne!(
            stand.front.store().committed().blob[..],
            b"step 1"[..],
            "its writes are in flight"
        );
        stand.turn();
        stand.turn();
        let error = stand.front.squares(NO_WAIT).expect_err("infinite");
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        let (reply, answer) = crossbeam_channel::bounded(1);
        stand.front.send(Command::Abort { reply }).expect("sent");
        stand.rest();
        answer.try_recv().expect("an answer").expect("the store stands");
        assert_eq!(stand.front.store().committed().blob[..], b"step 1"[..], "{durability:?}");
    }
}
