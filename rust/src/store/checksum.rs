//! Checksums: CRC-32C of at most 1 MiB each, kept away from the data and bound to the place and
//! time of the write, so that a misplaced, stale or lost write cannot pass for the right one.

use crc_fast::{CrcAlgorithm, Digest, checksum};
use rayon::prelude::*;

use crate::units::Group;

/// Bytes that one checksum covers at most.
pub(crate) const UNIT_BYTES: usize = 1 << 20;

/// What a checksum is bound to besides the bytes.
#[derive(Clone, Copy, Debug)]
pub struct Binding {
    /// The store's UUID.
    pub store: [u8; 16],
    /// Index of the chunk in the store.
    pub chunk: u32,
    /// The plane group.
    pub group: Group,
    /// Generation that the write belongs to.
    pub generation: u64,
}

/// A checksum that did not match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Index of the unit within the extent.
    pub unit: usize,
    /// The checksum in the table.
    pub expected: u32,
    /// The checksum of the bytes.
    pub found: u32,
}

/// Number of checksums for an extent of `bytes`.
#[must_use]
pub(crate) fn unit_count(bytes: usize) -> usize {
    bytes.div_ceil(UNIT_BYTES)
}

/// One checksum per unit of `data`, computed on the current rayon pool.
#[must_use]
pub(crate) fn sums(binding: &Binding, data: &[u8]) -> Vec<u32> {
    data.par_chunks(UNIT_BYTES)
        .enumerate()
        .map(|(unit, bytes)| unit_sum(binding, unit, bytes))
        .collect()
}

/// Compares `data` with the checksums that were taken when it was written.
///
/// # Errors
/// The first unit that differs. `expected` must hold one checksum per unit of `data`.
pub(crate) fn verify(binding: &Binding, data: &[u8], expected: &[u32]) -> Result<(), Mismatch> {
    assert_eq!(expected.len(), unit_count(data.len()), "one checksum per unit");
    data.par_chunks(UNIT_BYTES)
        .zip(expected.par_iter())
        .enumerate()
        .map(|(unit, (bytes, &expected))| {
            let found = unit_sum(binding, unit, bytes);
            if found == expected { Ok(()) } else { Err(Mismatch { unit, expected, found }) }
        })
        .collect()
}

/// As [`sums`], on the calling thread alone: for who has other work for the other cores.
#[must_use]
pub(crate) fn sums_on_this_thread(binding: &Binding, data: &[u8]) -> Vec<u32> {
    let units = data.chunks(UNIT_BYTES).enumerate();
    units.map(|(unit, bytes)| unit_sum(binding, unit, bytes)).collect()
}

/// As [`verify`], on the calling thread alone.
///
/// # Errors
/// The first unit that differs. `expected` must hold one checksum per unit of `data`.
pub(crate) fn verify_on_this_thread(
    binding: &Binding,
    data: &[u8],
    expected: &[u32],
) -> Result<(), Mismatch> {
    assert_eq!(expected.len(), unit_count(data.len()), "one checksum per unit");
    for (unit, (bytes, &expected)) in data.chunks(UNIT_BYTES).zip(expected).enumerate() {
        let found = unit_sum(binding, unit, bytes);
        if found != expected {
            return Err(Mismatch { unit, expected, found });
        }
    }
    Ok(())
}

/// CRC-32C of `data`: guards header and superblock.
#[must_use]
pub(crate) fn crc32c(data: &[u8]) -> u32 {
    low_half(checksum(CrcAlgorithm::Crc32Iscsi, data))
}

/// CRC-64/NVME of `data`: the root over table, blob and manifest.
#[must_use]
pub(crate) fn crc64(data: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Nvme, data)
}

fn unit_sum(binding: &Binding, unit: usize, bytes: &[u8]) -> u32 {
    if cfg!(bench_without_checksums) {
        return 0;
    }
    let mut digest = unit_digest(binding, unit);
    digest.update(bytes);
    low_half(digest.finalize())
}

fn unit_digest(binding: &Binding, unit: usize) -> Digest {
    let mut prefix = [0_u8; 40];
    prefix[..16].copy_from_slice(&binding.store);
    prefix[16..20].copy_from_slice(&binding.chunk.to_le_bytes());
    prefix[20] = binding.group.index();
    prefix[24..32].copy_from_slice(&binding.generation.to_le_bytes());
    prefix[32..].copy_from_slice(&(unit as u64).to_le_bytes());
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    digest.update(&prefix);
    digest
}

/// Checksums of bytes that come piece by piece, while they are still in the cache.
#[derive(Debug)]
pub(crate) struct Running {
    binding: Binding,
    digest: Digest,
    /// Bytes in the unit so far.
    filled: usize,
    unit: usize,
    sums: Vec<u32>,
}

impl Running {
    /// From the start of one unit of an extent on.
    #[must_use]
    pub(crate) fn new(binding: &Binding, unit: usize) -> Self {
        Self {
            binding: *binding,
            digest: unit_digest(binding, unit),
            filled: 0,
            unit,
            sums: Vec::new(),
        }
    }

    /// The next bytes of the extent.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (front, rest) = bytes.split_at(bytes.len().min(UNIT_BYTES - self.filled));
            if !cfg!(bench_without_checksums) {
                self.digest.update(front);
            }
            self.filled += front.len();
            bytes = rest;
            if self.filled == UNIT_BYTES {
                self.end_unit();
            }
        }
    }

    /// One checksum per unit that was begun.
    #[must_use]
    pub(crate) fn finish(mut self) -> Vec<u32> {
        if self.filled > 0 {
            self.end_unit();
        }
        self.sums
    }

    fn end_unit(&mut self) {
        let off = cfg!(bench_without_checksums);
        self.sums.push(if off { 0 } else { low_half(self.digest.finalize()) });
        self.unit += 1;
        self.filled = 0;
        self.digest = unit_digest(&self.binding, self.unit);
    }
}

fn low_half(crc: u64) -> u32 {
    u32::try_from(crc & 0xffff_ffff).unwrap_or_default()
}

#[cfg(test)]
mod tests;
