//! What stays in RAM from step to step: whether it was read, and what of it the last commit does not have.

use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::memory::pool::Pool;
use crate::store::layout::Layout;

/// One extent, or the weights of one unit.
#[derive(Clone, Copy, Debug, Default)]
struct Resident {
    /// Its slot holds the working state.
    is_read: bool,
    /// It was updated since the last commit, so an abort makes it stale.
    is_changed: bool,
}

/// All that stays, by unit and by chunk; entries of what does not stay are never read.
#[derive(Debug)]
pub(super) struct ResidentStates {
    weights: Vec<Resident>,
    planes: Vec<Resident>,
    /// Chunks that will have changed since the last commit, and not have been written, when all steps so
    /// far are done.
    unwritten: Vec<bool>,
}

impl ResidentStates {
    pub(super) fn new(units: &Layout) -> Self {
        Self {
            weights: vec![Resident::default(); units.records().len()],
            planes: vec![Resident::default(); units.chunks().len()],
            unwritten: vec![false; units.chunks().len()],
        }
    }

    /// Takes note of the updates of a step, of all chunks of these units.
    ///
    /// # Errors
    /// `Invalid` when it commits and leaves out a chunk that changed in RAM alone.
    pub(super) fn schedule(
        &mut self,
        updated: &BTreeSet<usize>,
        units: &Layout,
        pool: &Pool,
        commits: bool,
    ) -> Result {
        for &unit in updated {
            let own = pool.residents.weights_of(unit).is_some();
            for chunk in units.records()[unit].clone() {
                let stays = own || pool.residents.planes_of(chunk).is_some();
                self.unwritten[chunk] = stays && !commits;
            }
        }
        match self.unwritten.iter().position(|unwritten| *unwritten && commits) {
            Some(chunk) => Err(Error::invalid(format!(
                "the step is to be committed and does not update chunk {chunk}, which changed in RAM alone \
                 since the last commit"
            ))),
            None => Ok(()),
        }
    }

    pub(super) fn has_weights(&self, unit: usize) -> bool {
        self.weights[unit].is_read
    }

    pub(super) fn has_planes(&self, chunk: usize) -> bool {
        self.planes[chunk].is_read
    }

    /// The weights of `unit` are in the buffer that they were read into.
    pub(super) fn read_weights(&mut self, unit: usize, pool: &Pool) {
        self.weights[unit].is_read = pool.residents.weights_of(unit).is_some();
    }

    /// The planes of `chunk` are in the slot that they were read into.
    pub(super) fn read_planes(&mut self, chunk: usize, pool: &Pool) {
        self.planes[chunk].is_read = pool.residents.planes_of(chunk).is_some();
    }

    /// An update of `chunk` begins.
    pub(super) fn change(&mut self, unit: usize, chunk: usize) {
        self.weights[unit].is_changed = true;
        self.planes[chunk].is_changed = true;
    }

    /// Whether weights and planes of a chunk are in RAM alone: they stay, and were updated since the last commit.
    pub(super) fn are_unwritten(&self, unit: usize, chunk: usize, pool: &Pool) -> [bool; 2] {
        let kept = &pool.residents;
        [
            kept.weights_of(unit).is_some() && self.weights[unit].is_changed,
            kept.planes_of(chunk).is_some() && self.planes[chunk].is_changed,
        ]
    }

    /// What is here is what was committed.
    pub(super) fn committed(&mut self) {
        for state in self.weights.iter_mut().chain(&mut self.planes) {
            state.is_changed = false;
        }
    }

    /// What changed since is read anew.
    pub(super) fn back_to_the_last_commit(&mut self) {
        for state in self.weights.iter_mut().chain(&mut self.planes) {
            *state = Resident { is_read: state.is_read && !state.is_changed, is_changed: false };
        }
    }

    /// No step that was begun is expected to change anything any more.
    pub(super) fn forget_what_is_unwritten(&mut self) {
        self.unwritten.fill(false);
    }
}
