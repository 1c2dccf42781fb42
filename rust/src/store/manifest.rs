//! The manifest: what a store holds, as written into it at creation. Anyone may have written one, so
//! every rule that the rest of the crate relies on is checked here.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::io::drives::check_count;
use crate::units::{StateFormat, TENSOR_ALIGNMENT};

/// A manifest is at most this long, in bytes.
pub(crate) const MANIFEST_BYTES_MAX: usize = 256 << 20;
/// A model's configuration in it is: a value takes up to a hundred times its text in memory.
pub(crate) const MODEL_BYTES_MAX: usize = 1 << 20;
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
    /// When a step survives a crash.
    #[serde(default)]
    pub durability: Durability,
    /// Number of drives that the chunks are spread over.
    #[serde(default = "one")]
    pub drives: usize,
    /// What its records are.
    #[serde(default)]
    pub content: Content,
    /// The records, in the order of the parameter space.
    pub records: Vec<Record>,
    /// The tensors, by record and offset.
    pub tensors: Vec<Tensor>,
    /// The model's own configuration, as it was imported; not interpreted here.
    pub model: ModelText,
}

fn one() -> usize {
    1
}

/// What a store promises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// A committed step survives everything; trained records have two copies.
    #[default]
    Step,
    /// Nothing survives but a clean close; one copy, half the space.
    Scratch,
}

/// What the records of a store are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// The blocks of a model and what training keeps of them; those that are not trained never change.
    #[default]
    Training,
    /// One tensor each, as bytes, which can be written at any time.
    Tensors,
}

/// JSON text that is kept as it was written: no value is built of it but to check it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ModelText(Box<RawValue>);

impl PartialEq for ModelText {
    fn eq(&self, other: &Self) -> bool {
        self.0.get() == other.0.get()
    }
}

impl From<serde_json::Value> for ModelText {
    fn from(value: serde_json::Value) -> Self {
        // A value is JSON, whatever is in it.
        Self(serde_json::value::to_raw_value(&value).unwrap_or_default())
    }
}

/// What `model` is where `content` is tensors, beyond what may be anything.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    /// Dtype and shape.
    #[serde(rename = "tensors")]
    _tensors: Vec<(String, Vec<u64>)>,
}

impl ModelText {
    /// Whether whoever reads it can build it: small, not nested deeply, or a plain list of tensors.
    fn validate(&self, content: Content) -> Result<(), String> {
        let (text, limit) = (self.0.get(), MODEL_BYTES_MAX);
        let read = if text.len() <= limit {
            serde_json::from_str::<serde_json::Value>(text).map(drop)
        } else if content == Content::Tensors {
            serde_json::from_str::<Described>(text).map(drop)
        } else {
            let bytes = text.len();
            return Err(format!(
                "the model's configuration has {bytes} bytes, the limit is {limit}"
            ));
        };
        read.map_err(|e| format!("the manifest is not valid: {e}"))
    }
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
        self.model.validate(self.content)?;
        check_count(self.drives).map_err(|error| error.to_string())?;
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
        match self.content {
            Content::Training => Ok(()),
            Content::Tensors => self.validate_tensors(),
        }
    }

    /// With content `tensors` record i is tensor i, as bytes, and carries its name.
    fn validate_tensors(&self) -> Result<(), String> {
        if self.tensors.len() != self.records.len() {
            let (tensors, records) = (self.tensors.len(), self.records.len());
            return Err(format!("content is tensors, with {tensors} tensors in {records} records"));
        }
        for (index, (record, tensor)) in self.records.iter().zip(&self.tensors).enumerate() {
            let is_whole = tensor.record == index && tensor.offset == 0 && tensor.shape.len() == 1;
            if record.format != StateFormat::Raw8 || record.name != tensor.name || !is_whole {
                return Err(format!(
                    "content is tensors, and record {} is not the bytes of one tensor of that name",
                    record.name
                ));
            }
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
