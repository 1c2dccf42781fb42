//! The store: a file (one on each drive) in which a whole training state changes from one step to the next at once.
//!
//! A chunk's first write since the last commit goes to the copy that the committed table does not
//! name; a commit makes the working table the committed one. `docs/design.md` draws the bytes and
//! has the state table; `commit.rs` and `recovery.rs` are the two halves of the promise.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::{Error, Result};
use crate::io::drives::Drives;
use crate::io::engine::choice::Choice;
use crate::io::engine::faulty::{Fault, Point};
use crate::io::engine::{self, Engine, Operation};
use crate::memory::ledger::{Entry as LedgerEntry, Ledger};
use crate::memory::slot::Slot;
use crate::store::checksum::{Binding, Mismatch};
use crate::store::header::Header;
use crate::store::layout::{Durability, Layout, Manifest};
use crate::store::superblock::Superblock;
use crate::units::{CopyId, Group, Unit};

pub mod checksum;
mod commit;
mod create;
mod fields;
mod header;
pub mod layout;
pub mod manifest;
mod recovery;
mod superblock;
mod table;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod tests;
mod verify;

pub use commit::{Next, Sequence, Sequenced};
pub use create::Creator;
pub use recovery::Glance;
pub use table::{Entry, Table};
pub use verify::{Damage, Report};

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
    superblock: Superblock,
}

/// How to open a store.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// How bytes move.
    pub engine: Choice,
    /// What goes wrong on purpose; for tests.
    pub faults: Vec<(Point, Fault)>,
}

/// An open store. Sharing it between threads is fine; a step is driven by one `Pipeline`.
#[derive(Debug)]
pub struct Store {
    drives: Drives,
    engine: Arc<dyn Engine>,
    engine_note: Option<String>,
    header: Header,
    manifest: Manifest,
    layout: Arc<Layout>,
    /// The same by chunk, once somebody has asked for it.
    chunk_units: OnceLock<(Arc<Layout>, LedgerEntry)>,
    ledger: Ledger,
    committed: Mutex<Committed>,
    buffers: Mutex<CommitBuffers>,
    failed: OnceLock<Arc<Error>>,
    /// Whether the clean marker and a rejected superblock are out of the way.
    writable: AtomicBool,
    /// Superblock slot that recovery refused; overwritten before the first write.
    rejected: Mutex<Option<usize>>,
    /// The generation that opening had to give up, if so.
    fell_back_from: Option<u64>,
    incarnation: u64,
    boot_id: [u8; 16],
    process: u32,
    verified: Option<Report>,
    _tables: LedgerEntry,
}

/// Memory of a commit, allocated once: table, blob, one page.
#[derive(Debug)]
struct CommitBuffers {
    table: Option<Slot>,
    blob: Option<Slot>,
    page: Option<Slot>,
}

/// A read of one plane group, planned from a table entry.
#[derive(Clone, Debug)]
pub struct ReadPlan {
    /// Which drive's file.
    pub drive: usize,
    /// File offset in bytes.
    pub offset: u64,
    /// Bytes to read; 0 when every plane is zero.
    pub bytes: usize,
    /// What the checksums are bound to.
    pub binding: Binding,
    /// The checksums of those bytes.
    pub sums: Vec<u32>,
}

/// A write of one plane group, planned by the copy rule.
#[derive(Clone, Copy, Debug)]
pub struct WritePlan {
    /// Which drive's file.
    pub drive: usize,
    /// File offset in bytes.
    pub offset: u64,
    /// What the checksums are bound to.
    pub binding: Binding,
    /// The entry that the working table gets once the write has completed.
    pub entry: Entry,
}

impl Store {
    /// Opens a store at its newest whole generation. `paths` are its files, the main one first, in the
    /// order in which it was created.
    ///
    /// # Errors
    /// `InUse`, `Format`, `Corrupt`, `Unsupported`, `Io`; no file is changed by any of them.
    pub fn open(paths: &[PathBuf], options: OpenOptions, ledger: &Ledger) -> Result<Self> {
        Self::open_in(Drives::open_waiting(paths, &mut |_, _| Ok(()))?, options, ledger)
    }

    /// The same, in files that are open and locked already.
    ///
    /// # Errors
    /// As `open`, but for `InUse`.
    pub fn open_in(drives: Drives, options: OpenOptions, ledger: &Ledger) -> Result<Self> {
        recovery::open(drives, options, ledger)
    }

    /// What the store in these files says of itself. Neither locks nor verifies it.
    ///
    /// # Errors
    /// `Format` when it is no store or nothing of it holds, `Unsupported`, `Io`.
    pub fn glance(paths: &[PathBuf]) -> Result<Glance> {
        Glance::at(paths)
    }

    /// Opens the store in files that this process has locked, over an engine that runs.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn open_on(
        drives: &Drives,
        engine: Arc<dyn Engine>,
        boot_id: [u8; 16],
        ledger: &Ledger,
    ) -> Result<Self> {
        recovery::open_on(drives.clone(), engine, None, boot_id, ledger)
    }

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

    /// Bytes in the ledger of a store with this layout, once it is open.
    #[must_use]
    pub fn memory_bytes(layout: &Layout) -> u64 {
        recovery::memory_bytes(layout)
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
    /// `Failed` with the first failure, `UsedAfterFork`.
    pub fn check(&self) -> Result {
        let child = std::process::id();
        if child != self.process {
            return Err(Error::UsedAfterFork { owner: self.process, child });
        }
        match self.failed.get() {
            Some(lost) if matches!(**lost, Error::Lost { .. }) => Err(Error::clone(lost)),
            Some(first) => Err(Error::Failed { first: Arc::clone(first) }),
            None => Ok(()),
        }
    }

    /// Where to read a plane group of the state `table`.
    #[must_use]
    pub fn plan_read(&self, table: &Table, chunk: usize, group: Group) -> ReadPlan {
        let entry = table.entry(&self.layout, chunk, group);
        ReadPlan {
            drive: self.layout.chunks()[chunk].drive,
            offset: self.header.data_offset + self.layout.extent_offset(chunk, group, entry.copy),
            bytes: self.layout.chunks()[chunk].stored_bytes(group, usize::from(entry.planes)),
            binding: self.binding(chunk, group, entry.generation),
            sums: table.sums(&self.layout, chunk, group).to_vec(),
        }
    }

    /// Where to write a plane group by the copy rule: in place if it was already written since the
    /// last commit, else to the copy that the committed table does not name.
    ///
    /// # Errors
    /// `Invalid` for a second write to a record that is not trained.
    pub fn plan_write(
        &self,
        table: &Table,
        chunk: usize,
        group: Group,
        planes: usize,
    ) -> Result<WritePlan> {
        let next = self.committed_guard().generation + 1;
        let old = table.entry(&self.layout, chunk, group);
        let is_rewritable = self.layout.chunks()[chunk].is_rewritable();
        let copy = match old.generation {
            0 => CopyId::A,
            generation if generation == next => old.copy,
            _ if self.layout.has_two_copies(chunk) => old.copy.other(),
            // A scratch store has nowhere else to write to.
            _ if is_rewritable => old.copy,
            _ => {
                return Err(Error::invalid(format!(
                    "{} is not trained and cannot be written again",
                    self.describe(chunk, group)
                )));
            }
        };
        let planes = u8::try_from(planes).map_err(|_| Error::invalid("at most three planes"))?;
        Ok(WritePlan {
            drive: self.layout.chunks()[chunk].drive,
            offset: self.header.data_offset + self.layout.extent_offset(chunk, group, copy),
            binding: self.binding(chunk, group, next),
            entry: Entry { generation: next, copy, planes },
        })
    }

    /// Reads a plane group into the front of `slot` (its extent must fit) and verifies it; planes
    /// that were never written are zero. Blocks.
    ///
    /// # Errors
    /// `Corrupt` when the bytes differ from what was written, twice; `Io`, `Failed`.
    pub fn read_group(
        &self,
        table: &Table,
        chunk: usize,
        group: Group,
        mut slot: Slot,
    ) -> Result<Slot> {
        self.check()?;
        let plan = self.plan_read(table, chunk, group);
        let extent = self.layout.chunks()[chunk].extent_bytes(group);
        for attempt in 0..2 {
            if plan.bytes > 0 {
                let (front, rest) = slot.split_at(plan.bytes);
                let (front, result) = engine::perform(
                    &*self.engine,
                    Operation::Read,
                    self.drives.file(plan.drive),
                    plan.offset,
                    Some(front),
                );
                result?;
                slot = front.ok_or_else(|| Error::invalid("the engine kept a slot"))?.join(rest);
            }
            slot[plan.bytes..extent].fill(0);
            match checksum::verify(&plan.binding, &slot[..plan.bytes], &plan.sums) {
                Ok(()) => break,
                // A flip on the bus or in RAM is gone at the second reading.
                Err(_) if attempt == 0 => {}
                Err(mismatch) => return Err(self.corrupt(chunk, group, plan.offset, mismatch)),
            }
        }
        Ok(slot)
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

    fn binding(&self, chunk: usize, group: Group, generation: u64) -> Binding {
        let chunk = u32::try_from(chunk).unwrap_or(u32::MAX);
        Binding { store: self.header.uuid, chunk, group, generation }
    }

    /// Keeps the first failure; every later call returns it.
    fn poison(&self, error: Error) -> Error {
        let _ = self.failed.set(Arc::new(error.clone()));
        error
    }

    fn committed_guard(&self) -> MutexGuard<'_, Committed> {
        // Replaced as a whole: a panic elsewhere cannot leave it half changed.
        self.committed.lock().unwrap_or_else(PoisonError::into_inner)
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
