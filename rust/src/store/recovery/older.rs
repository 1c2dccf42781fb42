//! Going back by hand: the newest state was acknowledged, so no open gives it up unless a stop may have
//! cost it. Where its bytes are damaged and the state before it is whole, a person may.

use std::sync::PoisonError;

use crate::error::{Error, Result};
use crate::store::header::SUPERBLOCK_OFFSETS;
use crate::store::recovery::{Place, both_damaged, read_state, read_superblock};
use crate::store::state::{Committed, Store};
use crate::store::verify::report::Report;

/// The state before the committed one, and what reading it back found.
#[derive(Clone, Debug)]
pub struct OlderState {
    /// What reading it back found.
    pub report: Report,
    /// The trainer's own state, committed with it.
    pub blob: Vec<u8>,
}

impl Store {
    /// Reads back the state before the committed one. `None` when there is none any more: its table was
    /// overwritten by a commit that did not end, this handle has written, or durability is scratch.
    ///
    /// # Errors
    /// As `verify`.
    pub fn verify_older(
        &self,
        progress: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Option<OlderState>> {
        let Some(older) = self.older()? else { return Ok(None) };
        let report = self.verify_state(&older, progress)?;
        Ok(Some(OlderState { report, blob: older.blob.to_vec() }))
    }

    /// Gives the committed state up, durably, if it is damaged and the one before it is whole; the store
    /// is clean then, and is to be closed. Returns the generation that it went back to; `None` when the
    /// committed state is whole, and nothing was changed.
    ///
    /// # Errors
    /// `Format` when there is none to go back to or that is damaged too: nothing was changed. Also as `verify`.
    pub fn go_back(&self, progress: &mut dyn FnMut(usize, usize) -> bool) -> Result<Option<u64>> {
        let newest = self.verify(progress)?;
        let generation = newest.generation;
        if newest.damaged.is_empty() {
            return Ok(None);
        }
        let Some(older) = self.older()? else {
            let reason = format!(
                "generation {generation} is damaged, and the one before it is not there any more. Nothing was changed. \
                 Restore an export or import the model again"
            );
            return Err(Error::format(self.drives.path(), reason));
        };
        let report = self.verify_state(&older, progress)?;
        if !report.damaged.is_empty() {
            return Err(both_damaged(self, older.generation, &newest, &report));
        }
        *self.rejected.lock().unwrap_or_else(PoisonError::into_inner) = Some(side_of(generation));
        let generation = older.generation;
        *self.committed_guard() = older;
        self.run(self.start_writing()?)?;
        self.mark_clean()?;
        Ok(Some(generation))
    }

    /// Superblock, table and blob of the state before the committed one, if they hold.
    fn older(&self) -> Result<Option<Committed>> {
        let generation = self.committed_guard().generation;
        let rejected = *self.rejected.lock().unwrap_or_else(PoisonError::into_inner);
        let side = 1 - side_of(generation);
        if self.is_scratch() || self.is_writable() || rejected == Some(side) {
            return Ok(None);
        }
        let Self { engine, drives, header, layout, .. } = self;
        let place = Place { engine: &**engine, file: drives.main(), header, layout };
        let found = read_superblock(&place, side)?.filter(|older| older.generation < generation);
        found.map_or(Ok(None), |superblock| read_state(&place, superblock, side))
    }
}

fn side_of(generation: u64) -> usize {
    let side = usize::from(generation & 1 == 1);
    debug_assert!(side < SUPERBLOCK_OFFSETS.len(), "there are two");
    side
}

#[cfg(test)]
mod tests;
