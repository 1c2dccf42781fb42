//! The moment at which a step becomes durable.
//!
//! Order is everything here (`docs/design.md` has the proof obligations):
//! drain, table and blob, flush, superblock written through, acknowledge.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::buffer::Slot;
use crate::engine::{self, Operation};
use crate::error::{Error, Result};
use crate::store::header::{CLEAN_MARKER_OFFSET, SUPERBLOCK_OFFSETS};
use crate::store::superblock::Superblock;
use crate::store::{BLOB_BYTES_MAX, Committed, Store, Table};
use crate::units::{PAGE_BYTES, to_usize};

impl Store {
    /// Makes `table` and `blob` the committed state and returns its generation. The caller has seen
    /// the completion of every write that `table` names. Blocks until it is durable.
    ///
    /// # Errors
    /// A failure before the flush leaves the last generation and the store usable; a failed flush or
    /// superblock is final (`Failed` from then on).
    pub fn commit(&self, table: Table, blob: &[u8]) -> Result<u64> {
        self.check()?;
        if blob.len() > BLOB_BYTES_MAX {
            return Err(Error::invalid(format!(
                "a trainer blob of {} bytes; the limit is {BLOB_BYTES_MAX}",
                blob.len()
            )));
        }
        self.make_writable()?;
        let generation = self.committed_guard().generation + 1;
        let side = usize::from(generation & 1 == 1);
        let (table_crc, blob_crc) = self.write_table_and_blob(&table, blob, side)?;
        let superblock = Superblock {
            uuid: self.header.uuid,
            generation,
            incarnation: self.incarnation,
            boot_id: self.boot_id,
            table_crc,
            blob_bytes: blob.len() as u64,
            blob_crc,
            manifest_crc: self.header.manifest_crc,
        };
        // From here on a failure leaves it unknown what the drive holds: only reopening can tell.
        self.flush().map_err(|e| self.poison(e))?;
        let page = superblock.encode();
        for offset in SUPERBLOCK_OFFSETS[side] {
            self.write_page(&page[..], offset).map_err(|e| self.poison(e))?;
        }
        *self.committed_guard() =
            Committed { generation, table: table.into(), blob: blob.into(), superblock };
        Ok(generation)
    }

    /// Gets clean marker and rejected superblock out of the way. Must be durable before the first
    /// write since the store was opened: a marker left standing would vouch for changed data, and a
    /// rejected superblock might look whole again after the next crash.
    ///
    /// # Errors
    /// A failure is final.
    pub fn make_writable(&self) -> Result {
        self.check()?;
        if self.writable.load(Ordering::Acquire) {
            return Ok(());
        }
        let nothing = [0_u8; PAGE_BYTES];
        self.write_page(&nothing, CLEAN_MARKER_OFFSET).map_err(|e| self.poison(e))?;
        let rejected = self.rejected.lock().unwrap_or_else(PoisonError::into_inner).take();
        for offset in rejected.iter().flat_map(|side| SUPERBLOCK_OFFSETS[*side]) {
            self.write_page(&nothing, offset).map_err(|e| self.poison(e))?;
        }
        self.writable.store(true, Ordering::Release);
        Ok(())
    }

    /// Says on disk that nothing was written after the last commit, so that the next open need not
    /// verify. The caller has stopped writing.
    ///
    /// # Errors
    /// `Io`; the state is safe all the same and the next open may verify it.
    pub fn mark_clean(&self) -> Result {
        self.check()?;
        if !self.writable.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let marker = self.committed_guard().superblock.clean_marker();
        self.write_page(&marker[..], CLEAN_MARKER_OFFSET)
    }

    fn write_table_and_blob(&self, table: &Table, blob: &[u8], side: usize) -> Result<(u64, u64)> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table_slot = take(&mut buffers.table)?;
        table.encode(&mut table_slot);
        let table_crc = crate::checksum::crc64(&table_slot[..to_usize(self.header.table_bytes)]);
        let mut blob_slot = take(&mut buffers.blob)?;
        blob_slot[..blob.len()].copy_from_slice(blob);
        blob_slot[blob.len()..].fill(0);
        let blob_crc = crate::checksum::crc64(blob);
        let (offset, table_result);
        (buffers.table, table_result) = {
            offset = self.header.table_offsets[side];
            self.write(offset, table_slot)
        };
        let blob_bytes = blob.len().next_multiple_of(PAGE_BYTES).max(PAGE_BYTES);
        let (front, rest) = blob_slot.split_at(blob_bytes);
        let (front, blob_result) = self.write(self.header.blob_offsets[side], front);
        buffers.blob = front.map(|front| front.join(rest));
        table_result?;
        blob_result?;
        Ok((table_crc, blob_crc))
    }

    fn write(&self, offset: u64, slot: Slot) -> (Option<Slot>, Result) {
        engine::perform(&*self.engine, Operation::Write, &self.file, offset, Some(slot))
    }

    fn flush(&self) -> Result {
        engine::perform(&*self.engine, Operation::Sync, &self.file, 0, None).1
    }

    /// Writes one page through to stable storage.
    pub(super) fn write_page(&self, page: &[u8], offset: u64) -> Result {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut slot = take(&mut buffers.page)?;
        slot.copy_from_slice(page);
        let result;
        (buffers.page, result) =
            engine::perform(&*self.engine, Operation::WriteDurable, &self.file, offset, Some(slot));
        result
    }
}

fn take(slot: &mut Option<Slot>) -> Result<Slot> {
    slot.take().ok_or_else(|| Error::invalid("the engine kept a commit buffer"))
}
