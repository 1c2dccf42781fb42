//! Opening: believe nothing before it was flushed and checked, and find the newest whole state.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use crate::error::{Error, Result};
use crate::io::drives::Drives;
use crate::io::engine::choice::{self, Choice};
use crate::io::engine::faulty::{Fault, Faulty, Plan, Point};
use crate::io::engine::{self, Engine, Operation};
use crate::io::file::{self, DirectFile};
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::store::checksum::crc64;
use crate::store::header::{CLEAN_MARKER_OFFSET, HEADER_OFFSETS, Header, SUPERBLOCK_OFFSETS};
use crate::store::layout::{Durability, Layout, Manifest};
use crate::store::manifest::MANIFEST_BYTES_MAX;
use crate::store::state::{BLOB_BYTES_MAX, CommitBuffers, Committed, Store};
use crate::store::superblock::{Superblock, marked_generation};
use crate::store::table::Table;
use crate::store::verify::report::Report;
use crate::units::{PAGE_BYTES, to_usize};

mod inspect;
mod older;

pub use inspect::StoreInfo;
pub use older::OlderState;

/// Locked files whose headers and manifest hold.
pub(super) struct Opened {
    pub(super) drives: Drives,
    pub(super) engine: Arc<dyn Engine>,
    pub(super) engine_note: Option<String>,
    pub(super) header: Header,
    pub(super) manifest: Manifest,
    pub(super) layout: Layout,
    /// The life of kernel and mounts, by `Drives::life`.
    pub(super) life: [u8; 16],
}

/// What superblocks, tables and blobs are read with.
#[derive(Clone, Copy)]
struct Place<'a> {
    engine: &'a dyn Engine,
    file: &'a Arc<DirectFile>,
    header: &'a Header,
    layout: &'a Layout,
}

impl Opened {
    fn place(&self) -> Place<'_> {
        let Self { engine, drives, header, layout, .. } = self;
        Place { engine: &**engine, file: drives.main(), header, layout }
    }
}

/// How to open a store.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// How bytes move.
    pub engine: Choice,
    /// What goes wrong on purpose; for tests.
    pub faults: Vec<(Point, Fault)>,
}

impl Store {
    /// Opens a store at its newest whole generation. `paths` are its files, the main one first, in the
    /// order in which it was created.
    ///
    /// # Errors
    /// `InUse`, `Format`, `Corrupt`, `Unsupported`, `Io`; no file is changed by any of them.
    pub fn open(paths: &[PathBuf], options: OpenOptions, ledger: &Ledger) -> Result<Self> {
        Self::open_in(Drives::open_waiting(paths, &mut |_, _| Ok(()))?, options, ledger)
    }

    /// The same, in files that are open and locked already.
    ///
    /// # Errors
    /// As `open`, but for `InUse`.
    pub fn open_in(drives: Drives, options: OpenOptions, ledger: &Ledger) -> Result<Self> {
        let (mut engine, note) = choice::start(options.engine, drives.count())?;
        if !options.faults.is_empty() {
            let plan = Plan { faults: options.faults, ..Plan::default() };
            engine = Arc::new(Faulty::over(engine, plan));
        }
        drives.iter().try_for_each(|file| file::sync_directory(file.path()))?;
        let life = drives.life();
        open_on(drives, engine, note, life, ledger)
    }

    /// Opens the store in files that this process has locked, over an engine that runs.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn open_on(
        drives: &Drives,
        engine: Arc<dyn Engine>,
        life: [u8; 16],
        ledger: &Ledger,
    ) -> Result<Self> {
        open_on(drives.clone(), engine, None, life, ledger)
    }

    /// Bytes in the ledger of a store with this layout, once it is open.
    #[must_use]
    pub fn memory_bytes(layout: &Layout) -> u64 {
        let encoded = Table::encoded_bytes(layout).next_multiple_of(PAGE_BYTES);
        table_bytes(layout) + (encoded + BLOB_BYTES_MAX + PAGE_BYTES) as u64
    }
}

/// Opens the store in files that this process has locked.
fn open_on(
    drives: Drives,
    engine: Arc<dyn Engine>,
    engine_note: Option<String>,
    life: [u8; 16],
    ledger: &Ledger,
) -> Result<Store> {
    // What a crashed process wrote may sit in a volatile cache: readable now, gone after the next
    // power cut. Nothing may be believed before it is on stable storage.
    for file in drives.iter() {
        engine::perform(&*engine, Operation::Sync, file, 0, None).1?;
    }
    choose(read_files(drives, engine, engine_note, life)?, ledger)
}

/// Headers and manifest, which must be those of one store and of these files.
fn read_files(
    drives: Drives,
    engine: Arc<dyn Engine>,
    engine_note: Option<String>,
    life: [u8; 16],
) -> Result<Opened> {
    let headers: Vec<Header> =
        drives.iter().map(|file| read_header(&*engine, file)).collect::<Result<_>>()?;
    let header = headers[0].clone();
    for (index, (file, found)) in drives.iter().zip(&headers).enumerate() {
        check_place(file.path(), found, &header, (index, drives.count()))?;
        let (bytes, expected) = (file.bytes()?, found.file_bytes);
        if bytes < expected {
            return Err(Error::format(
                file.path(),
                format!(
                    "the file has {bytes} bytes and should have {expected}: it was truncated. Restore a copy or import the model again"
                ),
            ));
        }
    }
    let (manifest, layout) = read_manifest(&*engine, &drives, &headers)?;
    Ok(Opened { drives, engine, engine_note, header, manifest, layout, life })
}

/// Whether a file is the `place.0`-th of the `place.1` files that were given for the store of `main`.
fn check_place(path: &Path, found: &Header, main: &Header, place: (usize, usize)) -> Result {
    let (drive, drives) = (found.drive.0 as usize, found.drive.1 as usize);
    let (number, given) = (place.0 + 1, place.1);
    if found.uuid != main.uuid {
        return Err(Error::format(
            path,
            "it belongs to another store than the first file. Give the folders of memory.store_dir as at the import",
        ));
    }
    if drives != given || drive != place.0 {
        return Err(Error::format(
            path,
            format!(
                "it is file {} of {drives} of its store, and was given as file {number} of {given}. Give the folders of memory.store_dir as at the import, in the same order",
                drive + 1
            ),
        ));
    }
    Ok(())
}

/// Takes the newest superblock whose table and blob hold, and whose chunks hold where that must be
/// looked at.
fn choose(opened: Opened, ledger: &Ledger) -> Result<Store> {
    let path = opened.drives.path().to_owned();
    let mut candidates = Vec::new();
    for side in 0..SUPERBLOCK_OFFSETS.len() {
        let found = read_superblock(&opened.place(), side)?;
        candidates.extend(found.map(|s| (side, s)));
    }
    candidates.sort_by_key(|(_, superblock)| std::cmp::Reverse(superblock.generation));
    let Some((newest_side, newest)) = candidates.first().cloned() else {
        return Err(Error::format(
            path,
            "no superblock holds: the import into this store did not finish, or both were destroyed. Import the model again",
        ));
    };
    // Without a readable marker the stop was not clean: that is all it can say.
    let marker = read(&*opened.engine, opened.drives.main(), CLEAN_MARKER_OFFSET, PAGE_BYTES).ok();
    let mut whole = Vec::new();
    for (side, superblock) in candidates {
        let found = read_state(&opened.place(), superblock, side)?;
        whole.extend(found.map(|state| (side, state)));
    }
    let mut whole = whole.into_iter();
    let Some((mut side, committed)) = whole.next() else {
        return Err(Error::format(
            path,
            "neither superblock's table and trainer state hold: the drive lost data that it had confirmed. Restore an export or import the model again",
        ));
    };
    let is_newest = committed.generation == newest.generation;
    let is_clean =
        marker.as_ref().is_some_and(|marker| committed.superblock.is_vouched_for_by(marker));
    // A marker of a newer generation: both places of its superblock are gone.
    let lost = marker.as_ref().and_then(|page| marked_generation(page, &opened.header.uuid));
    let lost = lost.filter(|generation| *generation > newest.generation);
    // After a mere kill the kernel still had every completed write, and the sync above made it durable. A file system
    // that had turned read-only took writes and never made them: after its next mount this is another life.
    let same_life = committed.superblock.life == opened.life && opened.life != [0; 16];
    if opened.manifest.durability == Durability::Scratch && !(is_newest && is_clean) {
        return Err(Error::format(
            path,
            "with durability scratch only a store that was closed can be opened again, and this one was not: its \
             state is lost. Import the model again",
        ));
    }
    let mut store = assemble(opened, Some(committed), ledger)?;
    if lost.is_some() || !(is_newest && (is_clean || same_life)) {
        side = verify_or_fall_back(&mut store, side, whole.next())?;
    }
    // Never the side that was chosen: it is zeroed before the first write.
    let lost_side = lost.map(|generation| usize::from(generation & 1 == 1));
    let rejected = if side != newest_side { Some(newest_side) } else { lost_side };
    store.rejected = Mutex::new(rejected.filter(|rejected| *rejected != side));
    store.fell_back_from = lost.or((side != newest_side).then_some(newest.generation));
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
        store.drives.path(),
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
    let Opened { drives, engine, engine_note, header, manifest, layout, life } = opened;
    let incarnation = u64::from_le_bytes(file::random_uuid()?[..8].try_into().unwrap_or_default());
    let committed = committed.unwrap_or_else(|| Committed {
        generation: 0,
        table: Table::empty(&layout).into(),
        blob: [].into(),
        superblock: Superblock {
            uuid: header.uuid,
            generation: 0,
            incarnation,
            life,
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
    let tables = ledger.enter("tables", table_bytes(&layout));
    Ok(Store {
        drives,
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
        life,
        process: std::process::id(),
        verified: None,
        chunk_units: OnceLock::new(),
        _tables: tables,
    })
}

/// Committed and working table, the one that a commit makes committed, and the layout.
fn table_bytes(layout: &Layout) -> u64 {
    let chunks = size_of_val(layout.chunks()) + layout.entry_count() * size_of::<usize>();
    (3 * Table::memory_bytes(layout) + chunks) as u64
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

/// The manifest and the layout that follows from it; both must be what the headers were made from.
fn read_manifest(
    engine: &dyn Engine,
    drives: &Drives,
    headers: &[Header],
) -> Result<(Manifest, Layout)> {
    let (file, header) = (drives.main(), &headers[0]);
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
    for (drive, (file, header)) in drives.iter().zip(headers).enumerate() {
        let rebuilt = (layout.drives() == headers.len())
            .then(|| Header::new(header.uuid, &layout, &text[..bytes], drive))
            .flatten();
        // What a store was made with stays: all its files say the same.
        let (set_uuid, minor) = (header.set_uuid, headers[0].minor);
        let rebuilt = rebuilt.map(|rebuilt| Header { set_uuid, minor, ..rebuilt });
        if rebuilt.as_ref() != Some(header) {
            let reason = "the header contradicts the manifest: the file is damaged";
            return Err(Error::format(file.path(), reason));
        }
    }
    Ok((manifest, layout))
}

/// The superblock of one side: the newer of those that hold in its first place and its mirror, since
/// the drive may have lost either write. An unreadable page is none, and so is one of the other side.
fn read_superblock(place: &Place<'_>, side: usize) -> Result<Option<Superblock>> {
    let Place { engine, file, header, .. } = *place;
    let mut newest: Option<Superblock> = None;
    for offset in SUPERBLOCK_OFFSETS[side] {
        let page = unless_unreadable(read(engine, file, offset, PAGE_BYTES))?;
        let found = page.and_then(|page| Superblock::decode(&page)).filter(|s| {
            s.uuid == header.uuid
                && s.manifest_crc == header.manifest_crc
                && usize::from(s.generation & 1 == 1) == side
        });
        if found.as_ref().map(|s| s.generation) > newest.as_ref().map(|s| s.generation) {
            newest = found;
        }
    }
    Ok(newest)
}

/// `None` for what the drive could not read, twice. Any other failure (no memory, say) is not the
/// drive's, and must not make an older state count.
fn unless_unreadable<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_worth_a_retry() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Table and blob of a superblock, or `None` when one of them is unreadable or does not hold.
fn read_state(place: &Place<'_>, superblock: Superblock, side: usize) -> Result<Option<Committed>> {
    let Place { engine, file, header, layout } = *place;
    if superblock.blob_bytes > BLOB_BYTES_MAX as u64 {
        return Ok(None);
    }
    let table_bytes = to_usize(header.table_bytes);
    let bytes = read(engine, file, header.table_offsets[side], table_bytes);
    let bytes = unless_unreadable(bytes)?;
    let Some(table) =
        bytes.filter(|bytes| crc64(&bytes[..table_bytes]) == superblock.table_crc).and_then(
            |bytes| Table::decode(layout, superblock.generation, header.has_own_updates(), &bytes),
        )
    else {
        return Ok(None);
    };
    let blob_bytes = to_usize(superblock.blob_bytes);
    let blob = read(engine, file, header.blob_offsets[side], blob_bytes.max(1));
    let Some(blob) =
        unless_unreadable(blob)?.filter(|blob| crc64(&blob[..blob_bytes]) == superblock.blob_crc)
    else {
        return Ok(None);
    };
    Ok(Some(Committed {
        generation: superblock.generation,
        table: table.into(),
        blob: blob[..blob_bytes].into(),
        superblock,
    }))
}

#[cfg(test)]
mod tests;
