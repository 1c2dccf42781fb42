//! Little-endian fields of fixed blocks, read and written in order.

use crate::store::checksum::crc32c;
use crate::units::PAGE_BYTES;

/// Writes fields one behind the other into a page; `seal` closes it with its checksum.
pub(super) struct PageWriter {
    page: Box<[u8; PAGE_BYTES]>,
    at: usize,
}

impl PageWriter {
    pub(super) fn new(magic: &[u8; 8]) -> Self {
        let mut writer = Self { page: Box::new([0; PAGE_BYTES]), at: 0 };
        writer.bytes(magic);
        writer
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.page[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn seal(mut self) -> Box<[u8; PAGE_BYTES]> {
        let sum = crc32c(&self.page[..PAGE_BYTES - 4]);
        self.page[PAGE_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
        self.page
    }
}

/// Reads fields one behind the other; past the end it reads zeros, so that no input can panic.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// A page whose magic and checksum hold.
    pub(super) fn sealed_page(page: &'a [u8], magic: &[u8; 8]) -> Option<Self> {
        let (content, sum) = page.get(..PAGE_BYTES)?.split_at(PAGE_BYTES - 4);
        let holds = content.starts_with(magic) && crc32c(content).to_le_bytes() == *sum;
        holds.then(|| Self::new(&content[magic.len()..]))
    }

    pub(super) fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let length = N.min(self.bytes.len());
        let (front, rest) = self.bytes.split_at(length);
        array[..length].copy_from_slice(front);
        self.bytes = rest;
        array
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.bytes
    }
}
