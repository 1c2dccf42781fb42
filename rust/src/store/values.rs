//! Weights as values: from those of a model file to a store's planes at the import, and back.
//!
//! A bf16 record keeps its fp32 master in two planes of two groups: the bf16 weight, and the remainder.

use crate::error::{Error, Result};
use crate::memory::slot::Slot;
use crate::optimizer::split::{join, split};
use crate::store::create::StoreCreator;
use crate::store::state::Store;
use crate::units::{Dtype, Group, Plane, StateFormat};

#[cfg(test)]
mod tests;

/// What the values of a source are, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    /// fp32.
    F32,
    /// bf16.
    Bf16,
    /// What the record's weights are, byte by byte.
    Raw,
}

impl ValueType {
    /// Bytes of one value for a record of this format.
    #[must_use]
    pub fn bytes(self, format: StateFormat) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Raw => format.weight_bytes(),
        }
    }
}

impl StoreCreator {
    /// Writes the weights of a chunk from the values of all its parameters, padding included, through
    /// `slot`, in which each of the chunk's extents fits, and gives the slot back. Blocks.
    ///
    /// # Errors
    /// `Invalid` for a chunk that does not exist, another number of values, or a type that the record
    /// cannot take; `Io`.
    pub fn write_values(
        &mut self,
        chunk: usize,
        values: &[u8],
        of: ValueType,
        mut slot: Slot,
    ) -> Result<Slot> {
        let place = self.layout()?.chunks().get(chunk).copied();
        let place = place.ok_or_else(|| Error::invalid(format!("no chunk {chunk}")))?;
        let expected = place.parameters * of.bytes(place.format());
        if values.len() != expected {
            return Err(Error::invalid(format!(
                "chunk {chunk} takes {expected} bytes, got {}",
                values.len()
            )));
        }
        slot.fill(0);
        let weights = place.parameters * place.format().weight_bytes();
        let mut remainders: Vec<u8> = Vec::new();
        match (place.format().weight_dtype(), of) {
            (Dtype::Bf16, ValueType::F32) => {
                let halves = slot[..weights].chunks_exact_mut(2);
                for (value, weight) in values.chunks_exact(4).zip(halves) {
                    let master = f32::from_le_bytes(value.try_into().unwrap_or_default());
                    let (upper, lower) = split(master);
                    weight.copy_from_slice(&upper.to_le_bytes());
                    remainders.extend(lower.to_le_bytes());
                }
            }
            (Dtype::F32, ValueType::Bf16) => {
                let singles = slot[..weights].chunks_exact_mut(4);
                for (value, weight) in values.chunks_exact(2).zip(singles) {
                    weight[2..].copy_from_slice(value);
                }
            }
            _ if weights == values.len() => slot[..weights].copy_from_slice(values),
            _ => {
                let format = place.format().spec().name;
                return Err(Error::invalid(format!(
                    "{of:?} values for a record of format {format}"
                )));
            }
        }
        let mut slot = self.write_group(chunk, Group::Weight, 1, slot)?;
        // Remainders that are all zero (a bf16 source) are not written: the table says so.
        if remainders.iter().any(|byte| *byte != 0) {
            slot.fill(0);
            slot[..remainders.len()].copy_from_slice(&remainders);
            slot = self.write_group(chunk, Group::Update, 1, slot)?;
        }
        Ok(slot)
    }
}

impl Store {
    /// Little-endian bytes of one plane of a chunk in the committed state, by name: `weight`, `exp_avg`,
    /// `exp_avg_sq`, or `master`, the fp32 weights. Blocks.
    ///
    /// # Errors
    /// `Invalid` for a chunk or a plane that does not exist; `Corrupt`, `Io`, `Failed`.
    pub fn read_plane(&self, chunk: usize, plane: &str) -> Result<Vec<u8>> {
        let place = self.layout().chunks().get(chunk).copied();
        let place = place.ok_or_else(|| Error::invalid(format!("no chunk {chunk}")))?;
        let table = self.committed().table;
        let read = |group: Group| {
            let bytes = place.extent_bytes(group).max(1);
            let slot = Slot::standalone(bytes, self.ledger(), "read")?;
            self.read_group(&table, chunk, group, slot)
        };
        let weight_bytes = place.parameters * place.format().weight_bytes();
        let place_of = |name: &str| {
            let specs = place.format().planes(Group::Update);
            let index = specs.iter().position(|spec| spec.plane.name() == name);
            let range =
                index.and_then(|index| place.plane_ranges(Group::Update).get(index).cloned());
            range.ok_or_else(|| Error::invalid(format!("chunk {chunk} has no plane {plane:?}")))
        };
        match (plane, place.format().weight_dtype()) {
            ("weight", _) | ("master", Dtype::F32) => {
                Ok(read(Group::Weight)?[..weight_bytes].to_vec())
            }
            ("master", Dtype::Bf16) => {
                let remainder = place_of(Plane::Remainder.name())?;
                let (weights, planes) = (read(Group::Weight)?, read(Group::Update)?);
                let remainders = planes[remainder].chunks_exact(2);
                let halves = weights[..weight_bytes].chunks_exact(2).zip(remainders);
                let half = |bytes: &[u8]| u16::from_le_bytes(bytes.try_into().unwrap_or_default());
                Ok(halves
                    .flat_map(|(w, r)| join(half(w), half(r).cast_signed()).to_le_bytes())
                    .collect())
            }
            _ => {
                let range = place_of(plane)?;
                Ok(read(Group::Update)?[range].to_vec())
            }
        }
    }
}
