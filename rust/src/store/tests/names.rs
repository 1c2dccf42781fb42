//! The store's files lose their names while it is open: noticed at the next commit, on any drive.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::memory::ledger::Ledger;
use crate::store::layout::Durability;
use crate::store::recovery::OpenOptions;
use crate::store::tests::images::manifest;
use crate::store::{Manifest, Store};
use crate::units::StateFormat;

fn opened(folder: &Path, durability: Durability) -> (Vec<PathBuf>, Store) {
    let paths: Vec<_> = ["a", "b"].iter().map(|name| folder.join(name)).collect();
    let manifest = Manifest { durability, ..manifest(&[(StateFormat::F32, 8192)], 4096, 1) };
    let store = Store::create_empty(&paths, manifest, OpenOptions::default(), &Ledger::new());
    (paths, store.expect("created"))
}

fn commit(store: &Store) -> Result<u64, Error> {
    let table = store.committed().table;
    store.commit((*table).clone(), b"step")
}

/// A training whose store was removed went on for 30 steps, each acknowledged, and ended well with
/// nothing left of them. Now the first commit afterwards fails, and so does every call behind it.
#[test]
fn a_file_that_was_removed_stops_the_next_commit_and_can_still_be_copied() {
    for (drive, durability) in
        [(0, Durability::Step), (1, Durability::Step), (1, Durability::Scratch)]
    {
        let folder = tempfile::tempdir().expect("a folder");
        let (paths, store) = opened(folder.path(), durability);
        assert_eq!(commit(&store).expect("committed"), 2);
        fs::remove_file(&paths[drive]).expect("removed");
        let Err(Error::NameLost { path, is_taken: false, moved_to: None, open }) = commit(&store)
        else {
            panic!("drive {drive}: not noticed");
        };
        assert_eq!(path, paths[drive]);
        assert_eq!(store.committed().generation, 2);
        assert!(matches!(commit(&store), Err(Error::NameLost { .. })));
        // Followed as printed: what the open file holds is a store.
        for (index, path) in paths.iter().enumerate() {
            let from = if index == drive { &open } else { path };
            fs::copy(from, path.with_extension("copy")).expect("copied");
        }
        drop(store);
        if durability == Durability::Step {
            let copies: Vec<_> = paths.iter().map(|path| path.with_extension("copy")).collect();
            let store = Store::open(&copies, OpenOptions::default(), &Ledger::new());
            assert!(store.expect("opened").committed().generation >= 2);
        }
    }
}

#[test]
fn a_file_that_was_replaced_or_moved_is_told_with_its_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let (paths, store) = opened(folder.path(), Durability::Step);
    let elsewhere = folder.path().join("elsewhere");
    fs::rename(&paths[1], &elsewhere).expect("moved");
    fs::write(&paths[1], b"another").expect("written");
    let Err(Error::NameLost { is_taken: true, moved_to, .. }) = commit(&store) else {
        panic!("not noticed")
    };
    assert_eq!(moved_to.as_deref(), Some(elsewhere.as_path()));
    drop(store);
    // Moved back, nothing is lost.
    fs::rename(&elsewhere, &paths[1]).expect("moved back");
    let store = Store::open(&paths, OpenOptions::default(), &Ledger::new()).expect("opened");
    fs::rename(&elsewhere, &paths[1]).expect_err("it is there no more");
    fs::copy(&paths[0], &elsewhere).expect("copied");
    fs::rename(&elsewhere, &paths[0]).expect("replaced");
    let error = commit(&store).expect_err("the open file has no name");
    assert!(matches!(error, Error::NameLost { is_taken: true, moved_to: None, .. }), "{error}");
}

/// What was committed is marked clean when the store is closed: too late to be found in vain.
#[test]
fn a_file_that_was_removed_after_the_last_commit_is_told_at_the_close() {
    let folder = tempfile::tempdir().expect("a folder");
    let (paths, store) = opened(folder.path(), Durability::Step);
    commit(&store).expect("committed");
    fs::remove_file(&paths[0]).expect("removed");
    assert!(matches!(store.mark_clean(), Err(Error::NameLost { .. })));
    // Who only read has lost nothing.
    let folder = tempfile::tempdir().expect("a folder");
    let (paths, store) = opened(folder.path(), Durability::Scratch);
    fs::remove_file(&paths[0]).expect("removed");
    store.mark_clean().expect("nothing was written");
}
