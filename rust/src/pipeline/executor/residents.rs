//! What stays in RAM from step to step: whether it was read, and what of it the last commit does not have.

use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::memory::pool::Pool;
use crate::store::layout::Layout;

/// One extent, or the weights of one piece.
#[derive(Clone, Copy, Debug, Default)]
struct Resident {
    /// Its slot holds the working state.
    is_read: bool,
    /// It was updated since the last commit, so an abort makes it stale.
    is_changed: bool,
}

/// All that stays, by piece and by chunk; entries of what does not stay are never read.
#[derive(Debug)]
pub(super) struct ResidentStates {
    weights: Vec<Resident>,
    planes: Vec<Resident>,
    /// Chunks that will have changed since the last commit, and not have been written, when all steps so
    /// far are done.
    unwritten: Vec<bool>,
}

impl ResidentStates {
    pub(super) fn new(pieces: &Layout) -> Self {
        Self {
            weights: vec![Resident::default(); pieces.records().len()],
            planes: vec![Resident::default(); pieces.chunks().len()],
            unwritten: vec![false; pieces.chunks().len()],
        }
    }

    /// Takes note of the updates of a step, of all chunks of these pieces.
    ///
    /// # Errors
    /// `Invalid` when it commits and leaves out a chunk that changed in RAM alone.
    pub(super) fn schedule(
        &mut self,
        updated: &BTreeSet<usize>,
        pieces: &Layout,
        pool: &Pool,
        commits: bool,
    ) -> Result {
        for &piece in updated {
            let own = pool.residents.weights_of(piece).is_some();
            for chunk in pieces.records()[piece].clone() {
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

    pub(super) fn has_weights(&self, piece: usize) -> bool {
        self.weights[piece].is_read
    }

    pub(super) fn has_planes(&self, chunk: usize) -> bool {
        self.planes[chunk].is_read
    }

    /// The weights of `piece` are in the buffer that they were read into.
    pub(super) fn read_weights(&mut self, piece: usize, pool: &Pool) {
        self.weights[piece].is_read = pool.residents.weights_of(piece).is_some();
    }

    /// The planes of `chunk` are in the slot that they were read into.
    pub(super) fn read_planes(&mut self, chunk: usize, pool: &Pool) {
        self.planes[chunk].is_read = pool.residents.planes_of(chunk).is_some();
    }

    /// An update of `chunk` begins.
    pub(super) fn change(&mut self, piece: usize, chunk: usize) {
        self.weights[piece].is_changed = true;
        self.planes[chunk].is_changed = true;
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
