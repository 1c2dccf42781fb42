//! An open store: what it holds, what of that is committed, and whether it may still be used.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::{Error, Result};
use crate::io::drives::Drives;
use crate::io::engine::Engine;
use crate::memory::ledger::{Entry as LedgerEntry, Ledger};
use crate::memory::slot::Slot;
use crate::store::checksum::{self, Mismatch};
use crate::store::header::Header;
use crate::store::layout::{Durability, Layout, Manifest};
use crate::store::superblock::Superblock;
use crate::store::table::Table;
use crate::store::verify::report::Report;
use crate::units::{Group, Unit};

/// Largest trainer blob, in bytes.
pub const BLOB_BYTES_MAX: usize = 256 << 10;

/// The newest committed state.
#[derive(Clone, Debug)]
pub struct Committed {
    /// Number of the state; 1 is the import.
    pub generation: u64,
    /// Where everything of it lies.
    pub table: Arc<Table>,
    /// The trainer's own state, committed with it.
    pub blob: Arc<[u8]>,
    pub(super) superblock: Superblock,
}

/// An open store. Sharing it between threads is fine; a step is driven by one `Pipeline`.
#[derive(Debug)]
pub struct Store {
    pub(super) drives: Drives,
    pub(super) engine: Arc<dyn Engine>,
    pub(super) engine_note: Option<String>,
    pub(super) header: Header,
    pub(super) manifest: Manifest,
    pub(super) layout: Arc<Layout>,
    /// The same by chunk, once somebody has asked for it.
    pub(super) chunk_units: OnceLock<(Arc<Layout>, LedgerEntry)>,
    pub(super) ledger: Ledger,
    pub(super) committed: Mutex<Committed>,
    pub(super) buffers: Mutex<CommitBuffers>,
    pub(super) failed: OnceLock<Arc<Error>>,
    /// Whether the clean marker and a rejected superblock are out of the way.
    pub(super) writable: AtomicBool,
    /// Superblock slot that recovery refused; overwritten before the first write.
    pub(super) rejected: Mutex<Option<usize>>,
    /// The generation that opening had to give up, if so.
    pub(super) fell_back_from: Option<u64>,
    pub(super) incarnation: u64,
    pub(super) life: [u8; 16],
    pub(super) process: u32,
    pub(super) verified: Option<Report>,
    pub(super) _tables: LedgerEntry,
}

/// Memory of a commit, allocated once: table, blob, one page.
#[derive(Debug)]
pub(super) struct CommitBuffers {
    pub(super) table: Option<Slot>,
    pub(super) blob: Option<Slot>,
    pub(super) page: Option<Slot>,
}

impl Store {
    /// Where the data area begins, in bytes.
    #[cfg(test)]
    pub(crate) fn data_offset(&self) -> u64 {
        self.header.data_offset
    }

    /// The state to read and to go on from.
    #[must_use]
    pub fn committed(&self) -> Committed {
        self.committed_guard().clone()
    }

    /// What the store holds.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where it lies.
    #[must_use]
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The same with what one buffer holds in place of records: those, or chunks.
    #[must_use]
    pub fn units(&self, unit: Unit) -> &Arc<Layout> {
        if unit == Unit::Record {
            return &self.layout;
        }
        let make = || {
            let units = self.layout.chunks_as_records();
            let numbers = units.chunks().len() * size_of::<u64>();
            let bytes = size_of_val(units.chunks()) + size_of_val(units.records()) + numbers;
            (Arc::new(units), self.ledger.enter("tables", bytes as u64))
        };
        &self.chunk_units.get_or_init(make).0
    }

    /// How bytes move here, and why not by io_uring if that was left to us.
    #[must_use]
    pub fn engine(&self) -> (&Arc<dyn Engine>, Option<&str>) {
        (&self.engine, self.engine_note.as_deref())
    }

    /// Its files, one on each drive.
    #[must_use]
    pub fn drives(&self) -> &Drives {
        &self.drives
    }

    /// The ledger in which the store's memory stands.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The store's UUID.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.header.uuid
    }

    /// What opening verified, if it had to.
    #[must_use]
    pub fn verified_at_open(&self) -> Option<&Report> {
        self.verified.as_ref()
    }

    /// The newer generation that did not hold when the store was opened, if there was one.
    #[must_use]
    pub fn fell_back_from(&self) -> Option<u64> {
        self.fell_back_from
    }

    /// Refuses every call after a failure or in a forked process.
    ///
    /// # Errors
    /// `Failed` with the first failure, or that itself where the store is lost; `UsedAfterFork`.
    pub fn check(&self) -> Result {
        let child = std::process::id();
        if child != self.process {
            return Err(Error::UsedAfterFork { owner: self.process, child });
        }
        match self.failed.get() {
            // That the last step is safe would be wrong to say of these.
            Some(lost) if matches!(**lost, Error::Lost { .. } | Error::NameLost { .. }) => {
                Err(Error::clone(lost))
            }
            Some(first) => Err(Error::Failed { first: Arc::clone(first) }),
            None => Ok(()),
        }
    }

    /// The error for a checksum that did not match.
    #[must_use]
    pub fn corrupt(&self, chunk: usize, group: Group, offset: u64, mismatch: Mismatch) -> Error {
        Error::Corrupt {
            path: self.drives.file(self.layout.chunks()[chunk].drive).path().into(),
            what: self.describe(chunk, group),
            offset: offset + (mismatch.unit * checksum::UNIT_BYTES) as u64,
            expected: mismatch.expected,
            found: mismatch.found,
        }
    }

    /// Names a chunk's plane group: record, chunk and the tensors in it.
    #[must_use]
    pub fn describe(&self, chunk: usize, group: Group) -> String {
        let place = &self.layout.chunks()[chunk];
        let record = &self.manifest.records[place.record];
        let names = self.tensors_in(chunk);
        let shown = names.iter().take(3).copied().collect::<Vec<_>>().join(", ");
        let more =
            if names.len() > 3 { format!(" and {} more", names.len() - 3) } else { String::new() };
        let index = chunk - self.layout.records()[place.record].start;
        format!(
            "record {}, chunk {index}, {} group (tensors {shown}{more})",
            record.name,
            group.name()
        )
    }

    /// Names of the tensors that have parameters in a chunk.
    #[must_use]
    pub fn tensors_in(&self, chunk: usize) -> Vec<&str> {
        let place = &self.layout.chunks()[chunk];
        let end = place.start + place.parameters as u64;
        let tensors = self.manifest.tensors.iter();
        tensors
            .filter(|t| t.record == place.record && t.offset < end)
            .filter(|t| t.offset + t.elements().unwrap_or(0) > place.start)
            .map(|t| t.name.as_str())
            .collect()
    }

    /// Keeps the first failure; every later call returns it.
    pub(super) fn poison(&self, error: Error) -> Error {
        let _ = self.failed.set(Arc::new(error.clone()));
        error
    }

    pub(super) fn committed_guard(&self) -> MutexGuard<'_, Committed> {
        // Replaced as a whole: a panic elsewhere cannot leave it half changed.
        self.committed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the table says of each record how often it was updated. A store that was made with a format before
    /// 0.4 goes on with one number for all records, which is its trainer's.
    #[must_use]
    pub fn has_own_updates(&self) -> bool {
        self.header.has_own_updates()
    }

    /// How often the optimizer has updated each chunk of the committed state: AdamW's t, the same in all chunks of a
    /// record, 0 where it is not trained. `None` where the store has one number for all records.
    #[must_use]
    pub fn updates(&self) -> Option<Vec<u32>> {
        let table = self.committed().table;
        let of = |chunk| table.entry(&self.layout, chunk, Group::Update).updates;
        self.has_own_updates().then(|| (0..self.layout.chunks().len()).map(of).collect())
    }

    /// Whether the store promises nothing but a clean close.
    #[must_use]
    pub fn is_scratch(&self) -> bool {
        self.manifest.durability == Durability::Scratch
    }

    /// Gives a scratch store up: something was written since its last commit, and that cannot be taken
    /// back. The next open refuses it.
    pub(crate) fn give_up(&self) -> Error {
        self.poison(Error::Lost { path: self.drives.path().into() })
    }

    /// Whether clean marker and rejected superblock are out of the way, so that extents may be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Acquire)
    }
}
