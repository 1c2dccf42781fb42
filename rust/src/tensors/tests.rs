//! Tensors over a faulty drive in RAM: what is committed is whole, whatever happens and when.

use std::time::Duration;

use super::*;
use crate::io::drives::Drives;
use crate::io::engine::faulty::{Fault, Faulty, Plan};
use crate::io::engine::memory::Memory;
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::store::StoreCreator;
use crate::store::layout::tests::of_tensors_manifest;
use crate::store::layout::{Durability, Manifest};
use crate::units::StateFormat;

const CHUNK: usize = 4096;
/// Three chunks and a short one, and less than a page.
const TENSORS: [u64; 3] = [3 * 4096 + 128, 256, 4096];
const MEMORY: usize = 2 * HUGE_PAGE_BYTES;
const NOW: Duration = Duration::ZERO;

/// A drive with a store on it.
struct Machine {
    _folder: tempfile::TempDir,
    drives: Drives,
    drive: Arc<Faulty>,
    boot: u8,
}

/// A process with that store open; nothing happens in it but in `go_on`.
struct Process {
    front: RecordTensors,
    mover: Mover,
    drive: Arc<Faulty>,
}

impl Machine {
    fn new(seed: u64, durability: Durability) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let paths = ["a", "b"].map(|drive| folder.path().join(drive));
        let drive = Arc::new(Memory::default());
        let over = Arc::clone(&drive) as Arc<dyn crate::io::engine::Engine>;
        let shape = TENSORS.map(|parameters| (StateFormat::Raw8, parameters));
        let manifest = Manifest { durability, ..of_tensors_manifest(&shape) };
        let creator =
            StoreCreator::over(over, None, &paths, manifest, &Ledger::new()).expect("created");
        creator.finish(&[]).expect("finished");
        let drives = Drives::open_waiting(&paths, &mut |_, _| Ok(())).expect("opened");
        let drive = Arc::new(Faulty::over(drive, Plan { seed, ..Plan::default() }));
        Self { _folder: folder, drives, drive, boot: 1 }
    }

    fn open(&self) -> Result<Process> {
        self.drive.set_by_hand(false);
        let engine = Arc::clone(&self.drive) as Arc<dyn crate::io::engine::Engine>;
        let store = Store::open_on(&self.drives, engine, [self.boot; 16], &Ledger::new())?;
        let (front, mover) = RecordTensors::assemble(Arc::new(store), MEMORY)?;
        self.drive.set_by_hand(true);
        Ok(Process { front, mover, drive: Arc::clone(&self.drive) })
    }

    fn crash(&mut self, process: Process, is_power_cut: bool) {
        if is_power_cut {
            self.drive.cut_power();
            self.boot += 1;
        } else {
            self.drive.kill_owner();
        }
        drop(process);
        while self.drive.deliver() {}
        self.drive.power_on();
    }
}

impl Process {
    fn put(&self, record: usize, value: u8) -> Transfer {
        let memory = self.front.allocate(bytes_of(record)).expect("open").expect("free");
        let mut slot = memory.take().expect("at rest");
        slot.fill(value);
        memory.put_back(slot);
        self.front.put(record, &memory).expect("sent")
    }

    /// Mover and drive go on until the ticket has ended, or the drive has done `operations`.
    fn go_on(&mut self, ticket: &Transfer, operations: &mut u64) -> Option<Result> {
        for _ in 0..10_000 {
            self.mover.receive();
            self.mover.turn();
            if let Some(outcome) = ticket.wait(NOW) {
                return Some(outcome);
            }
            if *operations == 0 {
                return None;
            }
            *operations -= u64::from(self.drive.deliver());
        }
        panic!("stuck");
    }

    fn finish(&mut self, ticket: &Transfer) -> Result {
        self.go_on(ticket, &mut 10_000).expect("enough operations")
    }

    /// The bytes of a tensor, which must all be the same.
    fn value(&mut self, record: usize) -> Result<u8> {
        let memory = self.front.allocate(bytes_of(record))?.expect("free");
        let ticket = self.front.fill(record, &memory)?;
        self.finish(&ticket)?;
        let slot: Slot = memory.take().expect("at rest");
        let bytes = &slot[..bytes_of(record)];
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a mixture in tensor {record}");
        let value = bytes[0];
        memory.put_back(slot);
        Ok(value)
    }

    fn values(&mut self) -> [u8; 3] {
        [0, 1, 2].map(|record| self.value(record).expect("read"))
    }
}

fn bytes_of(record: usize) -> usize {
    crate::units::to_usize(TENSORS[record])
}

/// Two sets are put and committed, and the machine crashes after `operations` of the drive. Returns
/// the sets that a commit acknowledged, and whether it came to the end.
fn run(machine: &mut Machine, mut operations: u64, is_power_cut: bool) -> (u8, bool) {
    let mut process = machine.open().expect("opens");
    // All at once: what is put behind a commit must wait until that is durable.
    let commits = [1, 2].map(|set| {
        // The second put of a tensor within a commit goes to the same place.
        process.put(0, 9);
        (0..3).for_each(|record| drop(process.put(record, set)));
        process.front.commit().expect("sent")
    });
    let mut acknowledged = 0;
    for ticket in commits {
        match process.go_on(&ticket, &mut operations) {
            Some(outcome) => outcome.expect("committed"),
            None => break,
        }
        acknowledged += 1;
    }
    let ended = acknowledged == 2;
    machine.crash(process, is_power_cut);
    (acknowledged, ended)
}

#[test]
fn a_commit_is_all_or_nothing_wherever_the_machine_stops() {
    for is_power_cut in [false, true] {
        for seed in 0..8 {
            for operations in 0..200 {
                let mut machine = Machine::new(seed, Durability::Step);
                let (acknowledged, ended) = run(&mut machine, operations, is_power_cut);
                let mut process = machine.open().expect("opens");
                let values = process.values();
                let place = format!("seed {seed}, operation {operations}, cut {is_power_cut}");
                assert_eq!(values, [values[0]; 3], "{place}: a mixture of sets");
                let possible = acknowledged..=acknowledged + 1;
                assert!(possible.contains(&values[0]) && values[0] <= 2, "{place}: {values:?}");
                if ended {
                    assert!(operations > 20, "the run was too short to show anything");
                    break;
                }
            }
        }
    }
}

#[test]
fn what_was_not_committed_is_gone_after_a_close_and_stays_in_a_scratch_store() {
    for (durability, expected) in [(Durability::Step, 1), (Durability::Scratch, 2)] {
        let machine = Machine::new(1, durability);
        let mut process = machine.open().expect("opens");
        let first = process.put(0, 1);
        process.finish(&first).expect("written");
        let commit = process.front.commit().expect("sent");
        process.finish(&commit).expect("committed");
        let second = process.put(0, 2);
        process.finish(&second).expect("written");
        assert_eq!(process.value(0).expect("read"), 2, "a read sees the put before it");
        let Process { front, mut mover, .. } = process;
        machine.drive.set_by_hand(false);
        let store = Arc::clone(front.store());
        drop(front);
        mover.receive();
        assert!(!mover.turn(), "told to stop");
        store.mark_clean().expect("clean");
        drop((store, mover));
        assert_eq!(machine.open().expect("opens").value(0).expect("read"), expected);
    }
}

#[test]
fn a_put_that_failed_is_neither_read_nor_committed_until_it_is_repeated() {
    let machine = Machine::new(1, Durability::Step);
    let mut process = machine.open().expect("opens");
    let first = process.put(0, 1);
    process.finish(&first).expect("written");
    for attempts in 1..=2 {
        (0..attempts).for_each(|ahead| machine.drive.plan(ahead, Fault::Fail(5)));
        let ticket = process.put(1, 2);
        assert_eq!(process.finish(&ticket).is_ok(), attempts == 1, "the second attempt counts");
    }
    let refused = process.value(1).expect_err("torn").to_string();
    assert!(refused.contains("put of tensor layer.1 was not finished"), "{refused}");
    let commit = process.front.commit().expect("sent");
    let refused = process.finish(&commit).expect_err("torn").to_string();
    assert!(refused.contains("layer.1") && refused.contains("write of"), "{refused}");
    assert_eq!(process.value(0).expect("read"), 1);
    let again = process.put(1, 3);
    process.finish(&again).expect("written");
    let commit = process.front.commit().expect("sent");
    process.finish(&commit).expect("committed");
    assert_eq!(process.front.store().committed().generation, 2);
    assert_eq!(process.values(), [1, 3, 0]);
}

#[test]
fn an_interrupted_copy_is_not_taken_for_whole() {
    let machine = Machine::new(1, Durability::Step);
    let mut process = machine.open().expect("opens");
    let chunks = process.front.chunks(0).expect("there");
    let (put, _ticket) = process.front.start_copied(&chunks);
    let mut slot = process.front.staging().try_take().expect("free");
    slot.fill(1);
    process.front.put_chunk(&put, chunks.start, slot).expect("sent");
    process.front.give_up(chunks.start + 1..chunks.end).expect("sent");
    assert!(process.value(0).is_err());
    assert_eq!(process.front.staging().free_count(), process.front.staging().count());
}

#[test]
fn bytes_in_flight_are_bounded_and_still_more_than_one_chunk() {
    let machine = Machine::new(1, Durability::Step);
    let mut process = machine.open().expect("opens");
    let first = process.put(1, 1);
    process.finish(&first).expect("written");
    process.mover.in_flight_bytes_max = 2 * CHUNK;
    let _ticket = process.put(0, 1);
    process.mover.receive();
    process.mover.turn();
    assert_eq!(machine.drive.waiting(), 2);
}

#[test]
fn memory_in_a_transfer_is_refused_to_another_and_too_little_is_refused_with_the_least() {
    let machine = Machine::new(1, Durability::Step);
    let process = machine.open().expect("opens");
    let memory = process.front.allocate(bytes_of(0)).expect("open").expect("free");
    let _ticket = process.front.put(0, &memory).expect("sent");
    assert!(matches!(process.front.fill(0, &memory), Err(Error::BufferInUse { .. })));
    let store = Arc::clone(process.front.store());
    let refused = RecordTensors::start(store, MEMORY - 1).expect_err("too little").to_string();
    assert!(refused.contains("4194303 bytes") && refused.contains("4194304 at least"), "{refused}");
}

#[test]
fn the_thread_ends_with_the_front_and_what_was_asked_for_is_done() {
    let machine = Machine::new(1, Durability::Step);
    machine.drive.set_by_hand(false);
    let engine = Arc::clone(&machine.drive) as Arc<dyn crate::io::engine::Engine>;
    let store = Store::open_on(&machine.drives, engine, [1; 16], &Ledger::new()).expect("opens");
    let front = RecordTensors::start(Arc::new(store), MEMORY).expect("started");
    let memory = front.allocate(bytes_of(0)).expect("open").expect("free");
    let (put, commit) = (front.put(0, &memory).expect("sent"), front.commit().expect("sent"));
    drop(front);
    put.wait(NOW).expect("has ended").expect("written");
    commit.wait(NOW).expect("has ended").expect("committed");
    assert!(memory.address().is_some(), "the memory came back");
}

#[test]
fn the_front_of_a_tensor_moves_alone_in_whole_chunks() {
    let machine = Machine::new(1, Durability::Scratch);
    machine.drive.set_by_hand(false);
    let engine = Arc::clone(&machine.drive) as Arc<dyn crate::io::engine::Engine>;
    let ledger = Ledger::new();
    let store = Arc::new(Store::open_on(&machine.drives, engine, [1; 16], &ledger).expect("opens"));
    let start =
        |bytes| RecordTensors::start_without_copies(Arc::clone(&store), bytes, "activations");
    assert!(start(CHUNK - 1).is_err());
    let front = start(16 * CHUNK + 1).expect("started");
    assert_eq!(ledger.balances()["activations"].current, 16 * CHUNK as u64);
    let filled = |bytes: usize, value: u8| {
        let memory = front.allocate(bytes).expect("open").expect("free");
        let mut slot = memory.take().expect("at rest");
        slot.fill(value);
        memory.put_back(slot);
        memory
    };
    let wait = |ticket: Result<Transfer>| {
        ticket.expect("sent").wait(Duration::from_secs(60)).expect("ended")
    };
    wait(front.put(0, &filled(bytes_of(0), 1))).expect("written");
    wait(front.put(0, &filled(2 * CHUNK, 2))).expect("written");
    for (bytes, fronts) in
        [(2 * CHUNK, 2 * CHUNK), (3 * CHUNK, 2 * CHUNK), (bytes_of(0), 2 * CHUNK)]
    {
        let memory = filled(bytes, 9);
        wait(front.fill(0, &memory)).expect("read");
        let slot = memory.take().expect("at rest");
        assert!(slot[..fronts].iter().all(|byte| *byte == 2));
        assert!(slot[fronts..bytes].iter().all(|byte| *byte == 1));
        memory.put_back(slot);
    }
    // Not the end of a chunk; the padding of the last one; more than there is.
    for bytes in [CHUNK + 1, 4 * CHUNK, 5 * CHUNK] {
        let refused = front.put(0, &filled(bytes, 3)).expect_err("no front").to_string();
        assert!(refused.contains("its first whole chunks"), "{refused}");
    }
}

impl Process {
    /// Starts a put, as far as it goes before the drive does anything.
    fn start_put(&mut self, record: usize, value: u8) -> Transfer {
        let ticket = self.put(record, value);
        assert!(self.go_on(&ticket, &mut 0).is_none(), "the drive has done nothing");
        ticket
    }
}

/// A tensor in the store's memory that its owner changed while it was put was committed with the checksum of
/// what it had been: reading it was an error for good, which said to check the drive.
#[test]
fn a_tensor_that_is_changed_while_it_is_put_fails_the_put_and_is_never_committed() {
    let machine = Machine::new(1, Durability::Step);
    let mut process = machine.open().expect("opened");
    let ticket = process.put(0, 1);
    process.finish(&ticket).expect("put");
    let ticket = process.start_put(0, 2);
    process.mover.change_what_is_put(3);
    let error = process.finish(&ticket).expect_err("it was changed");
    assert!(matches!(&error, Error::Changed { tensor } if tensor == "layer.0"), "{error}");
    let ticket = process.front.commit().expect("sent");
    let refused = process.finish(&ticket).expect_err("not whole").to_string();
    assert!(refused.contains("put it again"), "{refused}");
    process.value(0).expect_err("not whole");
    let ticket = process.put(0, 4);
    process.finish(&ticket).expect("put");
    let ticket = process.front.commit().expect("sent");
    process.finish(&ticket).expect("committed");
    assert_eq!(process.values(), [4, 0, 0]);
    process.drive.set_by_hand(false);
    assert!(process.front.store().verify(&mut |_, _| true).expect("read").damaged.is_empty());
}

/// What the drive is given is not what its owner may change back in time.
#[test]
fn a_tensor_that_is_as_it_was_when_its_put_ends_is_written_as_it_was() {
    let machine = Machine::new(1, Durability::Step);
    let mut process = machine.open().expect("opened");
    let ticket = process.start_put(0, 5);
    process.mover.change_what_is_put(6);
    while process.drive.deliver() {}
    process.mover.change_what_is_put(5);
    process.finish(&ticket).expect("put");
    assert_eq!(process.value(0).expect("read"), 5);
}
