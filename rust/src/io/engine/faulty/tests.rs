use super::*;
use crate::io::engine::memory::Memory;
use crate::io::engine::perform;
use crate::io::engine::tests::conformance;

fn faulty() -> (tempfile::TempDir, Arc<DirectFile>, Faulty) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = DirectFile::create(&folder.path().join("data"), 1 << 20).expect("a file");
    let inner = Arc::new(Memory::default());
    (folder, Arc::new(file), Faulty::over(inner, Plan { seed: 1, ..Plan::default() }))
}

fn filled(byte: u8, bytes: usize) -> Option<Slot> {
    let mut slot = Slot::standalone(bytes, &Ledger::new(), "test").expect("memory");
    slot.fill(byte);
    Some(slot)
}

fn read(engine: &Faulty, file: &Arc<DirectFile>, offset: u64) -> Slot {
    let (slot, result) = perform(engine, Operation::Read, file, offset, filled(9, PAGE_BYTES));
    result.expect("read");
    slot.expect("a slot")
}

#[test]
fn without_faults_it_keeps_the_rules_of_an_engine() {
    let inner = Arc::new(crate::io::engine::threads::Threads::start(1).expect("threads"));
    conformance::run(&Faulty::over(inner, Plan::default()));
}

#[test]
fn a_flush_keeps_what_completed_before_it_and_a_power_cut_tears_the_rest() {
    let (_folder, file, engine) = faulty();
    let write = |byte| perform(&engine, Operation::Write, &file, 0, filled(byte, PAGE_BYTES)).1;
    write(1).expect("written");
    perform(&engine, Operation::Sync, &file, 0, None).1.expect("flushed");
    let mut seen = std::collections::HashSet::new();
    for _ in 0..64 {
        write(2).expect("written");
        engine.cut_power();
        assert!(write(3).is_err(), "the power is off");
        engine.power_on();
        let page = read(&engine, &file, 0);
        seen.extend(page.chunks(SECTOR_BYTES).map(|sector| {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "torn inside a sector");
            sector[0]
        }));
        write(1).expect("written");
        perform(&engine, Operation::Sync, &file, 0, None).1.expect("flushed");
    }
    assert_eq!(seen, [1, 2].into(), "both the old and the new bytes can survive");
    let durable = perform(&engine, Operation::WriteDurable, &file, 0, filled(7, PAGE_BYTES));
    durable.1.expect("written through");
    engine.cut_power();
    engine.power_on();
    assert!(read(&engine, &file, 0).iter().all(|byte| *byte == 7));
}

#[test]
fn the_nth_operation_fails_or_stops_half_way() {
    let (_folder, file, engine) = faulty();
    engine.plan(1, Fault::Fail(28));
    let write = |byte| perform(&engine, Operation::Write, &file, 0, filled(byte, 4 * PAGE_BYTES));
    write(1).1.expect("the first is well");
    let (slot, result) = write(2);
    assert!(slot.is_some() && result.is_err());
    assert_eq!(read(&engine, &file, 0)[0], 1);
    engine.plan(0, Fault::Short(28));
    write(3).1.expect_err("half-way");
    let at = |page: usize| read(&engine, &file, (page * PAGE_BYTES) as u64)[0];
    assert_eq!([at(0), at(1), at(2), at(3)], [3, 3, 1, 1]);
}
