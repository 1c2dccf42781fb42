//! Reading everything back: every checksum of the committed state.

use crossbeam_channel::unbounded;

use crate::error::{Error, Result};
use crate::io::engine::{Operation, Request};
use crate::memory::slot::SlotList;
use crate::store::checksum;
use crate::store::state::{Committed, Store};
use crate::units::{Group, PAGE_BYTES};

pub(super) mod report;

pub use report::{DamagedExtent, Report};

/// Extents read ahead while one is being checked.
const READ_AHEAD: usize = 4;

impl Store {
    /// Reads every extent of the committed state and compares its checksums. `progress` is called
    /// with extents done and in all, and stops the verification by returning `false`.
    ///
    /// # Errors
    /// Only what prevents verifying; damage stands in the report.
    pub fn verify(&self, progress: &mut dyn FnMut(usize, usize) -> bool) -> Result<Report> {
        self.verify_state(&self.committed(), progress)
    }

    /// The same for a state that need not be the committed one.
    pub(super) fn verify_state(
        &self,
        state: &Committed,
        progress: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Report> {
        self.check()?;
        let table = &state.table;
        let work: Vec<(usize, Group)> = (0..self.layout.chunks().len())
            .flat_map(|chunk| Group::ALL.map(|group| (chunk, group)))
            .filter(|(chunk, group)| table.entry(&self.layout, *chunk, *group).planes > 0)
            .collect();
        let largest = work
            .iter()
            .map(|(c, g)| self.layout.chunks()[*c].extent_bytes(*g))
            .max()
            .unwrap_or(PAGE_BYTES);
        let (_region, mut lists) = SlotList::cut(&[(largest, READ_AHEAD)], &self.ledger, "verify")?;
        let slots = lists.remove(0);
        let mut report =
            Report { generation: state.generation, extents: work.len(), ..Report::default() };
        let (reply, completions) = unbounded();
        let mut next = 0;
        for done in 0..work.len() {
            while next < work.len()
                && let Some(slot) = slots.try_take()
            {
                let (chunk, group) = work[next];
                let plan = self.plan_read(table, chunk, group);
                self.engine.submit(Request {
                    operation: Operation::Read,
                    file: self.drives.file(plan.drive).clone(),
                    offset: plan.offset,
                    slot: Some(slot),
                    bytes: plan.bytes,
                    tag: next as u64,
                    reply: reply.clone(),
                });
                next += 1;
            }
            let completion =
                completions.recv().map_err(|_| Error::invalid("the engine has stopped"))?;
            let (chunk, group) = work[crate::units::to_usize(completion.tag)];
            let plan = self.plan_read(table, chunk, group);
            let mut outcome = completion.result;
            if let (Ok(()), Some(slot)) = (&outcome, &completion.slot) {
                report.bytes += plan.bytes as u64;
                if checksum::verify(&plan.binding, &slot[..plan.bytes], &plan.sums).is_err() {
                    outcome = Err(Error::invalid("read again"));
                }
            }
            match (outcome, completion.slot) {
                (Ok(()), _) => {}
                (Err(_), Some(slot)) => {
                    if let Err(error) = self.read_group(table, chunk, group, slot) {
                        // The second reading failed too: it is the one to report.
                        report.damaged.push(DamagedExtent { chunk, group, error });
                    }
                }
                // The engine itself has failed and kept the slot.
                (Err(error), None) => return Err(error),
            }
            if !progress(done + 1, work.len()) {
                return Err(Error::invalid("verification was stopped"));
            }
        }
        report.damaged.sort_by_key(|damage| (damage.chunk, damage.group.index()));
        Ok(report)
    }
}
