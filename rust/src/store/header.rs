//! The header: what kind of file this is and where its parts lie. Written once, with a copy.

use crate::io::drives::DRIVES_MAX;
use crate::store::fields::{PageWriter, Reader};
use crate::store::layout::Layout;
use crate::store::table::Table;
use crate::units::{HUGE_PAGE_BYTES, PAGE_BYTES, round_up};

const MAGIC: &[u8; 8] = b"MTIOSTOR";
/// Format version; 0.x may change until it is frozen on purpose.
pub(super) const MAJOR: u32 = 0;
pub(super) const MINOR: u32 = 4;
/// From this one on each record has its own number of updates in the table; before, there is one for all.
const OWN_UPDATES_SINCE: u32 = 4;
const BYTE_ORDER: u32 = 0x0102_0304;
/// CRC-32C over units of 1 MiB, roots CRC-64/NVME.
const CHECKSUM_ID: u32 = 1;
/// Planes and their order as in `units::StateFormat`.
const PLANES_ID: u32 = 1;

/// Where the header and its copy lie.
pub(super) const HEADER_OFFSETS: [u64; 2] = [0, 512 << 10];
/// Where each superblock and its mirror lie.
pub(super) const SUPERBLOCK_OFFSETS: [[u64; 2]; 2] =
    [[1 << 20, (1 << 20) + (64 << 10)], [2 << 20, (2 << 20) + (64 << 10)]];
/// Where the clean marker lies.
pub(super) const CLEAN_MARKER_OFFSET: u64 = (2 << 20) + (512 << 10);
const TABLES_OFFSET: u64 = 3 << 20;
/// Room for one trainer blob, in bytes.
pub(super) const BLOB_BYTES_MAX: u64 = 256 << 10;

/// The parts of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The format that the store was made with: it keeps that.
    pub(super) minor: u32,
    pub(super) uuid: [u8; 16],
    pub(super) set_uuid: [u8; 16],
    pub(super) drive: (u32, u32),
    pub(super) rank: (u32, u32),
    pub(super) manifest_bytes: u64,
    pub(super) manifest_crc: u64,
    pub(super) table_offsets: [u64; 2],
    pub(super) table_bytes: u64,
    pub(super) blob_offsets: [u64; 2],
    pub(super) manifest_offset: u64,
    pub(super) data_offset: u64,
    pub(super) file_bytes: u64,
}

impl Header {
    /// The header of a new store's file on one of its drives. All have the same places; only the main
    /// file uses those of tables, blobs and manifest.
    pub(super) fn new(
        uuid: [u8; 16],
        layout: &Layout,
        manifest: &[u8],
        drive: usize,
    ) -> Option<Self> {
        let page = PAGE_BYTES as u64;
        let table_bytes = round_up(Table::encoded_bytes(layout) as u64, page)?;
        let table_b = TABLES_OFFSET.checked_add(table_bytes)?;
        let blob_a = table_b.checked_add(table_bytes)?;
        let manifest_offset = blob_a.checked_add(2 * BLOB_BYTES_MAX)?;
        let manifest_bytes = manifest.len() as u64;
        let data_offset =
            round_up(manifest_offset.checked_add(manifest_bytes)?, HUGE_PAGE_BYTES as u64)?;
        Some(Self {
            minor: MINOR,
            uuid,
            set_uuid: uuid,
            drive: (u32::try_from(drive).ok()?, u32::try_from(layout.drives()).ok()?),
            rank: (0, 1),
            manifest_bytes,
            manifest_crc: crate::store::checksum::crc64(manifest),
            table_offsets: [TABLES_OFFSET, table_b],
            table_bytes,
            blob_offsets: [blob_a, blob_a + BLOB_BYTES_MAX],
            manifest_offset,
            data_offset,
            file_bytes: data_offset.checked_add(layout.data_bytes(drive))?,
        })
    }

    /// Whether entries of the table say how often they were updated.
    pub(super) fn has_own_updates(&self) -> bool {
        self.minor >= OWN_UPDATES_SINCE
    }

    pub(super) fn encode(&self) -> Box<[u8; PAGE_BYTES]> {
        let mut page = PageWriter::new(MAGIC);
        page.u32(BYTE_ORDER);
        page.u32(MAJOR);
        page.u32(self.minor);
        // Feature bits: compatible, compatible for reading only, incompatible. None yet.
        for _ in 0..3 {
            page.u64(0);
        }
        page.bytes(&self.uuid);
        page.bytes(&self.set_uuid);
        // Stripe map 0: chunk i is on drive i modulo their number.
        for value in
            [self.drive.0, self.drive.1, self.rank.0, self.rank.1, CHECKSUM_ID, PLANES_ID, 0]
        {
            page.u32(value);
        }
        for value in [
            self.manifest_offset,
            self.manifest_bytes,
            self.manifest_crc,
            self.table_offsets[0],
            self.table_offsets[1],
            self.table_bytes,
            self.blob_offsets[0],
            self.blob_offsets[1],
            self.data_offset,
            self.file_bytes,
        ] {
            page.u64(value);
        }
        page.seal()
    }

    /// Reads a header page.
    ///
    /// `Ok(None)`: the page is not a header (or is damaged). `Err`: it is one that this build must
    /// not touch, with the reason.
    pub(super) fn decode(page: &[u8]) -> Result<Option<Self>, String> {
        let Some(mut fields) = Reader::sealed_page(page, MAGIC) else { return Ok(None) };
        let byte_order = fields.u32();
        if byte_order != BYTE_ORDER {
            return Err(format!(
                "byte-order mark {byte_order:#010x}: written by a machine of another byte order"
            ));
        }
        let (major, minor) = (fields.u32(), fields.u32());
        let features: [u64; 3] = std::array::from_fn(|_| fields.u64());
        if major != MAJOR || minor > MINOR {
            return Err(format!(
                "format {major}.{minor}, and this build reads {MAJOR}.x up to {MAJOR}.{MINOR}; the file was not modified. \
                 Use the version of megatrain-io that wrote it, or a newer one"
            ));
        }
        if features[1] != 0 || features[2] != 0 {
            let (read_only, incompatible) = (features[1], features[2]);
            return Err(format!(
                "unknown format features {read_only:#x}/{incompatible:#x}; the file was not modified. Use a newer megatrain-io"
            ));
        }
        let (uuid, set_uuid) = (fields.array(), fields.array());
        let drive = (fields.u32(), fields.u32());
        let rank = (fields.u32(), fields.u32());
        let ids = (fields.u32(), fields.u32(), fields.u32());
        let is_drive = drive.0 < drive.1 && crate::units::to_usize(drive.1.into()) <= DRIVES_MAX;
        if ids != (CHECKSUM_ID, PLANES_ID, 0) || !is_drive || rank != (0, 1) {
            return Err(format!(
                "checksum, plane and stripe ids {ids:?}, drive {drive:?}, rank {rank:?}: use a newer megatrain-io"
            ));
        }
        let mut next = || fields.u64();
        let (manifest_offset, manifest_bytes, manifest_crc) = (next(), next(), next());
        let table_offsets = [next(), next()];
        let table_bytes = next();
        let blob_offsets = [next(), next()];
        let (data_offset, file_bytes) = (next(), next());
        Ok(Some(Self {
            minor,
            uuid,
            set_uuid,
            drive,
            rank,
            manifest_bytes,
            manifest_crc,
            table_offsets,
            table_bytes,
            blob_offsets,
            manifest_offset,
            data_offset,
            file_bytes,
        }))
    }
}

#[cfg(test)]
mod tests;
