//! Where everything is: the parameter space, its chunks and their extents; follows from the manifest
//! alone. Pure; no I/O.

use std::ops::Range;
use std::sync::Arc;

pub use crate::store::manifest::{Content, Durability, Manifest, Record, Tensor};
use crate::units::{
    CopyId, Group, HUGE_PAGE_BYTES, PAGE_BYTES, PlaneSpec, StateFormat, Unit, round_up,
};

/// A fixed number of consecutive parameters of one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Index of the record.
    pub record: usize,
    /// First parameter, counted from the record's start.
    pub start: u64,
    /// Number of parameters; fewer in a record's last chunk.
    pub parameters: usize,
    /// Which drive all of it lies on.
    pub drive: usize,
    format: StateFormat,
    is_rewritable: bool,
    /// Offsets of the two plane groups from the start of the copy's area on that drive.
    offsets: [u64; 2],
}

impl Chunk {
    /// How its state is stored.
    #[must_use]
    pub fn format(&self) -> StateFormat {
        self.format
    }

    /// Whether it can be written again after the first commit, and so has two copies where a step is
    /// to survive a crash: trained, or a tensor of a store of tensors.
    #[must_use]
    pub fn is_rewritable(&self) -> bool {
        self.is_rewritable
    }

    /// Bytes of one group's extent: rounded up to 4 KiB.
    #[must_use]
    pub fn extent_bytes(&self, group: Group) -> usize {
        (self.parameters * self.format.group_bytes(group)).next_multiple_of(PAGE_BYTES)
    }

    /// Bytes of the first `planes` planes of a group: what lies on disk when the rest is still zero.
    #[must_use]
    pub fn stored_bytes(&self, group: Group, planes: usize) -> usize {
        let bytes: usize =
            self.format.planes(group).iter().take(planes).map(PlaneSpec::bytes).sum();
        (self.parameters * bytes).next_multiple_of(PAGE_BYTES)
    }

    /// Byte ranges of a group's planes within its extent.
    #[must_use]
    pub fn plane_ranges(&self, group: Group) -> Vec<Range<usize>> {
        let mut start = 0;
        let mut range = |bytes: usize| {
            let end = start + self.parameters * bytes;
            std::mem::replace(&mut start, end)..end
        };
        self.format.planes(group).iter().map(|plane| range(plane.bytes())).collect()
    }
}

/// The areas of one drive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Areas {
    /// Bytes of one copy of the chunks that can be written again.
    copy_bytes: u64,
    /// Bytes of the chunks of the others.
    single_bytes: u64,
}

/// All chunks and their places; computed from the manifest alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    chunks: Vec<Chunk>,
    records: Vec<Range<usize>>,
    parameters: Vec<u64>,
    /// How many copies there are of records that can be written again.
    copies: u64,
    drives: Vec<Areas>,
    table_start: Arc<[usize]>,
    unit: Unit,
}

impl Layout {
    /// The layout of a valid manifest.
    ///
    /// # Errors
    /// `Manifest::validate`'s, or that the store would be too large to address.
    pub fn new(manifest: &Manifest) -> Result<Self, String> {
        manifest.validate()?;
        let mut chunks = Vec::new();
        let mut records = Vec::new();
        let mut drives = vec![Areas::default(); manifest.drives];
        for (index, record) in manifest.records.iter().enumerate() {
            let is_rewritable =
                record.format.is_trainable() || manifest.content == Content::Tensors;
            let first = chunks.len();
            let mut start = 0;
            while start < record.parameters {
                let length = manifest.chunk_parameters.min(record.parameters - start);
                let parameters = usize::try_from(length).map_err(|e| e.to_string())?;
                chunks.push(Chunk {
                    record: index,
                    start,
                    parameters,
                    // In turn, so that all drives work on each block.
                    drive: chunks.len() % manifest.drives,
                    format: record.format,
                    is_rewritable,
                    offsets: [0; 2],
                });
                start += length;
            }
            // A block's weights lie in one run on each drive: forward and backward read nothing else of it.
            for group in Group::ALL {
                for chunk in &mut chunks[first..] {
                    let areas = &mut drives[chunk.drive];
                    let area = match is_rewritable {
                        true => &mut areas.copy_bytes,
                        false => &mut areas.single_bytes,
                    };
                    chunk.offsets[usize::from(group.index())] = *area;
                    *area += chunk.extent_bytes(group) as u64;
                }
            }
            records.push(first..chunks.len());
        }
        let mut table_start = vec![0];
        for chunk in &chunks {
            for group in Group::ALL {
                let last = table_start.last().copied().unwrap_or(0);
                table_start
                    .push(last + crate::store::checksum::unit_count(chunk.extent_bytes(group)));
            }
        }
        let huge = HUGE_PAGE_BYTES as u64;
        for areas in &mut drives {
            areas.copy_bytes = round_up(areas.copy_bytes, huge).ok_or("the store is too large")?;
        }
        let parameters = manifest.records.iter().map(|r| r.parameters).collect();
        let copies = match manifest.durability {
            Durability::Step => 2,
            Durability::Scratch => 1,
        };
        let (table_start, unit) = (table_start.into(), Unit::Record);
        Ok(Self { chunks, records, parameters, copies, drives, table_start, unit })
    }

    /// The same chunks in the same places, each as a record of its own: for who moves them one by one.
    #[must_use]
    pub fn chunks_as_records(&self) -> Self {
        let own = |(index, chunk): (usize, &Chunk)| Chunk { record: index, start: 0, ..*chunk };
        Self {
            chunks: self.chunks.iter().enumerate().map(own).collect(),
            records: (0..self.chunks.len()).map(|chunk| chunk..chunk + 1).collect(),
            parameters: self.chunks.iter().map(|chunk| chunk.parameters as u64).collect(),
            unit: Unit::Chunk,
            ..self.clone()
        }
    }

    /// What its records are.
    #[must_use]
    pub fn unit(&self) -> Unit {
        self.unit
    }

    /// What a record of this layout is called in a message: `record 3`, or `chunk 3`.
    #[must_use]
    pub fn unit_name(&self, unit: usize) -> String {
        format!("{} {unit}", self.unit.name())
    }

    /// All chunks, in the order of the parameter space.
    #[must_use]
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Indices of the chunks of each record.
    #[must_use]
    pub fn records(&self) -> &[Range<usize>] {
        &self.records
    }

    /// Parameters of a record, padding included.
    #[must_use]
    pub fn record_parameters(&self, record: usize) -> u64 {
        self.parameters[record]
    }

    /// Bytes of a record's weights in a block buffer (the last chunk's extent is rounded up).
    #[must_use]
    pub fn record_weight_bytes(&self, record: usize) -> usize {
        self.chunks[self.records[record].clone()]
            .iter()
            .map(|c| c.extent_bytes(Group::Weight))
            .sum()
    }

    /// Number of drives.
    #[must_use]
    pub fn drives(&self) -> usize {
        self.drives.len()
    }

    /// Bytes of a drive's data area: copies A and B, then the single copies of records that never change.
    #[must_use]
    pub fn data_bytes(&self, drive: usize) -> u64 {
        self.copies * self.drives[drive].copy_bytes + self.drives[drive].single_bytes
    }

    /// Whether a chunk has a copy B.
    #[must_use]
    pub fn has_two_copies(&self, chunk: usize) -> bool {
        self.copies == 2 && self.chunks[chunk].is_rewritable
    }

    /// Offset of an extent from the start of the data area of the chunk's drive.
    #[must_use]
    pub fn extent_offset(&self, chunk: usize, group: Group, copy: CopyId) -> u64 {
        let chunk = &self.chunks[chunk];
        let copy_bytes = self.drives[chunk.drive].copy_bytes;
        let area = match (chunk.is_rewritable, copy) {
            (true, CopyId::A) => 0,
            (true, CopyId::B) => copy_bytes,
            (false, _) => self.copies * copy_bytes,
        };
        area + chunk.offsets[usize::from(group.index())]
    }

    /// Position of a chunk's plane group in tables.
    #[must_use]
    pub fn entry(&self, chunk: usize, group: Group) -> usize {
        chunk * Group::ALL.len() + usize::from(group.index())
    }

    /// Number of table entries.
    #[must_use]
    pub fn entry_count(&self) -> usize {
        self.chunks.len() * Group::ALL.len()
    }

    /// Positions of an entry's checksums among all checksums of a table.
    #[must_use]
    pub fn sum_range(&self, entry: usize) -> Range<usize> {
        self.table_start[entry]..self.table_start[entry + 1]
    }

    /// Number of checksums of a table.
    #[must_use]
    pub fn sum_count(&self) -> usize {
        self.table_start.last().copied().unwrap_or(0)
    }
}

#[cfg(test)]
pub(crate) mod tests;
