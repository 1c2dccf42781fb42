//! The table: for every chunk and plane group which copy is current, the generation that wrote it,
//! which planes are still zero, how often the optimizer has updated them, and the checksums. The committed
//! table is on disk; the working table is what a step changes.

use std::ops::Range;

use crate::store::fields::Reader;
use crate::store::layout::Layout;
use crate::units::{CopyId, Group};

const ENTRY_BYTES: usize = 16;

/// One chunk's plane group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Generation of the write; 0 when it was never written and all its planes are zero.
    pub generation: u64,
    /// The copy that holds it.
    pub copy: CopyId,
    /// How many planes, from the first, are on disk; the others are zero.
    pub planes: u8,
    /// Of an update group, how many updates the optimizer has made of its chunk: AdamW's t, the same in all chunks
    /// of a record. 0 in weight groups, in records that are not trained, and in stores of a format that has one t
    /// for all records ([`Store::has_own_updates`](crate::store::Store::has_own_updates)).
    pub updates: u32,
}

impl Entry {
    const EMPTY: Self = Self { generation: 0, copy: CopyId::A, planes: 0, updates: 0 };
}

/// All entries and checksums of one state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    entries: Vec<Entry>,
    sums: Vec<u32>,
}

impl Table {
    /// The table of a store in which everything is zero.
    #[must_use]
    pub fn empty(layout: &Layout) -> Self {
        Self {
            entries: vec![Entry::EMPTY; layout.entry_count()],
            sums: vec![0; layout.sum_count()],
        }
    }

    /// The entry of a chunk's plane group.
    #[must_use]
    pub fn entry(&self, layout: &Layout, chunk: usize, group: Group) -> Entry {
        self.entries[layout.entry(chunk, group)]
    }

    /// The checksums of what an entry has on disk.
    #[must_use]
    pub fn sums(&self, layout: &Layout, chunk: usize, group: Group) -> &[u32] {
        let entry = layout.entry(chunk, group);
        let planes = usize::from(self.entries[entry].planes);
        let stored = layout.chunks()[chunk].stored_bytes(group, planes);
        let all = layout.sum_range(entry);
        &self.sums[all.start..all.start + crate::store::checksum::unit_count(stored)]
    }

    /// Sets an entry and its checksums.
    pub fn set(&mut self, layout: &Layout, chunk: usize, group: Group, entry: Entry, sums: &[u32]) {
        let index = layout.entry(chunk, group);
        let start = layout.sum_range(index).start;
        self.entries[index] = entry;
        self.sums[start..start + sums.len()].copy_from_slice(sums);
    }

    /// Memory of one table, in bytes.
    #[must_use]
    pub fn memory_bytes(layout: &Layout) -> usize {
        layout.entry_count() * size_of::<Entry>() + layout.sum_count() * size_of::<u32>()
    }

    pub(super) fn encoded_bytes(layout: &Layout) -> usize {
        layout.entry_count() * ENTRY_BYTES + layout.sum_count() * 4
    }

    /// Writes the table to the start of `out`; the rest is set to zero.
    pub(super) fn encode(&self, out: &mut [u8]) {
        let (entries, rest) = out.split_at_mut(self.entries.len() * ENTRY_BYTES);
        for (entry, bytes) in self.entries.iter().zip(entries.chunks_mut(ENTRY_BYTES)) {
            bytes.fill(0);
            bytes[..8].copy_from_slice(&entry.generation.to_le_bytes());
            bytes[8] = entry.copy.index();
            bytes[9] = entry.planes;
            bytes[12..].copy_from_slice(&entry.updates.to_le_bytes());
        }
        let (sums, padding) = rest.split_at_mut(self.sums.len() * 4);
        for (sum, bytes) in self.sums.iter().zip(sums.chunks_mut(4)) {
            bytes.copy_from_slice(&sum.to_le_bytes());
        }
        padding.fill(0);
    }

    /// Reads a table of generation `generation`, whose entries may say how often they were updated if
    /// `has_updates`; `None` when an entry contradicts the layout.
    pub(super) fn decode(
        layout: &Layout,
        generation: u64,
        has_updates: bool,
        bytes: &[u8],
    ) -> Option<Self> {
        if bytes.len() < Self::encoded_bytes(layout) {
            return None;
        }
        let mut fields = Reader::new(bytes);
        let mut table = Self::empty(layout);
        let groups: Range<usize> = 0..layout.entry_count();
        for index in groups {
            let written = fields.u64();
            let [copy, planes, reserved @ ..]: [u8; 4] = fields.array();
            let updates = fields.u32();
            let number = index / Group::ALL.len();
            let chunk = &layout.chunks()[number];
            let group = Group::ALL[index % Group::ALL.len()];
            let copy = match copy {
                0 => CopyId::A,
                1 if layout.has_two_copies(number) => CopyId::B,
                _ => return None,
            };
            let known = usize::from(planes) <= chunk.format().planes(group).len();
            if !known || written > generation || (written == 0) != (planes == 0) {
                return None;
            }
            let can_be_updated = has_updates
                && group == Group::Update
                && written > 0
                && chunk.format().is_trainable();
            if reserved != [0; 2] || (updates > 0 && !can_be_updated) {
                return None;
            }
            table.entries[index] = Entry { generation: written, copy, planes, updates };
        }
        for sum in &mut table.sums {
            *sum = fields.u32();
        }
        debug_assert!(
            fields.rest().len() < crate::units::PAGE_BYTES
                || bytes.len() > Self::encoded_bytes(layout)
        );
        Some(table)
    }
}

#[cfg(test)]
mod tests;
