//! The squares of a step's gradients, in one order whatever order they come in and however they are cut.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::store::layout::Layout;

/// What has come so far. The sums of the runs of one record are added in order, and then the records.
#[derive(Debug, Default)]
pub(super) struct Squares {
    /// Sums of records.
    records: BTreeMap<usize, f64>,
    /// The runs of records of which a part is missing, by record and first chunk.
    parts: BTreeMap<(usize, usize), (usize, Vec<f64>)>,
    /// Number of gradients that have come.
    pub(super) units: usize,
}

impl Squares {
    /// Adds the runs of some chunks of a record. `layout` has whole records.
    pub(super) fn add(&mut self, layout: &Layout, chunks: Range<usize>, runs: Vec<f64>) {
        let record = layout.chunks()[chunks.start].record;
        self.parts.insert((record, chunks.start), (chunks.len(), runs));
        self.units += 1;
        let parts = self.parts.range((record, 0)..(record + 1, 0));
        let chunks: usize = parts.map(|(_, (chunks, _))| chunks).sum();
        if chunks == layout.records()[record].len() {
            self.fold(record);
        }
    }

    /// The sum of all. Of a record of which only some chunks have a gradient it has theirs.
    pub(super) fn sum(&mut self) -> f64 {
        while let Some((&(record, _), _)) = self.parts.first_key_value() {
            self.fold(record);
        }
        self.records.values().sum()
    }

    fn fold(&mut self, record: usize) {
        let mut runs = self.parts.split_off(&(record, 0));
        self.parts.append(&mut runs.split_off(&(record + 1, 0)));
        self.records.insert(record, runs.values().flat_map(|(_, runs)| runs).sum());
    }
}

#[cfg(test)]
mod tests;
