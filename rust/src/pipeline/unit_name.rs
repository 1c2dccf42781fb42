//! Units and records: whose unit it is, and what it is called by people.

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
