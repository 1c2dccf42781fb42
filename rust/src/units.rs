//! Units that the whole crate shares: alignments, state formats with their planes, copies.

pub use crate::units::state_format::{
    Dtype, FormatSpec, Group, OptimizerFormat, Plane, PlaneSpec, StateFormat,
};

mod state_format;

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
