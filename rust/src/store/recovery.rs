//! Opening: believe nothing before it was flushed and checked, and find the newest whole state.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use crate::buffer::Slot;
use crate::checksum::crc64;
use crate::engine::{self, Engine, Operation, choice};
use crate::error::{Error, Result};
use crate::file::{self, DirectFile};
use crate::layout::{Layout, MANIFEST_BYTES_MAX, Manifest};
use crate::ledger::Ledger;
use crate::store::header::{CLEAN_MARKER_OFFSET, HEADER_OFFSETS, Header, SUPERBLOCK_OFFSETS};
use crate::store::superblock::Superblock;
use crate::store::verify::Report;
use crate::store::{BLOB_BYTES_MAX, CommitBuffers, Committed, OpenOptions, Store, Table};
use crate::units::{PAGE_BYTES, to_usize};

/// A locked file whose header and manifest hold.
pub(super) struct Opened {
    pub(super) file: Arc<DirectFile>,
    pub(super) engine: Arc<dyn Engine>,
    pub(super) engine_note: Option<String>,
    pub(super) header: Header,
    pub(super) manifest: Manifest,
    pub(super) layout: Layout,
}

pub(super) fn open(path: &Path, options: OpenOptions, ledger: &Ledger) -> Result<Store> {
    let file = Arc::new(DirectFile::open(path)?);
    let (engine, engine_note) = choice::start(options.engine)?;
    // What a crashed process wrote may sit in a volatile cache: readable now, gone after the next
    // power cut. Nothing may be believed before it is on stable storage.
    engine::perform(&*engine, Operation::Sync, &file, 0, None).1?;
    file::sync_directory(path)?;
    let header = read_header(&*engine, &file)?;
    let manifest = read_manifest(&*engine, &file, &header)?;
    let layout = Layout::new(&manifest).map_err(|e| Error::format(path, e))?;
    check_geometry(&file, &header, &layout)?;
    let opened = Opened { file, engine, engine_note, header, manifest, layout };
    choose(opened, options, ledger)
}

/// Takes the newest superblock whose table and blob hold, and whose chunks hold where that must be
/// looked at.
fn choose(opened: Opened, options: OpenOptions, ledger: &Ledger) -> Result<Store> {
    let path = opened.file.path().to_owned();
    let mut candidates = Vec::new();
    for (side, offsets) in SUPERBLOCK_OFFSETS.iter().enumerate() {
        candidates.extend(read_superblock(&opened, offsets)?.map(|s| (side, s)));
    }
    candidates.sort_by_key(|(_, superblock)| std::cmp::Reverse(superblock.generation));
    if candidates.is_empty() {
        return Err(Error::format(
            path,
            "no superblock holds: the import into this store did not finish, or both were destroyed. Import the model again",
        ));
    }
    let newest = candidates[0].clone();
    let marker = read(&*opened.engine, &opened.file, CLEAN_MARKER_OFFSET, PAGE_BYTES)?;
    let mut whole = Vec::new();
    for (side, superblock) in candidates {
        if let Some(committed) = read_state(&opened, superblock, side)? {
            whole.push((side, committed));
        }
    }
    let mut whole = whole.into_iter();
    let Some((mut side, committed)) = whole.next() else {
        return Err(Error::format(
            path,
            "neither superblock's table and trainer state hold: the drive lost data that it had confirmed. Restore an export or import the model again",
        ));
    };
    let is_newest = committed.generation == newest.1.generation;
    let is_clean = is_newest && committed.superblock.is_vouched_for_by(&marker);
    // After a mere kill the kernel still had every completed write, and the sync above made it durable.
    let same_boot =
        is_newest && committed.superblock.boot_id == file::boot_id() && file::boot_id() != [0; 16];
    let mut store = assemble(opened, Some(committed), None, None, ledger)?;
    if options.verify_all || !(is_clean || same_boot) {
        let mut report = store.verify(&mut |_, _| {})?;
        if !report.damaged.is_empty()
            && let Some((older_side, older)) = whole.next()
        {
            let first = report;
            side = older_side;
            let generation = older.generation;
            *store.committed_guard() = older;
            report = store.verify(&mut |_, _| {})?;
            if !report.damaged.is_empty() {
                return Err(both_damaged(&store, generation, &first, &report));
            }
        }
        if let Some(damage) = report.damaged.first() {
            return Err(damage.error.clone());
        }
        store.verified = Some(report);
    }
    let chosen = store.committed();
    store.rejected =
        (chosen.generation != newest.1.generation && newest.0 != side).then_some(newest.0);
    Ok(store)
}

fn both_damaged(store: &Store, older: u64, newest_report: &Report, older_report: &Report) -> Error {
    Error::format(
        store.file.path(),
        format!(
            "generation {} fails {} of {} extents and generation {older} fails {}: the drive lost data that it had \
             confirmed. Nothing was changed. Restore an export or import the model again",
            older + 1,
            newest_report.damaged.len(),
            newest_report.extents,
            older_report.damaged.len()
        ),
    )
}

pub(super) fn assemble(
    opened: Opened,
    committed: Option<Committed>,
    rejected: Option<usize>,
    verified: Option<Report>,
    ledger: &Ledger,
) -> Result<Store> {
    let Opened { file, engine, engine_note, header, manifest, layout } = opened;
    let incarnation = u64::from_le_bytes(file::random_uuid()?[..8].try_into().unwrap_or_default());
    let boot_id = file::boot_id();
    let committed = committed.unwrap_or_else(|| Committed {
        generation: 0,
        table: Table::empty(&layout).into(),
        blob: [].into(),
        superblock: Superblock {
            uuid: header.uuid,
            generation: 0,
            incarnation,
            boot_id,
            table_crc: 0,
            blob_bytes: 0,
            blob_crc: 0,
            manifest_crc: header.manifest_crc,
        },
    });
    let slot = |bytes| Slot::standalone(bytes, ledger, "tables").map(Some);
    let buffers = CommitBuffers {
        table: slot(to_usize(header.table_bytes))?,
        blob: slot(BLOB_BYTES_MAX)?,
        page: slot(PAGE_BYTES)?,
    };
    // Committed and working table, and the layout they are read with.
    let chunk_bytes = size_of_val(layout.chunks()) + layout.entry_count() * size_of::<usize>();
    let tables = ledger.enter("tables", (2 * Table::memory_bytes(&layout) + chunk_bytes) as u64);
    Ok(Store {
        file,
        engine,
        engine_note,
        header,
        manifest,
        layout: layout.into(),
        ledger: ledger.clone(),
        committed: Mutex::new(committed),
        buffers: Mutex::new(buffers),
        failed: OnceLock::new(),
        writable: AtomicBool::new(false),
        rejected,
        incarnation,
        boot_id,
        process: std::process::id(),
        verified,
        _tables: tables,
    })
}

fn read(engine: &dyn Engine, file: &Arc<DirectFile>, offset: u64, bytes: usize) -> Result<Slot> {
    let slot = Slot::standalone(bytes, &Ledger::new(), "open")?;
    let (slot, result) = engine::perform(engine, Operation::Read, file, offset, Some(slot));
    result?;
    slot.ok_or_else(|| Error::invalid("the engine kept a slot"))
}

fn read_header(engine: &dyn Engine, file: &Arc<DirectFile>) -> Result<Header> {
    if file.bytes()? < HEADER_OFFSETS[1] + PAGE_BYTES as u64 {
        return Err(Error::format(
            file.path(),
            format!("not a megatrain-io store: it has {} bytes only", file.bytes()?),
        ));
    }
    for offset in HEADER_OFFSETS {
        let page = read(engine, file, offset, PAGE_BYTES)?;
        if let Some(header) =
            Header::decode(&page).map_err(|reason| Error::format(file.path(), reason))?
        {
            return Ok(header);
        }
    }
    Err(Error::format(
        file.path(),
        "not a megatrain-io store (no header holds), or both headers were destroyed",
    ))
}

fn read_manifest(engine: &dyn Engine, file: &Arc<DirectFile>, header: &Header) -> Result<Manifest> {
    let inside = header
        .manifest_offset
        .checked_add(header.manifest_bytes)
        .is_some_and(|end| end <= header.file_bytes);
    if header.manifest_bytes > MANIFEST_BYTES_MAX as u64
        || !inside
        || !file::is_aligned(header.manifest_offset)
    {
        return Err(Error::format(
            file.path(),
            format!(
                "the header places a manifest of {} bytes at {}",
                header.manifest_bytes, header.manifest_offset
            ),
        ));
    }
    let bytes = to_usize(header.manifest_bytes);
    let text = read(engine, file, header.manifest_offset, bytes.max(1))?;
    if crc64(&text[..bytes]) != header.manifest_crc {
        return Err(Error::format(
            file.path(),
            "the manifest's checksum does not hold: the file is damaged. Restore a copy or import the model again",
        ));
    }
    Manifest::parse(&text[..bytes]).map_err(|reason| Error::format(file.path(), reason))
}

fn check_geometry(file: &DirectFile, header: &Header, layout: &Layout) -> Result {
    let text = |reason: String| Error::format(file.path(), reason);
    let tables = Table::encoded_bytes(layout) as u64;
    let holds = header.table_bytes >= tables
        && header.table_bytes < tables + PAGE_BYTES as u64
        && header.data_offset.checked_add(layout.data_bytes()) == Some(header.file_bytes)
        && [
            header.table_offsets[0],
            header.table_offsets[1],
            header.blob_offsets[0],
            header.blob_offsets[1],
            header.data_offset,
        ]
        .iter()
        .all(|offset| *offset < header.file_bytes && file::is_aligned(*offset));
    if !holds {
        return Err(text("the header contradicts the manifest: the file is damaged".into()));
    }
    let bytes = file.bytes()?;
    if bytes < header.file_bytes {
        return Err(text(format!(
            "the file has {bytes} bytes and should have {}: it was truncated. Restore a copy or import the model again",
            header.file_bytes
        )));
    }
    Ok(())
}

/// The superblock of one side, from its first place or its mirror.
fn read_superblock(opened: &Opened, offsets: &[u64; 2]) -> Result<Option<Superblock>> {
    for offset in offsets {
        let page = read(&*opened.engine, &opened.file, *offset, PAGE_BYTES)?;
        let ours = |s: &Superblock| {
            s.uuid == opened.header.uuid && s.manifest_crc == opened.header.manifest_crc
        };
        if let Some(superblock) = Superblock::decode(&page).filter(ours) {
            return Ok(Some(superblock));
        }
    }
    Ok(None)
}

/// Table and blob of a superblock, or `None` when one of them does not hold.
fn read_state(opened: &Opened, superblock: Superblock, side: usize) -> Result<Option<Committed>> {
    let Opened { engine, file, header, layout, .. } = opened;
    let right_side = usize::from(superblock.generation & 1 == 1) == side;
    if !right_side || superblock.blob_bytes > BLOB_BYTES_MAX as u64 {
        return Ok(None);
    }
    let table_bytes = to_usize(header.table_bytes);
    let bytes = read(&**engine, file, header.table_offsets[side], table_bytes)?;
    if crc64(&bytes[..table_bytes]) != superblock.table_crc {
        return Ok(None);
    }
    let Some(table) = Table::decode(layout, superblock.generation, &bytes) else { return Ok(None) };
    let blob_bytes = to_usize(superblock.blob_bytes);
    let blob = read(&**engine, file, header.blob_offsets[side], blob_bytes.max(1))?;
    if crc64(&blob[..blob_bytes]) != superblock.blob_crc {
        return Ok(None);
    }
    Ok(Some(Committed {
        generation: superblock.generation,
        table: table.into(),
        blob: blob[..blob_bytes].into(),
        superblock,
    }))
}
