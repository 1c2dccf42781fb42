//! Units that the whole crate shares: alignments, planes, state formats, copies.

use serde::{Deserialize, Serialize};

/// Alignment of every file offset, transfer length and transfer address, in bytes.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Size of a huge page, in bytes; regions start at a multiple of it.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Every tensor starts at a multiple of this many parameters, so that offsets do not depend on the
/// dtype and a bf16 tensor starts 256-byte aligned (matrix kernels choose their path by alignment).
pub(crate) const TENSOR_ALIGNMENT: u64 = 128;

/// `value` rounded up to a multiple of `multiple`, or `None` on overflow.
#[must_use]
pub(crate) fn round_up(value: u64, multiple: u64) -> Option<u64> {
    value.checked_next_multiple_of(multiple)
}

/// `usize` from a `u64` that was validated to describe memory or a file of this machine.
///
/// # Panics
/// On a 32-bit machine with a value above `u32::MAX`; such machines are refused at start.
#[must_use]
pub fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("a 64-bit machine")
}

/// What one buffer holds while weights and gradients move: a record, or less of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unit {
    /// A whole record, for who computes in the buffer.
    #[default]
    Record,
    /// A chunk, for who computes elsewhere and needs little memory here.
    Chunk,
}

impl Unit {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Record, Self::Chunk];

    /// Its name in messages and arguments.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::Chunk => "chunk",
        }
    }

    /// The one of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|unit| unit.name() == name)
    }
}

/// One kind of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plane {
    /// What forward and backward compute with.
    Weight,
    /// Lower half of the fp32 master, as int16 (format `bf16` only).
    Remainder,
    /// First moment, f32.
    ExpAvg,
    /// Second moment, f32.
    ExpAvgSq,
}

impl Plane {
    /// The plane's name in messages and on disk.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Remainder => "remainder",
            Self::ExpAvg => "exp_avg",
            Self::ExpAvgSq => "exp_avg_sq",
        }
    }
}

/// How the state of a record's parameters is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateFormat {
    /// Trainable, computed in bf16: weight bf16, remainder int16, moments f32. 12 bytes a parameter.
    Bf16,
    /// Trainable, computed in fp32: weight f32, moments f32. 12 bytes a parameter.
    F32,
    /// Not trained: the weight alone, 1 byte an element.
    Raw8,
    /// Not trained: the weight alone, 2 bytes an element (bf16, fp16).
    Raw16,
    /// Not trained: the weight alone, 4 bytes an element.
    Raw32,
}

impl StateFormat {
    /// Bytes of one parameter's weight.
    #[must_use]
    pub fn weight_bytes(self) -> usize {
        match self {
            Self::Raw8 => 1,
            Self::Bf16 | Self::Raw16 => 2,
            Self::F32 | Self::Raw32 => 4,
        }
    }

    /// The planes of the update group in the order in which they lie in its extent, each with its
    /// bytes a parameter. Empty for a record that is not trained.
    #[must_use]
    pub fn update_planes(self) -> &'static [(Plane, usize)] {
        match self {
            Self::Bf16 => &[(Plane::Remainder, 2), (Plane::ExpAvg, 4), (Plane::ExpAvgSq, 4)],
            Self::F32 => &[(Plane::ExpAvg, 4), (Plane::ExpAvgSq, 4)],
            Self::Raw8 | Self::Raw16 | Self::Raw32 => &[],
        }
    }

    /// The planes of one group, each with its bytes a parameter.
    #[must_use]
    pub fn planes(self, group: Group) -> Vec<(Plane, usize)> {
        match group {
            Group::Weight => vec![(Plane::Weight, self.weight_bytes())],
            Group::Update => self.update_planes().to_vec(),
        }
    }

    /// Bytes a parameter of one plane group.
    #[must_use]
    pub fn group_bytes(self, group: Group) -> usize {
        self.planes(group).iter().map(|(_, bytes)| bytes).sum()
    }

    /// Whether the record is trained (has update planes and two copies on disk).
    #[must_use]
    pub fn is_trainable(self) -> bool {
        !self.update_planes().is_empty()
    }
}

/// What is moved together: the weight alone, or all that only the update needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// The `weight` plane: read by forward and backward.
    Weight,
    /// `remainder`, `exp_avg`, `exp_avg_sq`: read by the update.
    Update,
}

impl Group {
    /// Both groups, in table order.
    pub const ALL: [Self; 2] = [Self::Weight, Self::Update];

    /// Position in tables and checksums; part of the file format.
    #[must_use]
    pub fn index(self) -> u8 {
        match self {
            Self::Weight => 0,
            Self::Update => 1,
        }
    }

    /// The group's name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Update => "update",
        }
    }
}

/// One of the two places on disk of a chunk's plane group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyId {
    /// The first place.
    A,
    /// The second place; records that are not trained have none.
    B,
}

impl CopyId {
    /// The other place.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// 0 or 1; part of the file format.
    #[must_use]
    pub fn index(self) -> u8 {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}

#[cfg(test)]
mod tests;
