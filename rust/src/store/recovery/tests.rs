use super::*;
use crate::io::engine::memory::Memory;
use crate::store::tests::images::{RECORDS, Trained};

const PAGE: u64 = PAGE_BYTES as u64;

fn trained() -> (tempfile::TempDir, Trained) {
    let folder = tempfile::tempdir().expect("a folder");
    let trained = Trained::new(folder.path(), &RECORDS, 4096, 1);
    (folder, trained)
}

fn opens_at_3(trained: &Trained, drive: Memory) {
    let ledger = Ledger::new();
    let store = Store::open_on(&trained.drives, Arc::new(drive), [2; 16], &ledger);
    let store = store.expect("opened");
    assert_eq!((store.committed().generation, store.fell_back_from()), (3, None));
    assert_eq!(store.committed().blob[..], trained.states[2].blob);
}

/// The drive lost the write of generation 3's superblock and kept the one of its mirror. The older
/// one in the first place was believed and the mirror not looked at, so the store opened at
/// generation 2 and said nothing. Now the newer of both places counts.
#[test]
fn an_older_superblock_does_not_hide_the_newer_one_in_its_mirror() {
    let (_folder, trained) = trained();
    for place in SUPERBLOCK_OFFSETS[1] {
        let drive = trained.image().copy();
        let before = trained.states[0].image.bytes(place..place + PAGE);
        drive.overwrite(place, &before);
        assert!(!drive.agrees(trained.image(), place..place + PAGE));
        opens_at_3(&trained, drive);
    }
}

/// The drive wrote superblocks to each other's place. Both carry a sum that holds, so the mirrors
/// were not looked at, and neither was of the right parity: the store was refused. Now a
/// superblock in the wrong place is none.
#[test]
fn a_superblock_of_the_other_side_does_not_hide_the_mirror() {
    let (_folder, trained) = trained();
    let drive = trained.image().copy();
    for (place, from) in [(0, 1), (1, 0)] {
        let from = SUPERBLOCK_OFFSETS[from][0];
        let page = trained.image().bytes(from..from + PAGE);
        drive.overwrite(SUPERBLOCK_OFFSETS[place][0], &page);
    }
    opens_at_3(&trained, drive);
}

/// Both places of the newest superblock are gone. The clean marker still names its generation, so
/// the loss of a step is told.
#[test]
fn a_marker_tells_of_a_superblock_that_is_gone() {
    let (_folder, trained) = trained();
    let drive = trained.image().copy();
    for place in SUPERBLOCK_OFFSETS[1] {
        drive.overwrite(place, &[0; PAGE_BYTES]);
    }
    let ledger = Ledger::new();
    let store = Store::open_on(&trained.drives, Arc::new(drive), [2; 16], &ledger);
    let store = store.expect("opened");
    assert_eq!((store.committed().generation, store.fell_back_from()), (2, Some(3)));
    assert!(store.verified_at_open().is_some(), "the older state was looked at");
}

/// The drive kept the marker of a generation and neither of its superblocks, nor the one before. The
/// state that is left must survive the first write, though it lies on the lost one's side.
#[test]
fn what_was_chosen_is_never_rejected() {
    let (_folder, trained) = trained();
    let drive = Arc::new(trained.image().copy());
    let marked = Superblock { generation: 5, ..chosen(&trained, &drive).committed().superblock };
    drive.overwrite(CLEAN_MARKER_OFFSET, &marked.clean_marker()[..]);
    let store = chosen(&trained, &drive);
    assert_eq!((store.committed().generation, store.fell_back_from()), (3, Some(5)));
    store.run(store.start_writing().expect("open")).expect("written");
    drop(store);
    assert_eq!(chosen(&trained, &drive).committed().generation, 3);
}

fn chosen(trained: &Trained, drive: &Arc<Memory>) -> Store {
    let drive = Arc::clone(drive) as Arc<dyn Engine>;
    Store::open_on(&trained.drives, drive, [2; 16], &Ledger::new()).expect("opened")
}
