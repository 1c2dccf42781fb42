//! Opening: believe nothing before it was flushed and checked, and find the newest whole state.

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

mod glance;

pub use glance::Glance;

/// A locked file whose header and manifest hold.
pub(super) struct Opened {
    pub(super) file: Arc<DirectFile>,
    pub(super) engine: Arc<dyn Engine>,
    pub(super) engine_note: Option<String>,
    pub(super) header: Header,
    pub(super) manifest: Manifest,
    pub(super) layout: Layout,
    /// The kernel's id of this boot.
    pub(super) boot_id: [u8; 16],
}

pub(super) fn open(file: DirectFile, options: OpenOptions, ledger: &Ledger) -> Result<Store> {
    let file = Arc::new(file);
    let (engine, engine_note) = choice::start(options.engine)?;
    file::sync_directory(file.path())?;
    open_on(file, engine, engine_note, file::boot_id(), ledger)
}

/// Opens the store in a file that this process has locked.
pub(super) fn open_on(
    file: Arc<DirectFile>,
    engine: Arc<dyn Engine>,
    engine_note: Option<String>,
    boot_id: [u8; 16],
    ledger: &Ledger,
) -> Result<Store> {
    // What a crashed process wrote may sit in a volatile cache: readable now, gone after the next
    // power cut. Nothing may be believed before it is on stable storage.
    engine::perform(&*engine, Operation::Sync, &file, 0, None).1?;
    let header = read_header(&*engine, &file)?;
    let bytes = file.bytes()?;
    if bytes < header.file_bytes {
        let expected = header.file_bytes;
        return Err(Error::format(
            file.path(),
            format!(
                "the file has {bytes} bytes and should have {expected}: it was truncated. Restore a copy or import the model again"
            ),
        ));
    }
    let (manifest, layout) = read_manifest(&*engine, &file, &header)?;
    let opened = Opened { file, engine, engine_note, header, manifest, layout, boot_id };
    choose(opened, ledger)
}

/// Takes the newest superblock whose table and blob hold, and whose chunks hold where that must be
/// looked at.
fn choose(opened: Opened, ledger: &Ledger) -> Result<Store> {
    let path = opened.file.path().to_owned();
    let mut candidates = Vec::new();
    for (side, offsets) in SUPERBLOCK_OFFSETS.iter().enumerate() {
        candidates.extend(read_superblock(&opened, offsets).map(|s| (side, s)));
    }
    candidates.sort_by_key(|(_, superblock)| std::cmp::Reverse(superblock.generation));
    let Some((newest_side, newest)) = candidates.first().cloned() else {
        return Err(Error::format(
            path,
            "no superblock holds: the import into this store did not finish, or both were destroyed. Import the model again",
        ));
    };
    // Without a readable marker the stop was not clean: that is all it can say.
    let marker = read(&*opened.engine, &opened.file, CLEAN_MARKER_OFFSET, PAGE_BYTES).ok();
    let whole = candidates.into_iter().filter_map(|(side, superblock)| {
        read_state(&opened, superblock, side).map(|state| (side, state))
    });
    let mut whole = whole.collect::<Vec<_>>().into_iter();
    let Some((mut side, committed)) = whole.next() else {
        return Err(Error::format(
            path,
            "neither superblock's table and trainer state hold: the drive lost data that it had confirmed. Restore an export or import the model again",
        ));
    };
    let is_newest = committed.generation == newest.generation;
    let is_clean = marker.is_some_and(|marker| committed.superblock.is_vouched_for_by(&marker));
    // After a mere kill the kernel still had every completed write, and the sync above made it durable.
    let same_boot = committed.superblock.boot_id == opened.boot_id && opened.boot_id != [0; 16];
    let mut store = assemble(opened, Some(committed), ledger)?;
    if !(is_newest && (is_clean || same_boot)) {
        side = verify_or_fall_back(&mut store, side, whole.next())?;
    }
    if side != newest_side {
        store.rejected = Mutex::new(Some(newest_side));
        store.fell_back_from = Some(newest.generation);
    }
    Ok(store)
}

/// Reads everything back; if it does not hold, goes to the older state if that one does. Returns the
/// side of the state that was chosen.
fn verify_or_fall_back(
    store: &mut Store,
    side: usize,
    older: Option<(usize, Committed)>,
) -> Result<usize> {
    let newest = store.verify(&mut |_, _| true)?;
    let Some(damage) = newest.damaged.first() else {
        store.verified = Some(newest);
        return Ok(side);
    };
    let Some((older_side, older)) = older else {
        return Err(damage.error.clone());
    };
    let generation = older.generation;
    *store.committed_guard() = older;
    let report = store.verify(&mut |_, _| true)?;
    if !report.damaged.is_empty() {
        return Err(both_damaged(store, generation, &newest, &report));
    }
    store.verified = Some(report);
    Ok(older_side)
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
    ledger: &Ledger,
) -> Result<Store> {
    let Opened { file, engine, engine_note, header, manifest, layout, boot_id } = opened;
    let incarnation = u64::from_le_bytes(file::random_uuid()?[..8].try_into().unwrap_or_default());
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
    // Committed and working table, the one that a commit makes committed, and the layout.
    let chunk_bytes = size_of_val(layout.chunks()) + layout.entry_count() * size_of::<usize>();
    let tables = ledger.enter("tables", (3 * Table::memory_bytes(&layout) + chunk_bytes) as u64);
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
        rejected: Mutex::new(None),
        fell_back_from: None,
        incarnation,
        boot_id,
        process: std::process::id(),
        verified: None,
        _tables: tables,
    })
}

fn read(engine: &dyn Engine, file: &Arc<DirectFile>, offset: u64, bytes: usize) -> Result<Slot> {
    let slot = Slot::standalone(bytes, &Ledger::new(), "open")?;
    let (slot, result) = engine::perform(engine, Operation::Read, file, offset, Some(slot));
    result?;
    slot.ok_or_else(|| Error::invalid("the engine kept a slot"))
}

/// The header, from its first place or its copy.
fn read_header(engine: &dyn Engine, file: &Arc<DirectFile>) -> Result<Header> {
    let bytes = file.bytes()?;
    if bytes < HEADER_OFFSETS[1] + PAGE_BYTES as u64 {
        return Err(Error::format(
            file.path(),
            format!("not a megatrain-io store: it has {bytes} bytes only"),
        ));
    }
    let mut unreadable = None;
    for offset in HEADER_OFFSETS {
        match read(engine, file, offset, PAGE_BYTES) {
            Ok(page) => {
                let header =
                    Header::decode(&page).map_err(|reason| Error::format(file.path(), reason))?;
                if let Some(header) = header {
                    return Ok(header);
                }
            }
            Err(error) => unreadable = Some(error),
        }
    }
    Err(unreadable.unwrap_or_else(|| {
        Error::format(
            file.path(),
            "not a megatrain-io store (no header holds), or both headers were destroyed",
        )
    }))
}

/// The manifest and the layout that follows from it; both must be what the header was made from.
fn read_manifest(
    engine: &dyn Engine,
    file: &Arc<DirectFile>,
    header: &Header,
) -> Result<(Manifest, Layout)> {
    let damaged = |reason: String| Error::format(file.path(), reason);
    let inside = header.manifest_offset.checked_add(header.manifest_bytes);
    let inside = inside.is_some_and(|end| end <= header.file_bytes);
    if header.manifest_bytes > MANIFEST_BYTES_MAX as u64
        || !inside
        || !file::is_aligned(header.manifest_offset)
    {
        let (bytes, offset) = (header.manifest_bytes, header.manifest_offset);
        return Err(damaged(format!("the header places a manifest of {bytes} bytes at {offset}")));
    }
    let bytes = to_usize(header.manifest_bytes);
    let text = read(engine, file, header.manifest_offset, bytes.max(1))?;
    if crc64(&text[..bytes]) != header.manifest_crc {
        return Err(damaged(
            "the manifest's checksum does not hold: the file is damaged. Restore a copy or import the model again".into(),
        ));
    }
    let manifest = Manifest::parse(&text[..bytes]).map_err(damaged)?;
    let layout = Layout::new(&manifest).map_err(damaged)?;
    let rebuilt = Header::new(header.uuid, &layout, &text[..bytes]);
    if rebuilt.map(|rebuilt| Header { set_uuid: header.set_uuid, ..rebuilt }).as_ref()
        != Some(header)
    {
        return Err(damaged("the header contradicts the manifest: the file is damaged".into()));
    }
    Ok((manifest, layout))
}

/// The superblock of one side, from its first place or its mirror; an unreadable page is none.
fn read_superblock(opened: &Opened, offsets: &[u64; 2]) -> Option<Superblock> {
    offsets.iter().find_map(|offset| {
        let page = read(&*opened.engine, &opened.file, *offset, PAGE_BYTES).ok()?;
        Superblock::decode(&page).filter(|s| {
            s.uuid == opened.header.uuid && s.manifest_crc == opened.header.manifest_crc
        })
    })
}

/// Table and blob of a superblock, or `None` when one of them cannot be read or does not hold.
fn read_state(opened: &Opened, superblock: Superblock, side: usize) -> Option<Committed> {
    let Opened { engine, file, header, layout, .. } = opened;
    let right_side = usize::from(superblock.generation & 1 == 1) == side;
    if !right_side || superblock.blob_bytes > BLOB_BYTES_MAX as u64 {
        return None;
    }
    let table_bytes = to_usize(header.table_bytes);
    let bytes = read(&**engine, file, header.table_offsets[side], table_bytes).ok()?;
    if crc64(&bytes[..table_bytes]) != superblock.table_crc {
        return None;
    }
    let table = Table::decode(layout, superblock.generation, &bytes)?;
    let blob_bytes = to_usize(superblock.blob_bytes);
    let blob = read(&**engine, file, header.blob_offsets[side], blob_bytes.max(1)).ok()?;
    if crc64(&blob[..blob_bytes]) != superblock.blob_crc {
        return None;
    }
    Some(Committed {
        generation: superblock.generation,
        table: table.into(),
        blob: blob[..blob_bytes].into(),
        superblock,
    })
}
