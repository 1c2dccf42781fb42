//! The superblock names the newest whole state; the clean marker says that nothing was written
//! after it.

use crate::store::fields::{PageWriter, Reader};
use crate::units::PAGE_BYTES;

const MAGIC: &[u8; 8] = b"MTIOSUPR";
const CLEAN_MAGIC: &[u8; 8] = b"MTIOCLEN";
/// No training comes this far, and counting on from here overflows nothing.
pub(super) const GENERATION_MAX: u64 = 1 << 62;

/// Root of one committed state. Superblock `generation & 1` names generation `generation`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) uuid: [u8; 16],
    pub(super) generation: u64,
    /// Random number of the open that wrote it.
    pub(super) incarnation: u64,
    /// Boot of the kernel under which it was written.
    pub(super) life: [u8; 16],
    pub(super) table_crc: u64,
    pub(super) blob_bytes: u64,
    pub(super) blob_crc: u64,
    pub(super) manifest_crc: u64,
}

impl Superblock {
    pub(super) fn encode(&self) -> Box<[u8; PAGE_BYTES]> {
        let mut page = PageWriter::new(MAGIC);
        page.bytes(&self.uuid);
        page.u64(self.generation);
        page.u64(self.incarnation);
        page.bytes(&self.life);
        for value in [self.table_crc, self.blob_bytes, self.blob_crc, self.manifest_crc] {
            page.u64(value);
        }
        let mut version = [0_u8; 32];
        let text = env!("CARGO_PKG_VERSION").as_bytes();
        version[..text.len().min(32)].copy_from_slice(&text[..text.len().min(32)]);
        page.bytes(&version);
        page.seal()
    }

    pub(super) fn decode(page: &[u8]) -> Option<Self> {
        let mut fields = Reader::sealed_page(page, MAGIC)?;
        let superblock = Self {
            uuid: fields.array(),
            generation: fields.u64(),
            incarnation: fields.u64(),
            life: fields.array(),
            table_crc: fields.u64(),
            blob_bytes: fields.u64(),
            blob_crc: fields.u64(),
            manifest_crc: fields.u64(),
        };
        (superblock.generation <= GENERATION_MAX).then_some(superblock)
    }

    /// The clean marker that vouches for this superblock.
    pub(super) fn clean_marker(&self) -> Box<[u8; PAGE_BYTES]> {
        let mut page = PageWriter::new(CLEAN_MAGIC);
        page.bytes(&self.uuid);
        page.u64(self.generation);
        page.u64(self.incarnation);
        page.seal()
    }

    /// Whether `page` is the clean marker of this very superblock.
    pub(super) fn is_vouched_for_by(&self, page: &[u8]) -> bool {
        page.get(..PAGE_BYTES).is_some_and(|page| page == &self.clean_marker()[..])
    }
}

/// The generation that a store's clean marker vouches for, whichever superblocks are there.
pub(super) fn marked_generation(page: &[u8], uuid: &[u8; 16]) -> Option<u64> {
    let mut fields = Reader::sealed_page(page, CLEAN_MAGIC)?;
    (fields.array() == *uuid).then(|| fields.u64())
}

#[cfg(test)]
mod tests;
