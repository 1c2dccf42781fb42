//! Every parser of the store on bytes from strangers. Changes are made to what is valid, and the
//! checksums made good again, so that what lies behind them is reached. Proptest drives it in the
//! tests, libFuzzer in `rust/fuzz` (`make fuzz`).

use std::path::Path;
use std::sync::Arc;

use crate::io::engine::memory::Memory;
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::store::checksum::{crc32c, crc64};
use crate::store::fields::Reader;
use crate::store::header::{CLEAN_MARKER_OFFSET, HEADER_OFFSETS, Header, SUPERBLOCK_OFFSETS};
use crate::store::layout::{Layout, Manifest};
use crate::store::superblock::Superblock;
use crate::store::tests::images::{BOOT_ID, RECORDS, Trained};
use crate::store::{BLOB_BYTES_MAX, Store, Table};
use crate::units::{Group, PAGE_BYTES, to_usize};

/// Length of the file; no manifest may say that the store is longer, so no extent is.
const FILE_BYTES: u64 = 16 << 20;
/// What opening such a store and verifying it may take: the commit's buffers, some extents, tables.
const MEMORY_MAX: u64 = 4 * FILE_BYTES;
const EDITS_MAX: usize = 16;

/// A sound store, to be spoilt.
pub struct Hostile {
    trained: Trained,
}

/// The parts of a file that a stranger may have written.
struct Parts {
    manifest: Vec<u8>,
    header: Vec<u8>,
    superblocks: [Vec<u8>; 2],
    tables: [Vec<u8>; 2],
    blobs: [Vec<u8>; 2],
    marker: Vec<u8>,
}

impl Hostile {
    /// A store whose empty file lies in `folder`.
    ///
    /// # Panics
    /// When that cannot be made.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        let trained = Trained::new(folder, &RECORDS, 4096, 1);
        trained.drives.main().file().set_len(FILE_BYTES).expect("a longer file");
        Self { trained }
    }

    /// Gives one of the parsers what `input` says. Whatever that is, nothing panics, and no memory is
    /// taken because a number asks for it.
    ///
    /// # Panics
    /// When a parser does, or when what it accepts is not consistent.
    pub fn check(&self, input: &[u8]) {
        let [which, input @ ..] = input else { return };
        let layout = &self.trained.layout;
        let mut edits = Reader::new(input);
        match which % 8 {
            0 => {
                let _ = Header::decode(input);
                let _ = Superblock::decode(input);
                check_manifest(input);
                check_table(layout, input);
            }
            1 => {
                let mut page = self.trained.header.encode().to_vec();
                edit_all(&mut page, false, &mut edits);
                seal(&mut page);
                let _ = Header::decode(&page);
            }
            2 => {
                let mut page = self.parts().superblocks[1].clone();
                edit_all(&mut page, false, &mut edits);
                seal(&mut page);
                let _ = Superblock::decode(&page);
            }
            3 => {
                let mut table = self.parts().tables[1].clone();
                edit_all(&mut table, false, &mut edits);
                check_table(layout, &table);
            }
            4 => {
                let mut text = self.parts().manifest;
                edit_all(&mut text, true, &mut edits);
                check_manifest(&text);
            }
            _ => self.check_file(&mut edits),
        }
    }

    fn parts(&self) -> Parts {
        let Trained { header, .. } = &self.trained;
        let bytes = |start, length| self.trained.image().bytes(start..start + length);
        let page = |at| bytes(at, PAGE_BYTES as u64);
        Parts {
            manifest: bytes(header.manifest_offset, header.manifest_bytes),
            header: page(0),
            superblocks: SUPERBLOCK_OFFSETS.map(|[first, _]| page(first)),
            tables: header.table_offsets.map(|at| bytes(at, header.table_bytes)),
            blobs: header.blob_offsets.map(|at| bytes(at, BLOB_BYTES_MAX as u64)),
            marker: page(CLEAN_MARKER_OFFSET),
        }
    }

    /// Opens a file with changed parts; what opens must stand reading, writing and opening again.
    fn check_file(&self, edits: &mut Reader<'_>) {
        let [flags]: [u8; 1] = edits.array();
        let mut parts = self.parts();
        for _ in 0..EDITS_MAX {
            let [part]: [u8; 1] = edits.array();
            let may_grow = part % 8 == 0;
            edit(parts.part(part), may_grow, edits);
            if edits.rest().is_empty() {
                break;
            }
        }
        let drive = self.trained.image().copy();
        parts.write(self.trained.header.clone(), flags, &drive);
        let drive = Arc::new(drive);
        let Some(generation) = self.use_it(&drive, true) else { return };
        let again = self.use_it(&drive, false);
        assert_eq!(again, Some(generation), "what was committed is there when it is opened again");
    }

    /// Opens the store and reads all of it; if asked to, commits. Returns its generation then.
    fn use_it(&self, drive: &Arc<Memory>, commit: bool) -> Option<u64> {
        let ledger = Ledger::new();
        let store = Store::open_on(&self.trained.drives, drive.clone(), BOOT_ID, &ledger).ok()?;
        let report = store.verify(&mut |_, _| true).expect("the drive can be read");
        let (committed, layout) = (store.committed(), store.layout());
        for (index, chunk) in layout.chunks().iter().enumerate() {
            for group in Group::ALL {
                let bytes = chunk.extent_bytes(group);
                let slot = Slot::standalone(bytes, &ledger, "test").expect("memory");
                let is_damaged =
                    report.damaged.iter().any(|d| (d.chunk, d.group) == (index, group));
                let read = store.read_group(&committed.table, index, group, slot);
                assert_eq!(read.is_err(), is_damaged, "{}", store.describe(index, group));
                let _ = store.plan_write(&committed.table, index, group, 1);
            }
        }
        assert!(ledger.total().peak < MEMORY_MAX, "{} bytes of memory", ledger.total().peak);
        // A store without chunks has no table, and engines refuse to write nothing.
        if !commit || layout.chunks().is_empty() {
            return Some(committed.generation);
        }
        store.commit((*committed.table).clone(), b"next").ok()
    }
}

impl Parts {
    fn part(&mut self, index: u8) -> &mut Vec<u8> {
        match index % 8 {
            0 => &mut self.manifest,
            1 => &mut self.header,
            2 => &mut self.superblocks[0],
            3 => &mut self.superblocks[1],
            4 => &mut self.tables[0],
            5 => &mut self.tables[1],
            6 => &mut self.blobs[1],
            _ => &mut self.marker,
        }
    }

    /// Writes all parts, so many of the checksums made good again as `flags` says.
    fn write(mut self, mut places: Header, flags: u8, drive: &Memory) {
        let flag = |bit: u32| (flags >> bit) & 1 == 1;
        let layout = Manifest::parse(&self.manifest).and_then(|m| Layout::new(&m)).ok();
        let made = layout.and_then(|layout| Header::new(places.uuid, &layout, &self.manifest, 0));
        if let Some(made) = made.filter(|made| flag(0) && made.file_bytes <= FILE_BYTES) {
            // The parts of the store that this manifest describes, in their places.
            self.header = made.encode().to_vec();
            for table in &mut self.tables {
                table.resize(to_usize(made.table_bytes), 0);
            }
            places = made;
        }
        let put = |page: &mut [u8], at: usize, value: u64| {
            page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        let manifest_crc = crc64(&self.manifest);
        if flag(1) {
            put(&mut self.header, 112, self.manifest.len() as u64);
            put(&mut self.header, 120, manifest_crc);
        }
        seal(&mut self.header);
        for side in 0..2 {
            let page = &mut self.superblocks[side];
            if flag(2) {
                let blob_bytes = Reader::new(&page[64..72]).u64().min(BLOB_BYTES_MAX as u64);
                put(page, 56, crc64(&self.tables[side]));
                put(page, 72, crc64(&self.blobs[side][..to_usize(blob_bytes)]));
                put(page, 80, manifest_crc);
            }
            seal(page);
        }
        if flag(3)
            && let Some(superblock) = Superblock::decode(&self.superblocks[usize::from(flag(4))])
        {
            self.marker = superblock.clean_marker().to_vec();
        }
        drive.overwrite(places.manifest_offset, &self.manifest);
        for side in 0..2 {
            drive.overwrite(places.table_offsets[side], &self.tables[side]);
            drive.overwrite(places.blob_offsets[side], &self.blobs[side]);
            drive.overwrite(HEADER_OFFSETS[side], &self.header);
            for at in SUPERBLOCK_OFFSETS[side] {
                drive.overwrite(at, &self.superblocks[side]);
            }
        }
        drive.overwrite(CLEAN_MARKER_OFFSET, &self.marker);
    }
}

fn check_manifest(text: &[u8]) {
    let Ok(manifest) = Manifest::parse(text) else { return };
    let layout =
        Layout::new(&manifest).expect("what parses has a layout, or is told to be too large");
    if let Some(header) = Header::new([7; 16], &layout, text, 0) {
        assert!(header.data_offset + layout.data_bytes(0) == header.file_bytes);
        assert_eq!(Header::decode(&header.encode()[..]), Ok(Some(header)));
    }
}

fn check_table(layout: &Layout, bytes: &[u8]) {
    assert!(Table::decode(layout, 3, false, bytes).is_none_or(|table| {
        let chunks = 0..layout.chunks().len();
        chunks
            .flat_map(|chunk| Group::ALL.map(|group| table.entry(layout, chunk, group)))
            .all(|entry| entry.updates == 0)
    }));
    let Some(table) = Table::decode(layout, 3, true, bytes) else { return };
    for (index, chunk) in layout.chunks().iter().enumerate() {
        for group in Group::ALL {
            let entry = table.entry(layout, index, group);
            let stored = chunk.stored_bytes(group, usize::from(entry.planes));
            assert!(stored <= chunk.extent_bytes(group) && entry.generation <= 3);
            let _ = table.sums(layout, index, group);
        }
    }
}

fn edit_all(bytes: &mut Vec<u8>, may_grow: bool, edits: &mut Reader<'_>) {
    for _ in 0..EDITS_MAX {
        edit(bytes, may_grow, edits);
        if edits.rest().is_empty() {
            break;
        }
    }
}

/// One change, of twelve bytes: a place, a kind and a value. A page keeps its length; a text may have
/// numbers replaced, and parts of it removed or repeated.
fn edit(bytes: &mut Vec<u8>, may_grow: bool, edits: &mut Reader<'_>) {
    let [low, middle, high, kind]: [u8; 4] = edits.array();
    let value: [u8; 8] = edits.array();
    let at = usize::from(low) | usize::from(middle) << 8 | usize::from(high) << 16;
    let at = at % bytes.len().max(1);
    let length = (usize::from(value[0]) % 64).min(bytes.len() - at);
    match kind % if may_grow { 7 } else { 4 } {
        0..4 => {
            let width = (1 << (kind % 4)).min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&value[..width]);
        }
        4 => {
            let is_digit = |byte: &u8| byte.is_ascii_digit();
            let start = at + bytes[at..].iter().take_while(|byte| !is_digit(byte)).count();
            let end = start + bytes[start..].iter().take_while(|byte| is_digit(byte)).count();
            let number = u64::from_le_bytes(value).to_string();
            bytes.splice(start..end, number.into_bytes());
        }
        5 => drop(bytes.drain(at..at + length)),
        _ => {
            let part = bytes[at..at + length].to_vec();
            bytes.splice(at..at, part);
        }
    }
}

/// Makes the checksum of a page good.
fn seal(page: &mut [u8]) {
    let (content, sum) = page.split_at_mut(PAGE_BYTES - 4);
    sum.copy_from_slice(&crc32c(content).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    static HOSTILE: LazyLock<(tempfile::TempDir, Hostile)> = LazyLock::new(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let hostile = Hostile::new(folder.path());
        (folder, hostile)
    });

    /// Numbers at which arithmetic goes wrong, or any.
    fn value() -> impl Strategy<Value = u64> {
        let edges = prop::sample::select(vec![0, 1, 127, 128, 4096, 1 << 28, 1 << 44, 1 << 63]);
        prop_oneof![
            (edges, 0_u64..2).prop_map(|(edge, less): (u64, u64)| edge.wrapping_sub(less)),
            0_u64..16,
            any::<u64>()
        ]
    }

    /// Input of `Hostile::check`: the parser, flags of a file, and changes.
    fn input(which: u8) -> impl Strategy<Value = Vec<u8>> {
        // A field, near the front of a page, or anywhere.
        let field = (0_u32..50).prop_map(|number| 4 * number);
        let place = prop_oneof![field, 0_u32..4096, 0_u32..(1 << 24)];
        let change = (any::<u8>(), place, any::<u8>(), value());
        let is_file = which == FILE;
        (prop::bits::u8::ANY, prop::collection::vec(change, 1..6)).prop_map(
            move |(flags, changes)| {
                let mut input = vec![which];
                input.extend(is_file.then_some(flags));
                for (part, place, kind, value) in changes {
                    input.extend(is_file.then_some(part));
                    input.extend(&place.to_le_bytes()[..3]);
                    input.push(kind);
                    input.extend(value.to_le_bytes());
                }
                input
            },
        )
    }

    const FILE: u8 = 5;

    /// The number of the newest generation was believed whatever it was, and counting on from 2^64 - 1
    /// overflowed. No generation is beyond 2^62 now.
    #[test]
    fn a_store_of_the_last_generation_there_is_is_refused() {
        let change = [&[FILE, 0, 3, 24, 0, 0, 3][..], &[0xff; 8]].concat();
        HOSTILE.1.check(&change);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn bytes_of_any_kind_are_refused_or_consistent(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
            HOSTILE.1.check(&[&[0][..], &bytes].concat());
        }

        #[test]
        fn spoilt_headers_superblocks_and_tables_are_refused_or_consistent(
            input in (1_u8..4).prop_flat_map(input)
        ) {
            HOSTILE.1.check(&input);
        }

        #[test]
        fn spoilt_manifests_are_refused_or_have_a_layout(input in input(4)) {
            HOSTILE.1.check(&input);
        }

        #[test]
        fn spoilt_files_are_refused_or_can_be_read_and_written(input in input(FILE)) {
            HOSTILE.1.check(&input);
        }
    }
}
