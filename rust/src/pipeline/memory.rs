//! What the memory of a pipeline must hold, and which list a record's buffers come from.

use crate::buffer::SlotList;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::pipeline::TensorSettings;
use crate::pool::{Pool, PoolSizes, ResidentSizes};
use crate::store::Store;
use crate::units::{Group, StateFormat};

/// What stays in RAM from step to step, in memory of its own. It is read once, updated in place, and
/// written when a step is committed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Residents {
    /// Records whose weights stay.
    pub records: Vec<usize>,
    /// Chunks whose update planes stay.
    pub chunks: Vec<usize>,
    /// Records whose gradient has a buffer of its own, and waits there if it is kept.
    pub gradients: Vec<usize>,
}

impl Residents {
    /// The bytes of each, checked against a layout.
    pub(super) fn sizes(&self, layout: &Layout) -> Result<ResidentSizes> {
        let mut sizes = ResidentSizes {
            weights: vec![0; layout.records().len()],
            planes: vec![0; layout.chunks().len()],
            gradients: vec![0; layout.records().len()],
        };
        for &record in &self.gradients {
            let Some(bytes) = sizes.gradients.get_mut(record) else {
                let count = layout.records().len();
                return Err(Error::invalid(format!("gradient of record {record} of {count}")));
            };
            *bytes = record_gradient_bytes(layout, record);
        }
        for &record in &self.records {
            let Some(bytes) = sizes.weights.get_mut(record) else {
                let count = layout.records().len();
                return Err(Error::invalid(format!("resident record {record} of {count}")));
            };
            *bytes = layout.record_weight_bytes(record);
        }
        for &index in &self.chunks {
            let chunk = layout.chunks().get(index).filter(|chunk| chunk.format().is_trainable());
            let Some(chunk) = chunk else {
                return Err(Error::invalid(format!("resident chunk {index} has no update planes")));
            };
            sizes.planes[index] = chunk.extent_bytes(Group::Update);
        }
        Ok(sizes)
    }
}

/// Bytes of a chunk slot that can hold any chunk of `format` with `parameters`.
#[must_use]
pub fn chunk_slot_bytes(format: StateFormat, parameters: usize) -> usize {
    Group::ALL
        .iter()
        .map(|group| {
            (parameters * format.group_bytes(*group)).next_multiple_of(crate::units::PAGE_BYTES)
        })
        .sum()
}

pub(super) fn weight_list<'a>(pool: &'a Pool, store: &Store, record: usize) -> &'a SlotList {
    if let Some(own) = pool.residents.weights_of(record) {
        return own;
    }
    let fits = store.layout().record_weight_bytes(record) <= pool.block_buffers.slot_bytes();
    if fits { &pool.block_buffers } else { &pool.outer_buffers }
}

pub(super) fn gradient_bytes(store: &Store, record: usize) -> usize {
    record_gradient_bytes(store.layout(), record)
}

fn record_gradient_bytes(layout: &Layout, record: usize) -> usize {
    crate::units::to_usize(layout.record_parameters(record)) * size_of::<f32>()
}

/// Bytes on the drive for the gradient of a chunk.
pub(super) fn kept_bytes(parameters: usize) -> usize {
    (parameters * size_of::<f32>()).next_multiple_of(crate::units::PAGE_BYTES)
}

pub(super) fn gradient_list<'a>(pool: &'a Pool, store: &Store, record: usize) -> &'a SlotList {
    if let Some(own) = pool.residents.gradient_of(record) {
        return own;
    }
    let fits = gradient_bytes(store, record) <= pool.block_gradients.slot_bytes();
    if fits { &pool.block_gradients } else { &pool.outer_gradients }
}

/// Checks that the pool has a buffer for whatever a step may need. `spills` says whether gradients that
/// have no buffer of their own are kept on the drive.
pub(super) fn check_pool(
    store: &Store,
    sizes: &PoolSizes,
    residents: &ResidentSizes,
    settings: &[TensorSettings],
    spills: bool,
) -> Result {
    // New weights of a kept gradient go to the drive from a chunk slot, whatever stays: compute has theirs.
    let keeps = spills || residents.gradients.iter().any(|bytes| *bytes > 0);
    let trains = sizes.block_gradients.count + sizes.outer_gradients.count > 0 || keeps;
    if trains && settings.is_empty() {
        return Err(Error::invalid(
            "a pool with gradient buffers needs the settings of the tensors to train",
        ));
    }
    let room = |bytes: usize, kinds: [crate::pool::Kind; 2]| {
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
        let reads_only = !trains;
        let has_own = residents.gradients[record] > 0;
        if !reads_only
            && !has_own
            && !room(gradient, [sizes.block_gradients, sizes.outer_gradients])
        {
            return Err(Error::invalid(format!(
                "the pool has no buffer for the {gradient} bytes of gradients of {name}"
            )));
        }
        let largest = chunks
            .clone()
            .filter(|c| keeps || !stays || residents.planes[*c] == 0)
            .map(|c| layout.chunks()[c])
            .map(|c| {
                let kept = if spills && !has_own { kept_bytes(c.parameters) } else { 0 };
                chunk_slot_bytes(c.format(), c.parameters) + kept
            })
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
