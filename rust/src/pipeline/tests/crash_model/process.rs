//! A process that trains: its store, and what its trainer computes with.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::calls::Call;
use super::memories::{len, value};
use crate::error::Result;
use crate::memory::slot::Slot;
use crate::pipeline::Pipeline;
use crate::pipeline::executor::Executor;
use crate::store::Store;
use crate::units::Unit;

pub(super) const NO_WAIT: Duration = Duration::ZERO;

/// A process with the store open.
pub(super) struct Process {
    pub(super) store: Arc<Store>,
    pub(super) front: Pipeline,
    pub(super) executor: Executor,
    /// The step that the store was at when it was opened, or after an abort.
    pub(super) from: u64,
    /// Steps that were durable then.
    pub(super) durable: u64,
    pub(super) step: u64,
    pub(super) calls: VecDeque<Call>,
    /// Records whose gradients wait for the next step.
    pub(super) waiting: Vec<usize>,
    /// Weights of units that the trainer computes with.
    pub(super) away: Vec<(usize, Away)>,
}

pub(super) enum Away {
    /// In the buffer that they were loaded into: whole records, and what stays in RAM.
    Here(Slot),
    There(Vec<u8>),
}

impl Process {
    /// Takes the weights of a unit for the backward pass; `false` while they are not there.
    pub(super) fn fetch(&mut self, unit: usize) -> Result<bool> {
        let front = &self.front;
        let Some(slot) = front.take_weights(unit, NO_WAIT)? else { return Ok(false) };
        let stays = front.pool().residents.weights_of(unit).is_some();
        let goes = front.units().unit() == Unit::Chunk && !stays;
        self.away.push((unit, if goes { Away::There(slot.to_vec()) } else { Away::Here(slot) }));
        Ok(true)
    }

    /// Says that a unit got no gradient.
    pub(super) fn skip(&mut self, unit: usize, updates: bool) -> Result {
        let position = self.away.iter().position(|(fetched, _)| *fetched == unit);
        let weights = match self.away.swap_remove(position.expect("fetched")).1 {
            Away::Here(slot) => Some(slot),
            Away::There(_) => None,
        };
        // Where nothing is updated now, some trainers give the buffer back by themselves.
        let weights = weights.filter(|_| updates || unit.is_multiple_of(2));
        self.front.skip(unit, weights)
    }

    /// Submits the gradient of a unit; `false` while there is no buffer for it.
    pub(super) fn train(&mut self, unit: usize, updates: bool) -> Result<bool> {
        let front = &self.front;
        let pool = front.pool();
        let list = pool.residents.gradient_of(unit).unwrap_or(&pool.gradients[0]);
        let position = self.away.iter().position(|(fetched, _)| *fetched == unit);
        let position = position.expect("fetched");
        let goes = matches!(self.away[position].1, Away::There(_));
        // Both or none: a call is tried again from its beginning.
        if list.free_count() == 0 || goes && updates && pool.outgoing.free_count() == 0 {
            return Ok(false);
        }
        let weights = match self.away.swap_remove(position).1 {
            Away::Here(slot) => Some(slot),
            Away::There(bytes) if updates => {
                let mut slot = front.take_outgoing(unit, NO_WAIT)?.expect("one was free");
                slot.copy_from_slice(&bytes);
                Some(slot)
            }
            Away::There(_) => None,
        };
        let mut buffer = front.take_gradient(unit, NO_WAIT)?.expect("one was free");
        let first = front.units().records()[unit].start;
        let chunk = &self.store.layout().chunks()[first];
        let parameters = len(front.units().record_parameters(unit));
        for (index, bytes) in buffer.chunks_exact_mut(4).take(parameters).enumerate() {
            let index = len(chunk.start) + index;
            bytes.copy_from_slice(&value(self.step, chunk.record, index).to_le_bytes());
        }
        front.submit(unit, weights, buffer)?;
        Ok(true)
    }
}
