//! Where a plane group is read and written: the copy rule, and what its checksums are bound to.

use crate::error::{Error, Result};
use crate::io::engine::{self, Operation};
use crate::memory::slot::Slot;
use crate::store::checksum::{self, Binding};
use crate::store::state::Store;
use crate::store::table::{Entry, Table};
use crate::units::{CopyId, Group};

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
    /// last commit, else to the copy that the committed table does not name. What the entry says of updates stays as it
    /// was: who makes one counts it.
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
            entry: Entry { generation: next, copy, planes, updates: old.updates },
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

    fn binding(&self, chunk: usize, group: Group, generation: u64) -> Binding {
        let chunk = u32::try_from(chunk).unwrap_or(u32::MAX);
        Binding { store: self.header.uuid, chunk, group, generation }
    }
}
