//! The moment at which a step becomes durable.
//!
//! Order is everything here (`docs/design.md` has the proof obligations):
//! drain, table and blob, flush, superblock written through, acknowledge. A [`Sequence`] keeps that
//! order and knows no thread: who owns the completions drives it, or [`Store::commit`] by waiting.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use crossbeam_channel::unbounded;

use crate::error::{Error, Result};
use crate::io::engine::{self, Completion, Operation, Request};
use crate::io::file::DirectFile;
use crate::memory::slot::Slot;
use crate::store::header::{CLEAN_MARKER_OFFSET, SUPERBLOCK_OFFSETS};
use crate::store::state::{BLOB_BYTES_MAX, Committed, Store};
use crate::store::superblock::{GENERATION_MAX, Superblock};
use crate::store::table::Table;
use crate::units::{PAGE_BYTES, to_usize};

/// Operations of which each starts when the one before it has completed. When the last one has, the
/// store takes their effect on.
#[derive(Debug)]
pub struct Sequence {
    steps: VecDeque<Step>,
    /// One, or the flushes of several drives.
    under_way: VecDeque<Step>,
    becomes: Option<Committed>,
}

#[derive(Debug)]
struct Step {
    what: What,
    drive: usize,
    offset: u64,
    /// A failure leaves it unknown what the drive holds: only opening the store again can tell.
    is_final: bool,
    /// Whether this is the second attempt.
    again: bool,
}

#[derive(Debug)]
enum What {
    /// The encoded table, which is in its buffer.
    Table,
    /// So many bytes of the blob's buffer.
    Blob(usize),
    /// One page, through to stable storage.
    Page(Box<[u8; PAGE_BYTES]>),
    Flush,
    /// No operation: from here on the store may be written to.
    Writable,
}

/// How a sequence goes on.
#[derive(Debug)]
pub enum Next {
    /// With an operation to submit now.
    Operation(Sequenced),
    /// Not before one of those under way has completed.
    Wait,
    /// It has ended, and the store has taken its effect on.
    End,
}

/// An operation of a sequence.
#[derive(Debug)]
pub struct Sequenced {
    /// What to do.
    pub operation: Operation,
    /// Which drive's file.
    pub drive: usize,
    /// File offset in bytes.
    pub offset: u64,
    /// The bytes; `None` for a flush.
    pub slot: Option<Slot>,
    /// How many bytes from the slot's start.
    pub bytes: usize,
}

impl Step {
    fn page(page: Box<[u8; PAGE_BYTES]>, offset: u64) -> Self {
        Self { what: What::Page(page), drive: 0, offset, is_final: true, again: false }
    }
}

impl Store {
    /// Makes `table` and `blob` the committed state and returns its generation. The caller has seen
    /// the completion of every write that `table` names. Blocks until it is durable.
    ///
    /// # Errors
    /// A failure before the flush leaves the last generation and the store usable; a failed flush or
    /// superblock is final (`Failed` from then on).
    pub fn commit(&self, table: Table, blob: &[u8]) -> Result<u64> {
        self.run(self.start_commit(table, blob)?)?;
        Ok(self.committed_guard().generation)
    }

    /// The same as a sequence: `table` and `blob` are the committed state when it has ended.
    ///
    /// # Errors
    /// `Invalid` for a blob that is too long, `Failed`.
    pub fn start_commit(&self, table: Table, blob: &[u8]) -> Result<Sequence> {
        self.check()?;
        if blob.len() > BLOB_BYTES_MAX {
            return Err(Error::invalid(format!(
                "a trainer blob of {} bytes; the limit is {BLOB_BYTES_MAX}",
                blob.len()
            )));
        }
        let generation = self.committed_guard().generation + 1;
        if generation > GENERATION_MAX {
            return Err(Error::invalid("no generation follows: import the model again"));
        }
        if self.is_scratch() && generation > 1 {
            return Ok(self.commit_in_memory(generation, table, blob));
        }
        self.commit_of(generation, table, blob)
    }

    /// With durability scratch a commit is on disk only when the store is closed.
    fn commit_in_memory(&self, generation: u64, table: Table, blob: &[u8]) -> Sequence {
        let superblock = self.committed_guard().superblock.clone();
        let becomes = Committed { generation, table: table.into(), blob: blob.into(), superblock };
        Sequence { steps: VecDeque::new(), under_way: VecDeque::new(), becomes: Some(becomes) }
    }

    fn commit_of(&self, generation: u64, table: Table, blob: &[u8]) -> Result<Sequence> {
        let mut steps = self.first_write_steps();
        let side = usize::from(generation & 1 == 1);
        let (table_crc, blob_crc) = self.fill_buffers(&table, blob)?;
        let superblock = Superblock {
            uuid: self.header.uuid,
            generation,
            incarnation: self.incarnation,
            life: self.life,
            table_crc,
            blob_bytes: blob.len() as u64,
            blob_crc,
            manifest_crc: self.header.manifest_crc,
        };
        let blob_bytes = blob.len().next_multiple_of(PAGE_BYTES).max(PAGE_BYTES);
        let (tables, blobs) = (self.header.table_offsets, self.header.blob_offsets);
        let step = |what, offset| Step { what, drive: 0, offset, is_final: false, again: false };
        steps.extend([step(What::Table, tables[side]), step(What::Blob(blob_bytes), blobs[side])]);
        // Every drive: the extents of this generation are on all of them.
        let flush =
            |drive| Step { what: What::Flush, drive, offset: 0, is_final: true, again: false };
        steps.extend((0..self.drives.count()).map(flush));
        steps.extend(SUPERBLOCK_OFFSETS[side].map(|at| Step::page(superblock.encode(), at)));
        let becomes = Committed { generation, table: table.into(), blob: blob.into(), superblock };
        Ok(Sequence { steps, under_way: VecDeque::new(), becomes: Some(becomes) })
    }

    /// What must be durable before the first write since the store was opened: clean marker and
    /// rejected superblock are gone. A marker left standing would vouch for changed data, and a
    /// rejected superblock might look whole again after the next crash. Empty when that was done.
    ///
    /// # Errors
    /// `Failed`.
    pub fn start_writing(&self) -> Result<Sequence> {
        self.check()?;
        let (steps, under_way) = (self.first_write_steps(), VecDeque::new());
        Ok(Sequence { steps, under_way, becomes: None })
    }

    fn first_write_steps(&self) -> VecDeque<Step> {
        if self.is_writable() {
            return VecDeque::new();
        }
        let rejected = *self.rejected.lock().unwrap_or_else(PoisonError::into_inner);
        let superblocks = rejected.into_iter().flat_map(|side| SUPERBLOCK_OFFSETS[side]);
        let mut steps: VecDeque<Step> = [CLEAN_MARKER_OFFSET]
            .into_iter()
            .chain(superblocks)
            .map(|offset| Step::page(Box::new([0; PAGE_BYTES]), offset))
            .collect();
        let what = What::Writable;
        steps.push_back(Step { what, drive: 0, offset: 0, is_final: true, again: false });
        steps
    }

    /// How to go on. Each operation begins when those before it have [`completed`](Self::completed);
    /// only the flushes of several drives run side by side.
    ///
    /// # Errors
    /// `Invalid` when a failed engine kept a buffer.
    pub fn next_operation(&self, sequence: &mut Sequence) -> Result<Next> {
        loop {
            let is_flush =
                |step: Option<&Step>| step.is_some_and(|s| matches!(s.what, What::Flush));
            let both = is_flush(sequence.under_way.front()) && is_flush(sequence.steps.front());
            if !sequence.under_way.is_empty() && !both {
                return Ok(Next::Wait);
            }
            let Some(step) = sequence.steps.pop_front() else {
                if let Some(becomes) = sequence.becomes.take() {
                    // Acknowledged is what a person finds again, not what a nameless file holds.
                    self.drives.check_are_found().map_err(|error| self.poison(error))?;
                    *self.committed_guard() = becomes;
                }
                return Ok(Next::End);
            };
            let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
            let (operation, slot, bytes) = match &step.what {
                What::Writable => {
                    self.writable.store(true, Ordering::Release);
                    *self.rejected.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    continue;
                }
                What::Table => {
                    let bytes = to_usize(self.header.table_bytes);
                    (Operation::Write, Some(take(&mut buffers.table)?), bytes)
                }
                What::Blob(bytes) => (Operation::Write, Some(take(&mut buffers.blob)?), *bytes),
                What::Page(page) => {
                    let mut slot = take(&mut buffers.page)?;
                    slot.copy_from_slice(&page[..]);
                    (Operation::WriteDurable, Some(slot), PAGE_BYTES)
                }
                What::Flush => (Operation::Sync, None, 0),
            };
            let Step { drive, offset, .. } = step;
            sequence.under_way.push_back(step);
            return Ok(Next::Operation(Sequenced { operation, drive, offset, slot, bytes }));
        }
    }

    /// Takes note of how an operation ended. Those that run side by side are all flushes: which of them
    /// it was makes no difference.
    ///
    /// # Errors
    /// The operation's own: the sequence is over then. A write before the flush is tried twice.
    pub fn completed(&self, sequence: &mut Sequence, slot: Option<Slot>, result: Result) -> Result {
        let Some(step) = sequence.under_way.pop_front() else {
            return Err(Error::invalid("no operation of the sequence is under way"));
        };
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        match step.what {
            What::Table => buffers.table = slot,
            What::Blob(_) => buffers.blob = slot,
            What::Page(_) => buffers.page = slot,
            What::Flush | What::Writable => {}
        }
        match result {
            Ok(()) => Ok(()),
            Err(error) if error.is_worth_a_retry() && !step.is_final && !step.again => {
                sequence.steps.push_front(Step { again: true, ..step });
                Ok(())
            }
            Err(error) if step.is_final => Err(self.poison(error)),
            Err(error) => Err(error),
        }
    }

    /// Performs a sequence to its end. Blocks.
    pub(super) fn run(&self, mut sequence: Sequence) -> Result {
        let (reply, completions) = unbounded();
        loop {
            match self.next_operation(&mut sequence)? {
                Next::Operation(Sequenced { operation, drive, offset, slot, bytes }) => {
                    let (file, reply) = (Arc::clone(self.drives.file(drive)), reply.clone());
                    let request = Request { operation, file, offset, slot, bytes, tag: 0, reply };
                    self.engine.submit(request);
                }
                Next::Wait => {
                    let lost = |_| Error::invalid("the engine dropped a request");
                    let Completion { slot, result, .. } = completions.recv().map_err(lost)?;
                    self.completed(&mut sequence, slot, result)?;
                }
                Next::End => return Ok(()),
            }
        }
    }

    /// Says on disk that nothing was written after the last commit, so that the next open need not
    /// verify. The caller has stopped writing. A scratch store's last commit goes to disk before.
    ///
    /// # Errors
    /// `Io`; the state is safe all the same and the next open may verify it.
    pub fn mark_clean(&self) -> Result {
        self.check()?;
        // A scratch store's newest commit may be in RAM alone.
        let Committed { generation, table, blob, superblock } = self.committed();
        if superblock.generation != generation {
            self.run(self.commit_of(generation, Table::clone(&table), &blob)?)?;
        }
        if !self.is_writable() {
            return Ok(());
        }
        self.drives.check_are_found().map_err(|error| self.poison(error))?;
        self.writable.store(false, Ordering::Release);
        let marker = self.committed_guard().superblock.clean_marker();
        self.write_page(&marker[..], CLEAN_MARKER_OFFSET)
    }

    /// Encodes table and blob into their buffers and returns their checksums.
    fn fill_buffers(&self, table: &Table, blob: &[u8]) -> Result<(u64, u64)> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = || Error::invalid("the engine kept a commit buffer");
        let table_slot = buffers.table.as_mut().ok_or_else(kept)?;
        table.encode(table_slot);
        let table_crc =
            crate::store::checksum::crc64(&table_slot[..to_usize(self.header.table_bytes)]);
        let blob_slot = buffers.blob.as_mut().ok_or_else(kept)?;
        blob_slot[..blob.len()].copy_from_slice(blob);
        blob_slot[blob.len()..].fill(0);
        Ok((table_crc, crate::store::checksum::crc64(blob)))
    }

    /// Writes one page of the main file through to stable storage.
    fn write_page(&self, page: &[u8], offset: u64) -> Result {
        self.write_page_of(self.drives.main(), page, offset)
    }

    /// The same for any of the files.
    pub(super) fn write_page_of(&self, file: &Arc<DirectFile>, page: &[u8], offset: u64) -> Result {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut slot = take(&mut buffers.page)?;
        slot.copy_from_slice(page);
        let result;
        (buffers.page, result) =
            engine::perform(&*self.engine, Operation::WriteDurable, file, offset, Some(slot));
        result
    }
}

fn take(slot: &mut Option<Slot>) -> Result<Slot> {
    slot.take().ok_or_else(|| Error::invalid("the engine kept a commit buffer"))
}
