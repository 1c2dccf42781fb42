//! Units and records: whose unit it is, and what it is called by people.

use crate::store::Store;
use crate::store::layout::Layout;
use crate::units::Unit;

/// Index of the record that a unit is, or is a chunk of.
pub(super) fn record_of(store: &Store, units: &Layout, unit: usize) -> usize {
    if units.unit() == Unit::Chunk { store.layout().chunks()[unit].record } else { unit }
}

/// What a unit is called by people: its record, or which chunk of that.
pub(super) fn described(store: &Store, units: &Layout, unit: usize) -> String {
    let record = record_of(store, units, unit);
    let name = &store.manifest().records[record].name;
    if units.unit() == Unit::Chunk {
        format!("chunk {} of {name}", unit - store.layout().records()[record].start)
    } else {
        name.clone()
    }
}
