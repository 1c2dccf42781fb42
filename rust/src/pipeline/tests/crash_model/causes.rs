//! What callers are told that they wait for. The drive moves by hand, so each situation stands still.

use super::calls::schedule;
use super::memories::{adamw, len};
use std::sync::Arc;

use super::base::Base;
use crate::io::engine::Engine;
use crate::io::engine::faulty::Faulty;
use crate::memory::ledger::Ledger;
use crate::memory::pool::{BufferKind, Kind, PoolSizes};
use crate::optimizer::kernel::Kernel;
use crate::pipeline::executor::Executor;
use crate::pipeline::stalls::{Cause, Causes};
use crate::pipeline::{
    After, CheckedSchedule, GradientFiles, Lane, Options, Pipeline, Residents, TensorSettings,
    chunk_slot_bytes,
};
use crate::store::Store;
use crate::store::manifest::Durability;
use crate::units::{StateFormat, Unit};
use std::time::Duration;

pub(super) const RECORDS: [u64; 2] = [4096 + 128; 2];
const CHUNKS: usize = 4;

/// Two records of two chunks each, and nobody but the test who does anything.
pub(super) struct Stand {
    pub(super) drive: Arc<Faulty>,
    pub(super) front: Pipeline,
    pub(super) executor: Executor,
    pub(super) schedule: Arc<CheckedSchedule>,
}

impl Stand {
    pub(super) fn new(
        base: &Base,
        chunk_slots: usize,
        block_buffers: usize,
        residents: Residents,
    ) -> Self {
        let drive = Arc::new(Faulty::over(Arc::new(base.image.copy()), Default::default()));
        let engine = Arc::clone(&drive) as Arc<dyn Engine>;
        let store = Store::open_on(&base.drives, engine, [1; 16], &Ledger::new()).expect("opened");
        let bytes = (len(RECORDS[0]) * 4).next_multiple_of(4096);
        let kind = |bytes, count| Kind { bytes, count };
        let pool = PoolSizes {
            chunk_slots: kind(chunk_slot_bytes(StateFormat::F32, 4096), chunk_slots),
            weights: vec![BufferKind::of_all(bytes, block_buffers)],
            gradients: vec![BufferKind::of_all(bytes, 2)],
            ..PoolSizes::default()
        };
        let tensors = [0, 1].map(|record| TensorSettings {
            record,
            offset: 0,
            elements: RECORDS[record],
            weight_decay: 0.0,
            lr_scale: 1.0,
        });
        let (kernel, tensors) = (Some(Kernel::Scalar), tensors.to_vec());
        let gradient_files = GradientFiles::default();
        let unit = Unit::Record;
        let options =
            Options { pool, threads: 1, kernel, tensors, residents, gradient_files, unit };
        drive.set_by_hand(true);
        let schedule = schedule(&store, Unit::Record, &[], &[0, 1], (true, false));
        let (front, executor) = Pipeline::assemble(Arc::new(store), &options).expect("assembled");
        Self { drive, front, executor, schedule }
    }

    /// The executor turns once, and says what callers wait for.
    pub(super) fn turn(&mut self) -> Causes {
        self.executor.receive();
        self.executor.turn();
        self.front.shared.lock().causes
    }

    /// Everything goes on until nothing moves any more.
    pub(super) fn rest(&mut self) {
        let mut still = 0;
        while still < 10 {
            self.turn();
            still = if self.drive.deliver() { 0 } else { still + 1 };
        }
    }

    pub(super) fn begin(&mut self, step: u64, commits: bool) {
        self.front.begin(Arc::clone(&self.schedule), adamw(step), commits).expect("begun");
    }

    fn take(&mut self, record: usize) -> crate::memory::slot::Slot {
        let taken = self.front.take_weights(record, Duration::ZERO);
        taken.expect("read").expect("it is here")
    }

    fn submit(&mut self, record: usize) {
        let weights = self.take(record);
        let gradient = self.front.take_gradient(record, Duration::ZERO).expect("no failure");
        let mut gradient = gradient.expect("free");
        gradient.fill(0);
        self.front.submit(record, Some(weights), gradient).expect("submitted");
    }

    /// A step up to its first gradient.
    fn forward(&mut self, step: u64, commits: bool) {
        self.begin(step, commits);
        for record in 0..2 {
            self.rest();
            drop(self.take(record));
        }
        self.rest();
    }

    fn make_writable(&mut self) {
        while !self.front.store().is_writable() {
            self.turn();
            assert!(self.drive.deliver());
            self.executor.receive();
        }
    }
}

fn base() -> Base {
    Base::new(&RECORDS, Durability::Step, 1)
}

#[test]
fn a_load_waits_for_a_buffer_and_then_for_its_read() {
    let base = base();
    let mut stand = Stand::new(&base, 4, 1, Residents::default());
    stand.begin(1, false);
    assert_eq!(stand.turn().weights, Cause::Read);
    stand.rest();
    let held = stand.take(0);
    assert_eq!(stand.turn().weights, Cause::Pool, "the only buffer is the caller's");
    drop(held);
    assert_eq!(stand.turn().weights, Cause::Read);
}

#[test]
fn a_load_waits_for_the_write_of_its_chunk() {
    let base = base();
    let mut stand = Stand::new(&base, 4, 3, Residents::default());
    stand.forward(1, false);
    stand.submit(1);
    stand.submit(0);
    stand.front.end(None, After::Stands).expect("ended");
    assert_eq!(stand.turn().gradient, Cause::Write, "the store is not writable yet");
    stand.make_writable();
    stand.begin(2, false);
    // Record 1 is updated first; the next load begins with the first chunk of record 0.
    let expected = [Cause::Update, Cause::Update, Cause::Write, Cause::Write];
    for (computed, weights) in (1..).zip(expected) {
        let causes = stand.turn();
        assert_eq!(causes.weights, weights, "{computed} updates of four");
        assert!(computed == CHUNKS || causes.gradient == Cause::Update);
    }
    for _ in 0..2 * CHUNKS {
        assert!(stand.drive.deliver());
    }
    assert_eq!(stand.turn().weights, Cause::Read);
}

#[test]
fn an_update_waits_for_a_chunk_slot_and_then_for_its_planes() {
    let base = base();
    let mut stand = Stand::new(&base, 1, 3, Residents::default());
    // Planes that were never written are not read: a first step writes them.
    stand.forward(1, false);
    stand.submit(1);
    stand.rest();
    stand.submit(0);
    stand.front.end(None, After::Stands).expect("ended");
    stand.rest();
    stand.forward(2, false);
    stand.submit(1);
    assert_eq!(stand.turn().gradient, Cause::Pool, "the first chunk's writes have the only slot");
    while stand.drive.deliver() {}
    assert_eq!(stand.turn().gradient, Cause::Read, "the second chunk's planes");
}

#[test]
fn an_update_waits_for_the_commit_before_it() {
    let base = base();
    let residents =
        Residents { records: vec![0, 1], chunks: (0..CHUNKS).collect(), gradients: vec![] };
    let mut stand = Stand::new(&base, 1, 2, residents);
    stand.front.record_events();
    stand.forward(1, true);
    stand.submit(1);
    stand.submit(0);
    stand.front.end(Some(b"step 1".to_vec()), After::Stands).expect("ended");
    stand.make_writable();
    for _ in 0..CHUNKS {
        stand.turn();
    }
    for _ in 0..2 * CHUNKS {
        assert!(stand.drive.deliver());
    }
    stand.begin(2, false);
    // All is in RAM: nothing but the commit is in flight.
    for record in [0, 1] {
        stand.turn();
        drop(stand.take(record));
    }
    stand.turn();
    stand.submit(1);
    assert_eq!(stand.turn().gradient, Cause::Write);
    stand.rest();
    assert_eq!(&*stand.front.store().committed().blob, b"step 1");
    let lanes: Vec<_> = stand.front.take_events().events.iter().map(|event| event.lane).collect();
    assert_eq!(lanes.iter().filter(|lane| **lane == Lane::Commit).count(), 1);
    assert_eq!(lanes.iter().filter(|lane| matches!(lane, Lane::Write(_))).count(), 2 * CHUNKS);
    // All writes were in flight at once: each had a lane of its own.
    assert!((0..2 * CHUNKS).all(|lane| lanes.contains(&Lane::Write(lane))), "{lanes:?}");
}
