//! The working state: where each chunk's newest planes lie, how often they were updated, which updates have been
//! written, and what is in RAM. It goes on from the last commit, and back to it.

use crate::error::Result;
use crate::pipeline::executor::residents::ResidentStates;
use crate::store::layout::Layout;
use crate::store::{Entry, ReadPlan, Sequence, Store, Table, WritePlan};
use crate::units::Group;

pub(super) struct WorkingState {
    table: Table,
    /// Per chunk: how often the optimizer has updated it, also in RAM alone. Stays 0 in a store that has one number for
    /// all records.
    updates: Vec<u32>,
    /// Per chunk: updates that were scheduled, and updates that are on disk, or in RAM to stay.
    scheduled: Vec<u64>,
    written: Vec<u64>,
    /// Whether extents were written since the last commit.
    is_touched: bool,
    pub(super) residents: ResidentStates,
}

impl WorkingState {
    pub(super) fn new(store: &Store, units: &Layout) -> Self {
        let chunks = units.chunks().len();
        Self {
            table: Table::clone(&store.committed().table),
            updates: store.updates().unwrap_or_else(|| vec![0; chunks]),
            scheduled: vec![0; chunks],
            written: vec![0; chunks],
            is_touched: false,
            residents: ResidentStates::new(units),
        }
    }

    /// How many updates of a chunk what is scheduled next needs to be written.
    pub(super) fn scheduled(&self, chunk: usize) -> u64 {
        self.scheduled[chunk]
    }

    pub(super) fn schedule_update(&mut self, chunk: usize) {
        self.scheduled[chunk] += 1;
    }

    /// Whether so many updates of a chunk are written.
    pub(super) fn has_written(&self, chunk: usize, updates: u64) -> bool {
        self.written[chunk] >= updates
    }

    pub(super) fn plan_read(&self, store: &Store, chunk: usize, group: Group) -> ReadPlan {
        store.plan_read(&self.table, chunk, group)
    }

    pub(super) fn plan_write(
        &self,
        store: &Store,
        chunk: usize,
        group: Group,
        planes: usize,
    ) -> Result<WritePlan> {
        store.plan_write(&self.table, chunk, group, planes)
    }

    /// How often the optimizer has updated a chunk.
    pub(super) fn updates(&self, chunk: usize) -> u32 {
        self.updates[chunk]
    }

    /// A write begins: from here on the drives hold more than the last commit.
    pub(super) fn touch(&mut self) {
        self.is_touched = true;
    }

    pub(super) fn is_touched(&self) -> bool {
        self.is_touched
    }

    /// An update of a chunk is written, with these entries; after it the chunk was updated so often.
    pub(super) fn updated(
        &mut self,
        layout: &Layout,
        chunk: usize,
        written: &[(Group, Entry, Vec<u32>)],
        updates: u32,
    ) {
        self.updates[chunk] = updates;
        for (group, entry, sums) in written {
            self.table.set(layout, chunk, *group, *entry, sums);
        }
        self.written[chunk] += 1;
    }

    pub(super) fn start_commit(&mut self, store: &Store, blob: &[u8]) -> Result<Sequence> {
        let sequence = store.start_commit(self.table.clone(), blob)?;
        self.is_touched = false;
        Ok(sequence)
    }

    /// Goes back to the last commit; updates that were written since are still counted.
    pub(super) fn back_to_the_last_commit(&mut self, store: &Store) {
        self.table = Table::clone(&store.committed().table);
        self.updates = store.updates().unwrap_or_else(|| vec![0; self.updates.len()]);
        self.residents.back_to_the_last_commit();
    }

    /// The same when nothing is in flight any more, and nothing scheduled.
    pub(super) fn start_anew(&mut self, store: &Store) {
        self.back_to_the_last_commit(store);
        self.residents.forget_what_is_unwritten();
        self.scheduled.fill(0);
        self.written.fill(0);
        self.is_touched = false;
    }
}
