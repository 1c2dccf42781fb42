//! What one buffer holds: a whole record, or a chunk of one.

use std::sync::Arc;

use super::{Command, Pipeline};
use crate::error::{Error, Result};
use crate::memory::slot::Slot;
use crate::pipeline::memory::gradient_bytes;
use crate::store::Store;
use crate::store::layout::Layout;

/// Index of the record that a piece is, or is a chunk of.
pub(super) fn record_of(store: &Store, pieces: &Layout, piece: usize) -> usize {
    if pieces.is_by_chunk() { store.layout().chunks()[piece].record } else { piece }
}

/// What a piece is called by people: its record, or which chunk of that.
pub(super) fn described(store: &Store, pieces: &Layout, piece: usize) -> String {
    let record = record_of(store, pieces, piece);
    let name = &store.manifest().records[record].name;
    if pieces.is_by_chunk() {
        format!("chunk {} of {name}", piece - store.layout().records()[record].start)
    } else {
        name.clone()
    }
}

impl Pipeline {
    /// Hands the gradient of a whole piece over, with the weights it was computed from. The update
    /// runs behind the caller's back; both buffers return to the pool when it is done. Where the step only
    /// keeps the gradient, weights may be left out; where they stay in RAM, they are in their own buffer.
    ///
    /// # Errors
    /// `Invalid` when a buffer is too small, missing, or not the piece's own; the pipeline's failure.
    pub fn submit(&self, piece: usize, weights: Option<Slot>, gradient: Slot) -> Result {
        self.store.check()?;
        self.check_piece(piece)?;
        let needed = (self.pieces.record_weight_bytes(piece), gradient_bytes(&self.pieces, piece));
        let given = (weights.as_ref().map_or(needed.0, |slot| slot.len()), gradient.len());
        let name = || self.pieces.piece_name(piece);
        if given.0 < needed.0 || given.1 < needed.1 {
            let name = name();
            return Err(Error::invalid(format!(
                "{name} takes buffers of {needed:?} bytes, got {given:?}"
            )));
        }
        if self.shared.lock().updates.contains(&piece) {
            let own = self.pool.residents.weights_of(piece);
            match &weights {
                None => {
                    let name = name();
                    return Err(Error::invalid(format!(
                        "the step updates {name}: its gradient is submitted with the weights"
                    )));
                }
                Some(slot) if own.is_some_and(|own| !own.owns(slot)) => {
                    let name = name();
                    return Err(Error::invalid(format!(
                        "the weights of {name} stay in RAM: submit the buffer that take_weights gave"
                    )));
                }
                Some(_) => {}
            }
        }
        self.send(Command::Submit { piece, weights, gradient })
    }

    /// The store's layout by what one buffer holds: records, or chunks.
    #[must_use]
    pub fn pieces(&self) -> &Arc<Layout> {
        &self.pieces
    }

    /// What a piece is called by people.
    ///
    /// # Errors
    /// `Invalid` when there is no such piece.
    pub fn describe(&self, piece: usize) -> Result<String> {
        self.check_piece(piece)?;
        Ok(described(&self.store, &self.pieces, piece))
    }

    pub(super) fn can_keep(&self, piece: usize) -> bool {
        self.pool.residents.gradient_of(piece).is_some() || self.can_spill
    }

    pub(super) fn check_piece(&self, piece: usize) -> Result {
        let count = self.pieces.records().len();
        if piece < count {
            return Ok(());
        }
        let name = self.pieces.piece_name(piece);
        Err(Error::invalid(format!("{name} does not exist; the store has {count}")))
    }

    /// What pieces are.
    pub(super) fn kind(&self) -> &'static str {
        if self.pieces.is_by_chunk() { "chunks" } else { "records" }
    }
}
