use std::sync::Arc;

use super::*;
use crate::io::engine::Engine;
use crate::io::engine::Operation;
use crate::io::engine::faulty::{Fault, Faulty, Plan, Point};
use crate::io::engine::memory::Memory;
use crate::memory::ledger::Ledger;
use crate::store::header::CLEAN_MARKER_OFFSET;
use crate::store::tests::images::{BOOT_ID, RECORDS, Trained};
use crate::units::{PAGE_BYTES, to_usize};

/// Generation 3, of which one extent that generation 2 does not share is damaged, after a kill.
fn damaged() -> (tempfile::TempDir, Trained, Memory) {
    let folder = tempfile::tempdir().expect("a folder");
    let trained = Trained::new(folder.path(), &RECORDS, 4096, 1);
    let drive = trained.image().copy();
    drive.overwrite(CLEAN_MARKER_OFFSET, &[0; PAGE_BYTES]);
    let (newer, older) = (&trained.states[2].groups, &trained.states[1].groups);
    let only_newer = newer.iter().zip(older).find(|(newer, older)| newer.place != older.place);
    let place = only_newer.expect("generation 3 wrote something").0.place.clone();
    let byte = drive.bytes(place.start..place.start + 1)[0];
    drive.overwrite(place.start, &[byte ^ 1]);
    (folder, trained, drive)
}

/// In the same life of the kernel, so that opening verifies nothing.
fn open(trained: &Trained, drive: Arc<dyn Engine>) -> Store {
    Store::open_on(&trained.drives, drive, BOOT_ID, &Ledger::new()).expect("opened")
}

fn go_back(store: &Store) -> Result<Option<u64>> {
    store.go_back(&mut |_, _| true)
}

/// One bit of the newest state was damaged after a kill, with the one before it whole: on the same boot
/// the model was to be imported again, though after a restart of the machine the same bytes opened at the
/// older state. Now a person may go back to it, and a crash in the middle of that leaves one of both.
#[test]
fn a_damaged_state_is_given_up_when_a_person_says_so_and_never_by_half() {
    let (_folder, trained, drive) = damaged();
    let older = open(&trained, Arc::new(drive.copy())).verify_older(&mut |_, _| true);
    let older = older.expect("verified").expect("it is there");
    assert_eq!((older.report.generation, older.report.damaged.len()), (2, 0));
    assert_eq!(older.blob, trained.states[1].blob);
    let mut found = Vec::new();
    for writes in 0.. {
        let drive = Arc::new(drive.copy());
        let fault = (Point::Of(Operation::WriteDurable, writes), Fault::Fail(5));
        let plan = Plan { faults: vec![fault], ..Plan::default() };
        let faulty = Faulty::over(Arc::clone(&drive) as Arc<dyn Engine>, plan);
        let went = go_back(&open(&trained, Arc::new(faulty)));
        let store = open(&trained, Arc::clone(&drive) as Arc<dyn Engine>);
        let committed = store.committed();
        found.push(committed.generation);
        assert_eq!(committed.blob[..], trained.states[to_usize(committed.generation) - 1].blob);
        let report = store.verify(&mut |_, _| true).expect("verified");
        assert_eq!(report.damaged.is_empty(), committed.generation == 2);
        if let Ok(generation) = went {
            assert_eq!(generation, Some(2));
            let next = store.commit((*committed.table).clone(), b"on").expect("it goes on");
            assert_eq!(next, 3);
            break;
        }
    }
    // The marker is zeroed, then the superblock, then its mirror; the marker of generation 2 comes last.
    assert_eq!(found, [3, 3, 3, 2, 2]);
}

#[test]
fn nothing_is_changed_where_there_is_nothing_to_go_back_from_or_to() {
    let (_folder, trained, drive) = damaged();
    let whole = Arc::new(trained.image().copy());
    assert_eq!(go_back(&open(&trained, whole.clone())).expect("it is whole"), None);
    assert!(whole.agrees(trained.image(), 0..trained.header.file_bytes));
    let both = Arc::new(drive.copy());
    for held in &trained.states[1].groups {
        both.overwrite(held.place.start, &[0xa5; 64]);
    }
    let before = both.copy();
    let error = go_back(&open(&trained, both.clone())).expect_err("both are damaged");
    assert!(error.to_string().contains("generation 2 fails"), "{error}");
    assert!(both.agrees(&before, 0..trained.header.file_bytes));
    // Whoever has written has begun to overwrite the older state.
    let store = open(&trained, Arc::new(drive));
    store.run(store.start_writing().expect("open")).expect("written");
    assert!(store.verify_older(&mut |_, _| true).expect("asked").is_none());
    assert!(go_back(&store).expect_err("too late").to_string().contains("not there any more"));
}
