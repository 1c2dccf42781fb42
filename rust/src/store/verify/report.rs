//! What verifying finds.

use crate::error::Error;
use crate::units::Group;

/// What verification found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Generation that was verified.
    pub generation: u64,
    /// Extents that hold data.
    pub extents: usize,
    /// Bytes read.
    pub bytes: u64,
    /// What did not hold.
    pub damaged: Vec<DamagedExtent>,
}

/// One extent that did not hold.
#[derive(Clone, Debug)]
pub struct DamagedExtent {
    /// Index of the chunk.
    pub chunk: usize,
    /// The plane group.
    pub group: Group,
    /// What was wrong, with place and checksums.
    pub error: Error,
}
