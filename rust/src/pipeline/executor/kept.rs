//! Gradients that wait for the norm of all: to the drive, and back for the update.

use std::sync::Arc;

use super::{Executor, Part, Pending, Source, Work};
use crate::error::{Error, Result};
use crate::io::engine::Operation;
use crate::memory::slot::{Slot, SlotList};
use crate::pipeline::memory::kept_bytes;
use crate::store::checksum;

impl Executor {
    /// Whether the gradient of a piece waits on the drive when it is kept.
    pub(super) fn is_kept_on_drive(&self, piece: usize) -> bool {
        self.kept.holds(self.pieces.records()[piece].start)
    }

    /// Its chunks will be written: whoever wants to read them waits.
    pub(super) fn expect_kept(&mut self, piece: usize) {
        for chunk in self.pieces.records()[piece].clone() {
            self.kept.expect(chunk);
        }
    }

    /// Starts writing gradients that are to be kept, each when the last write to its place has landed.
    pub(super) fn start_keeping(&mut self) {
        let pieces = Arc::clone(&self.pieces);
        while let Some(&(step, piece, _)) = self.keeping.front() {
            let chunks = pieces.records()[piece].clone();
            if chunks.clone().any(|chunk| self.kept.is_in_flight(chunk)) {
                return;
            }
            let Some((_, _, mut rest)) = self.keeping.pop_front() else { return };
            for chunk in chunks {
                let bytes = kept_bytes(pieces.chunks()[chunk].parameters);
                let next = rest.split_off(bytes);
                let part = std::mem::replace(&mut rest, next);
                let binding = self.kept.binding(chunk, step);
                let sums = self.workers.install(|| checksum::sums(&binding, &part));
                self.kept.starts(chunk, sums);
                match self.kept.place(chunk) {
                    Ok((file, offset)) => {
                        let (operation, again, work) =
                            (Operation::Write, false, Work::Keep { chunk });
                        let pending = Pending { operation, file, offset, bytes, again, work };
                        self.submit(pending, Some(part));
                    }
                    Err(error) => return self.fail(error),
                }
            }
        }
    }

    /// Reads the kept gradient of a chunk into the front of `slot`.
    pub(super) fn read_kept(&mut self, chunk: usize, step: u64, slot: Slot) {
        let bytes = kept_bytes(self.pieces.chunks()[chunk].parameters);
        let slot = slot.split_at(bytes).0;
        match self.kept.place(chunk) {
            Ok((file, offset)) => {
                let (operation, again) = (Operation::Read, false);
                let work = Work::Gradient { chunk, step };
                self.submit(Pending { operation, file, offset, bytes, again, work }, Some(slot));
            }
            Err(error) => self.fail(error),
        }
    }

    /// A kept gradient has been read and verified.
    pub(super) fn kept_read(&mut self, chunk: usize, slot: Slot) {
        let update = self.updates.iter_mut().find(|update| update.chunk == chunk && update.applies);
        if let Some(update) = update {
            update.gradient = Part::Here(slot);
        }
    }

    /// Weights of a load: to the caller, or first to the update with the gradient that was kept.
    pub(super) fn deliver(&mut self, piece: usize, number: u64, applies: bool, weights: Slot) {
        if !applies {
            return self.hand_over(number, weights);
        }
        match self.source_of_kept(piece, number, weights) {
            Ok(source) => {
                self.sources[piece] = Some(source);
                self.on_their_way += 1;
            }
            Err(error) => self.fail(error),
        }
        // No completion may tell of it: residents are here at once.
        self.ended_in_ram = true;
    }

    fn source_of_kept(&self, piece: usize, number: u64, weights: Slot) -> Result<Source> {
        let gradient = match self.is_kept_on_drive(piece) {
            true => None,
            false => {
                let own = self.pool.residents.gradient_of(piece).and_then(SlotList::try_take);
                let missing = || {
                    let name = self.pieces.piece_name(piece);
                    Error::invalid(format!("the gradient of {name} was not kept, or is lent"))
                };
                Some(own.ok_or_else(missing)?)
            }
        };
        let weights = self.cut_at_chunks(piece, weights);
        let chunks_left = weights.len();
        Ok(Source { weights, gradient, chunks_left, hand_over: Some(number), kept_by: None })
    }
}
