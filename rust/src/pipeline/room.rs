//! Which slots of a pool a record takes, and whether the pool has room for all that a store needs.

use super::{TensorSettings, chunk_slot_bytes};
use crate::buffer::SlotList;
use crate::error::{Error, Result};
use crate::pool::{Kind, Pool, PoolSizes, ResidentSizes};
use crate::store::Store;
use crate::units::to_usize;

/// Refuses a pool that lacks a slot which the store's records need.
pub(super) fn check(
    store: &Store,
    sizes: &PoolSizes,
    residents: &ResidentSizes,
    settings: &[TensorSettings],
) -> Result {
    let trains = sizes.block_gradients.count + sizes.outer_gradients.count > 0;
    if trains && settings.is_empty() {
        return Err(Error::invalid(
            "a pool with gradient buffers needs the settings of the tensors to train",
        ));
    }
    let room = |bytes: usize, kinds: [Kind; 2]| {
        kinds.iter().any(|kind| kind.count > 0 && bytes <= kind.bytes)
    };
    let layout = store.layout();
    for (record, chunks) in layout.records().iter().enumerate() {
        let name = &store.manifest().records[record].name;
        let weights = layout.record_weight_bytes(record);
        let stays = residents.weights[record] > 0;
        if !stays && !room(weights, [sizes.block_buffers, sizes.outer_buffers]) {
            return Err(Error::invalid(format!(
                "the pool has no buffer for the {weights} bytes of weights of {name}"
            )));
        }
        if !store.manifest().records[record].format.is_trainable() {
            continue;
        }
        let gradient = gradient_bytes(store, record);
        // A pool without gradient buffers reads only (generation).
        let reads_only = sizes.block_gradients.count == 0 && sizes.outer_gradients.count == 0;
        if !reads_only && !room(gradient, [sizes.block_gradients, sizes.outer_gradients]) {
            return Err(Error::invalid(format!(
                "the pool has no buffer for the {gradient} bytes of gradients of {name}"
            )));
        }
        let largest = chunks
            .clone()
            .filter(|c| !stays || residents.planes[*c] == 0)
            .map(|c| layout.chunks()[c])
            .map(|c| chunk_slot_bytes(c.format(), c.parameters))
            .max();
        let chunk = largest.unwrap_or(0);
        let has_slots = sizes.chunk_slots.count > 0 && sizes.chunk_slots.bytes >= chunk;
        if !reads_only && chunk > 0 && !has_slots {
            return Err(Error::invalid(format!(
                "the pool has no chunk slot of {chunk} bytes for {name}"
            )));
        }
    }
    Ok(())
}

/// The buffers that the weights of `record` are read into.
pub(super) fn weight_list<'a>(pool: &'a Pool, store: &Store, record: usize) -> &'a SlotList {
    if let Some(own) = pool.residents.weights_of(record) {
        return own;
    }
    let fits = store.layout().record_weight_bytes(record) <= pool.block_buffers.slot_bytes();
    if fits { &pool.block_buffers } else { &pool.outer_buffers }
}

/// Bytes of the fp32 gradient of `record`.
pub(super) fn gradient_bytes(store: &Store, record: usize) -> usize {
    to_usize(store.layout().record_parameters(record)) * size_of::<f32>()
}

/// The buffers that the gradient of `record` fits.
pub(super) fn gradient_list<'a>(pool: &'a Pool, store: &Store, record: usize) -> &'a SlotList {
    let fits = gradient_bytes(store, record) <= pool.block_gradients.slot_bytes();
    if fits { &pool.block_gradients } else { &pool.outer_gradients }
}
