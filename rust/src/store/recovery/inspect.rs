//! What a store says of itself, read without its lock: for a person who asks how a run stands. Opening
//! alone decides what may be believed.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::drives::Drives;
use crate::io::engine::choice::{self, Choice};
use crate::store::header::{CLEAN_MARKER_OFFSET, SUPERBLOCK_OFFSETS};
use crate::store::layout::Manifest;
use crate::store::recovery::{Opened, read, read_files, read_state, read_superblock};
use crate::store::state::{Committed, Store};
use crate::units::PAGE_BYTES;

/// Another process may commit twice between two of our reads, so that neither state holds: look again.
const LOOKS: usize = 3;

/// The newest state whose superblock, table and blob hold; its chunks were not looked at.
#[derive(Clone, Debug)]
pub struct StoreInfo {
    /// The store's UUID.
    pub uuid: [u8; 16],
    /// What the store holds.
    pub manifest: Manifest,
    /// Number of the state.
    pub generation: u64,
    /// The trainer's own state, committed with it.
    pub blob: Arc<[u8]>,
    /// Whether the store was closed after that commit, and nothing written since.
    pub is_clean: bool,
    /// Whether it was committed since the machine was started: then opening need not verify it.
    pub is_of_this_boot: bool,
    /// Whether the file system has direct I/O.
    pub is_direct: bool,
}

impl Store {
    /// What the store in these files says of itself. Neither locks nor verifies it.
    ///
    /// # Errors
    /// `Format` when it is no store or nothing of it holds, `Unsupported`, `Io`.
    pub fn inspect(paths: &[PathBuf]) -> Result<StoreInfo> {
        let drives = Drives::open_unlocked(paths)?;
        let (engine, engine_note) = choice::start(Choice::Threads, drives.count())?;
        let life = drives.life();
        let opened = read_files(drives, engine, engine_note, life)?;
        let mut found = None;
        for _ in 0..LOOKS {
            found = newest(&opened)?;
            if found.is_some() {
                break;
            }
        }
        let newest = found;
        let newest = newest.ok_or_else(|| {
            Error::format(opened.drives.path(), "no committed state holds: the import did not finish, or the drive lost data that it had confirmed")
        })?;
        let marker =
            read(&*opened.engine, opened.drives.main(), CLEAN_MARKER_OFFSET, PAGE_BYTES).ok();
        Ok(StoreInfo {
            uuid: opened.header.uuid,
            manifest: opened.manifest,
            generation: newest.generation,
            is_clean: marker.is_some_and(|marker| newest.superblock.is_vouched_for_by(&marker)),
            // The first half is the kernel's alone.
            is_of_this_boot: newest.superblock.life[..8] == life[..8] && life != [0; 16],
            is_direct: opened.drives.are_direct(),
            blob: newest.blob,
        })
    }
}

fn newest(opened: &Opened) -> Result<Option<Committed>> {
    let mut newest: Option<Committed> = None;
    for side in 0..SUPERBLOCK_OFFSETS.len() {
        let Some(superblock) = read_superblock(&opened.place(), side)? else { continue };
        let found = read_state(&opened.place(), superblock, side)?;
        if found.as_ref().map(|c| c.generation) > newest.as_ref().map(|c| c.generation) {
            newest = found;
        }
    }
    Ok(newest)
}
