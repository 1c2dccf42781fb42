//! What the memory of a pipeline must hold, and which list a unit's buffers come from.

use crate::error::{Error, Result};
use crate::memory::pool::{Pool, PoolSizes, ResidentSizes, kind_for};
use crate::memory::slot::SlotList;
use crate::pipeline::unit_name::{described, record_of};
use crate::pipeline::update::TensorSettings;
use crate::store::Store;
use crate::store::layout::Layout;
use crate::units::{Group, StateFormat, Unit};

/// What stays in RAM from step to step, in memory of its own. It is read once, updated in place, and
/// written when a step is committed. Units are records, or chunks with `Unit::Chunk`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Residents {
    /// Units whose weights stay.
    pub records: Vec<usize>,
    /// Chunks whose update planes stay.
    pub chunks: Vec<usize>,
    /// Units whose gradient has a buffer of its own, and waits there if it is deferred.
    pub gradients: Vec<usize>,
}

impl Residents {
    /// The bytes of each, checked against the layout of units.
    pub(super) fn sizes(&self, units: &Layout) -> Result<ResidentSizes> {
        let count = units.records().len();
        let mut sizes = ResidentSizes {
            weights: vec![0; count],
            planes: vec![0; units.chunks().len()],
            gradients: vec![0; count],
        };
        for &unit in &self.gradients {
            let Some(bytes) = sizes.gradients.get_mut(unit) else {
                let name = units.unit_name(unit);
                return Err(Error::invalid(format!("gradient of {name} of {count}")));
            };
            *bytes = gradient_bytes(units, unit);
        }
        for &unit in &self.records {
            let Some(bytes) = sizes.weights.get_mut(unit) else {
                let name = units.unit_name(unit);
                return Err(Error::invalid(format!("resident {name} of {count}")));
            };
            *bytes = units.record_weight_bytes(unit);
        }
        for &index in &self.chunks {
            let chunk = units.chunks().get(index).filter(|chunk| chunk.format().is_trainable());
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

/// Which kind of buffer a unit's weights are loaded into, if they have no memory of their own.
pub(super) fn weights_kind(sizes: &PoolSizes, units: &Layout, unit: usize) -> Option<usize> {
    kind_for(&sizes.weights, units.format(unit), units.record_weight_bytes(unit))
}

/// Which kind of buffer a unit's gradient is in, if it has no memory of its own.
fn gradient_kind(sizes: &PoolSizes, units: &Layout, unit: usize) -> Option<usize> {
    kind_for(&sizes.gradients, units.format(unit), gradient_bytes(units, unit))
}

pub(super) fn gradient_bytes(units: &Layout, unit: usize) -> usize {
    crate::units::to_usize(units.record_parameters(unit)) * size_of::<f32>()
}

/// Bytes on the drive for the gradient of a chunk.
pub(super) fn deferred_bytes(parameters: usize) -> usize {
    (parameters * size_of::<f32>()).next_multiple_of(crate::units::PAGE_BYTES)
}

/// Where the buffers for a unit's gradient come from; `None` where it gets none, as nothing of it is trained.
pub(super) fn gradient_list<'a>(
    pool: &'a Pool,
    units: &Layout,
    unit: usize,
) -> Option<&'a SlotList> {
    let own = pool.residents.gradient_of(unit);
    own.or_else(|| pool.gradients.get(gradient_kind(&pool.sizes, units, unit)?))
}

/// Checks that the pool has a buffer for whatever a step may need: a unit that gets none would wait for ever.
/// `spills` says whether gradients that have no buffer of their own wait on the drive when they are deferred.
pub(super) fn check_pool(
    store: &Store,
    units: &Layout,
    sizes: &PoolSizes,
    residents: &ResidentSizes,
    settings: &[TensorSettings],
    spills: bool,
) -> Result {
    // New weights of a deferred gradient go to the drive from a chunk slot, whatever stays: compute has theirs.
    let defers = spills || residents.gradients.iter().any(|bytes| *bytes > 0);
    let trains = sizes.gradients.iter().any(|kind| kind.slots.count > 0) || defers;
    if trains && settings.is_empty() {
        return Err(Error::invalid(
            "a pool with gradient buffers needs the settings of the tensors to train",
        ));
    }
    let of_chunks = units.unit() == Unit::Chunk;
    for (unit, chunks) in units.records().iter().enumerate() {
        let name = || described(store, units, unit);
        let weights = units.record_weight_bytes(unit);
        let stays = residents.weights[unit] > 0;
        if !stays && weights_kind(sizes, units, unit).is_none() {
            let name = name();
            return Err(Error::invalid(format!(
                "the pool has no buffer for the {weights} bytes of weights of {name}"
            )));
        }
        if !store.manifest().records[record_of(store, units, unit)].format.is_trainable() {
            continue;
        }
        let outgoing = sizes.outgoing;
        let has_outgoing = outgoing.count > 0 && outgoing.bytes >= weights;
        if of_chunks && trains && !stays && !has_outgoing {
            let name = name();
            return Err(Error::invalid(format!(
                "the pool has no buffer in which the {weights} bytes of weights of {name} come back"
            )));
        }
        let gradient = gradient_bytes(units, unit);
        // A pool without gradient buffers reads only (generation).
        let reads_only = !trains;
        let has_own = residents.gradients[unit] > 0;
        if !reads_only && !has_own && gradient_kind(sizes, units, unit).is_none() {
            let name = name();
            return Err(Error::invalid(format!(
                "the pool has no buffer for the {gradient} bytes of gradients of {name}"
            )));
        }
        let largest = chunks
            .clone()
            .filter(|c| defers || !stays || residents.planes[*c] == 0)
            .map(|c| units.chunks()[c])
            .map(|c| {
                let deferred = if spills && !has_own { deferred_bytes(c.parameters) } else { 0 };
                chunk_slot_bytes(c.format(), c.parameters) + deferred
            })
            .max();
        let chunk = largest.unwrap_or(0);
        let has_slots = sizes.chunk_slots.count > 0 && sizes.chunk_slots.bytes >= chunk;
        if !reads_only && chunk > 0 && !has_slots {
            let name = name();
            return Err(Error::invalid(format!(
                "the pool has no chunk slot of {chunk} bytes for {name}"
            )));
        }
    }
    Ok(())
}
