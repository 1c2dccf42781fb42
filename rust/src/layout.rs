//! Where everything is: the parameter space, its chunks, their extents, and the manifest that says
//! which tensors they are. Pure; no I/O.

use std::ops::Range;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::units::{
    CopyId, Group, HUGE_PAGE_BYTES, PAGE_BYTES, StateFormat, TENSOR_ALIGNMENT, round_up,
};

/// A manifest is at most this long, in bytes.
pub const MANIFEST_BYTES_MAX: usize = 64 << 20;
/// So is the model's configuration in it: a value takes up to a hundred times its text in memory.
const MODEL_BYTES_MAX: usize = 1 << 20;
const TENSORS_MAX: usize = 1 << 20;
const NAME_BYTES_MAX: usize = 512;
/// Memory for chunks and tables stays below 200 MiB.
const CHUNKS_MAX: u64 = 1 << 20;
const DIMENSIONS_MAX: usize = 8;
/// 2^44 parameters: any sum of a few products of counts and byte sizes stays far below 2^63.
const PARAMETERS_MAX: u64 = 1 << 44;

/// What a store holds, as written into it at creation; it never changes afterwards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Consecutive parameters of one chunk; a multiple of 4096.
    pub chunk_parameters: u64,
    /// The records, in the order of the parameter space.
    pub records: Vec<Record>,
    /// The tensors, by record and offset.
    pub tensors: Vec<Tensor>,
    /// The model's own configuration, as it was imported; not interpreted here.
    #[serde(deserialize_with = "small_value")]
    pub model: serde_json::Value,
}

/// A value of at most [`MODEL_BYTES_MAX`], which is told before any of it is built.
fn small_value<'de, D: Deserializer<'de>>(input: D) -> Result<serde_json::Value, D::Error> {
    let text = <&RawValue>::deserialize(input)?.get();
    if text.len() > MODEL_BYTES_MAX {
        return Err(D::Error::custom(format!(
            "the model's configuration has {} bytes, the limit is {MODEL_BYTES_MAX}",
            text.len()
        )));
    }
    serde_json::from_str(text).map_err(D::Error::custom)
}

/// Consecutive chunks of one block that share a state format.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Name of the block, for messages.
    pub name: String,
    /// How its state is stored.
    pub format: StateFormat,
    /// Length in the parameter space, padding between tensors included; a multiple of 128.
    pub parameters: u64,
}

/// One tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tensor {
    /// The model's own name for it.
    pub name: String,
    /// Index of its record.
    pub record: usize,
    /// First parameter, counted from the record's start; a multiple of 128.
    pub offset: u64,
    /// Shape.
    pub shape: Vec<u64>,
}

impl Tensor {
    /// Number of elements; `None` on overflow.
    #[must_use]
    pub fn elements(&self) -> Option<u64> {
        self.shape.iter().try_fold(1_u64, |product, size| product.checked_mul(*size))
    }
}

impl Manifest {
    /// Reads and checks a manifest that anyone may have written.
    ///
    /// # Errors
    /// What is wrong with it, in one sentence.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(format!(
                "the manifest has {} bytes, the limit is {MANIFEST_BYTES_MAX}",
                bytes.len()
            ));
        }
        let manifest: Self =
            serde_json::from_slice(bytes).map_err(|e| format!("the manifest is not valid: {e}"))?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// Checks every rule that the rest of the crate relies on.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), String> {
        if self.chunk_parameters == 0
            || !self.chunk_parameters.is_multiple_of(4096)
            || self.chunk_parameters > 1 << 28
        {
            return Err(format!(
                "chunk_parameters is {}: it must be a multiple of 4096, at most 2^28",
                self.chunk_parameters
            ));
        }
        if self.tensors.len() > TENSORS_MAX || self.records.len() > TENSORS_MAX {
            return Err(format!(
                "{} tensors in {} records: the limit is {TENSORS_MAX}",
                self.tensors.len(),
                self.records.len()
            ));
        }
        let mut total = 0_u64;
        for record in &self.records {
            check_name(&record.name)?;
            let aligned =
                record.parameters > 0 && record.parameters.is_multiple_of(TENSOR_ALIGNMENT);
            total = total.saturating_add(record.parameters);
            if !aligned || total > PARAMETERS_MAX {
                return Err(format!(
                    "record {} has {} parameters: must be a positive multiple of {TENSOR_ALIGNMENT}, 2^44 in all at most",
                    record.name, record.parameters
                ));
            }
        }
        let chunks: u64 =
            self.records.iter().map(|r| r.parameters.div_ceil(self.chunk_parameters)).sum();
        if chunks > CHUNKS_MAX {
            let needed = chunks;
            return Err(format!(
                "{needed} chunks; the limit is {CHUNKS_MAX}: choose larger chunks"
            ));
        }
        let mut end = (0_usize, 0_u64);
        for tensor in &self.tensors {
            check_name(&tensor.name)?;
            let record = self
                .records
                .get(tensor.record)
                .ok_or_else(|| format!("tensor {}: no record {}", tensor.name, tensor.record))?;
            let elements = tensor
                .elements()
                .filter(|_| tensor.shape.len() <= DIMENSIONS_MAX)
                .unwrap_or(u64::MAX);
            let last = tensor.offset.saturating_add(elements);
            if !tensor.offset.is_multiple_of(TENSOR_ALIGNMENT)
                || last > record.parameters
                || (tensor.record, tensor.offset) < end
            {
                return Err(format!(
                    "tensor {} (shape {:?} at {} of record {}) overlaps another, is not aligned to {TENSOR_ALIGNMENT}, or leaves its record",
                    tensor.name, tensor.shape, tensor.offset, record.name
                ));
            }
            end = (tensor.record, last);
        }
        Ok(())
    }
}

fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains('\0') {
        let shown: String = name.chars().take(40).collect();
        return Err(format!(
            "a name of {} bytes ({shown:?}): 1 to {NAME_BYTES_MAX} without NUL are allowed",
            name.len()
        ));
    }
    Ok(())
}

/// A fixed number of consecutive parameters of one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Index of the record.
    pub record: usize,
    /// First parameter, counted from the record's start.
    pub start: u64,
    /// Number of parameters; fewer in a record's last chunk.
    pub parameters: usize,
    format: StateFormat,
    /// Offsets of the two plane groups from the start of the copy's area.
    offsets: [u64; 2],
}

impl Chunk {
    /// How its state is stored.
    #[must_use]
    pub fn format(&self) -> StateFormat {
        self.format
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
            self.format.planes(group).iter().take(planes).map(|(_, bytes)| bytes).sum();
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
        self.format.planes(group).into_iter().map(|(_, bytes)| range(bytes)).collect()
    }
}

/// All chunks and their places; computed from the manifest alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    chunks: Vec<Chunk>,
    records: Vec<Range<usize>>,
    parameters: Vec<u64>,
    copy_bytes: u64,
    single_bytes: u64,
    table_start: Vec<usize>,
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
        let (mut copy_bytes, mut single_bytes) = (0_u64, 0_u64);
        for (index, record) in manifest.records.iter().enumerate() {
            let first = chunks.len();
            let mut start = 0;
            while start < record.parameters {
                let length = manifest.chunk_parameters.min(record.parameters - start);
                let parameters = usize::try_from(length).map_err(|e| e.to_string())?;
                chunks.push(Chunk {
                    record: index,
                    start,
                    parameters,
                    format: record.format,
                    offsets: [0; 2],
                });
                start += length;
            }
            // A block's weights lie in one run: forward and backward read nothing else of it.
            let area =
                if record.format.is_trainable() { &mut copy_bytes } else { &mut single_bytes };
            for group in Group::ALL {
                for chunk in &mut chunks[first..] {
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
                table_start.push(last + crate::checksum::unit_count(chunk.extent_bytes(group)));
            }
        }
        let huge = HUGE_PAGE_BYTES as u64;
        let copy_bytes = round_up(copy_bytes, huge).ok_or("the store is too large")?;
        let parameters = manifest.records.iter().map(|r| r.parameters).collect();
        Ok(Self { chunks, records, parameters, copy_bytes, single_bytes, table_start })
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

    /// Bytes of the data area: copies A and B, then the single copies of untrained records.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        2 * self.copy_bytes + self.single_bytes
    }

    /// Offset of an extent from the start of the data area.
    #[must_use]
    pub fn extent_offset(&self, chunk: usize, group: Group, copy: CopyId) -> u64 {
        let chunk = &self.chunks[chunk];
        let area = match (chunk.format.is_trainable(), copy) {
            (true, CopyId::A) => 0,
            (true, CopyId::B) => self.copy_bytes,
            (false, _) => 2 * self.copy_bytes,
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
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Records of the given sizes, one tensor filling each.
    pub(crate) fn manifest(chunk_parameters: u64, records: &[(StateFormat, u64)]) -> Manifest {
        let name = |index: usize| format!("layer.{index}");
        Manifest {
            chunk_parameters,
            records: records
                .iter()
                .enumerate()
                .map(|(index, &(format, parameters))| Record {
                    name: name(index),
                    format,
                    parameters,
                })
                .collect(),
            tensors: records
                .iter()
                .enumerate()
                .map(|(index, &(_, parameters))| Tensor {
                    name: format!("{}.weight", name(index)),
                    record: index,
                    offset: 0,
                    shape: vec![parameters],
                })
                .collect(),
            model: serde_json::Value::Null,
        }
    }

    fn any_format() -> impl Strategy<Value = StateFormat> {
        prop_oneof![
            Just(StateFormat::Bf16),
            Just(StateFormat::F32),
            Just(StateFormat::Raw16),
            Just(StateFormat::Raw8)
        ]
    }

    proptest! {
        #[test]
        fn extents_are_aligned_and_never_overlap(
            records in prop::collection::vec((any_format(), (1_u64..100).prop_map(|n| n * 128)), 1..6),
        ) {
            let layout = Layout::new(&manifest(4096, &records)).expect("valid");
            let mut extents = Vec::new();
            for (index, chunk) in layout.chunks().iter().enumerate() {
                for group in Group::ALL {
                    let bytes = chunk.extent_bytes(group) as u64;
                    extents.push((layout.extent_offset(index, group, CopyId::A), bytes));
                    if chunk.format().is_trainable() {
                        extents.push((layout.extent_offset(index, group, CopyId::B), bytes));
                    }
                }
            }
            extents.retain(|(_, bytes)| *bytes > 0);
            extents.sort_unstable();
            for pair in extents.windows(2) {
                prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0);
            }
            for (offset, bytes) in &extents {
                prop_assert!(offset % 4096 == 0 && bytes % 4096 == 0);
                prop_assert!(offset + bytes <= layout.data_bytes());
            }
        }

        #[test]
        fn hostile_manifests_are_refused_not_obeyed(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Manifest::parse(&bytes);
        }
    }

    /// A manifest of 64 MiB was within its limit, and the value built from `[{"":0},{"":0},...` in it
    /// takes 93 times as much: opening such a store took 6 GB. Its length is told first now.
    #[test]
    fn a_long_model_configuration_is_refused_before_it_is_built() {
        let text = |entries: usize| {
            let mut manifest = manifest(4096, &[(StateFormat::F32, 512)]);
            manifest.model = serde_json::json!(vec![0; entries]);
            serde_json::to_vec(&manifest).expect("JSON")
        };
        // `[0,0,...]`: two bytes an entry, and one.
        let longest = (MODEL_BYTES_MAX - 1) / 2;
        assert!(Manifest::parse(&text(longest)).is_ok());
        let refused = Manifest::parse(&text(longest + 1)).expect_err("too long");
        assert!(refused.contains("has 1048577 bytes, the limit is 1048576"), "{refused}");
        let deep = [b'['; 10_000];
        assert!(Manifest::parse(&[&b"{\"model\":"[..], &deep].concat()).is_err());
    }

    #[test]
    fn a_store_of_bf16_takes_24_bytes_a_parameter() {
        let layout =
            Layout::new(&manifest(1 << 21, &[(StateFormat::Bf16, 1 << 23)])).expect("valid");
        assert_eq!(layout.data_bytes(), 24 << 23);
    }

    #[test]
    fn planes_lie_one_behind_the_other() {
        let layout =
            Layout::new(&manifest(4096, &[(StateFormat::Bf16, 4096 + 128)])).expect("valid");
        let last = &layout.chunks()[1];
        assert_eq!(last.plane_ranges(Group::Update), vec![0..256, 256..768, 768..1280]);
        assert_eq!(
            (last.extent_bytes(Group::Update), last.stored_bytes(Group::Update, 1)),
            (4096, 4096)
        );
    }

    #[test]
    fn overlaps_misalignment_and_overflow_are_refused() {
        let good = manifest(4096, &[(StateFormat::F32, 512)]);
        let cases: [fn(&mut Manifest); 6] = [
            |m| m.tensors[0].shape = vec![513],
            |m| m.tensors[0].shape = vec![u64::MAX, 3],
            |m| m.tensors[0].offset = 1,
            |m| m.tensors[0].record = 5,
            |m| m.tensors.push(m.tensors[0].clone()),
            |m| m.records[0].parameters = u64::MAX - 127,
        ];
        assert_eq!(good.validate(), Ok(()));
        for (index, spoil) in cases.iter().enumerate() {
            let mut bad = good.clone();
            spoil(&mut bad);
            assert!(bad.validate().is_err(), "case {index}");
        }
    }
}
