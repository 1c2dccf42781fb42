//! Making a store: all space is reserved first, then the imported weights are written, then the
//! first commit makes it a store.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::drives::{self, Drives};
use crate::io::engine::choice::{self, Choice};
use crate::io::engine::{self, Engine, Operation};
use crate::io::file::{self, DirectFile};
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::store::checksum;
use crate::store::header::{HEADER_OFFSETS, Header};
use crate::store::layout::{Layout, Manifest};
use crate::store::recovery::{self, OpenOptions, Opened};
use crate::store::state::Store;
use crate::store::table::Table;
use crate::units::{Group, PAGE_BYTES};

/// A store that is being filled. Until `finish` its files lie under temporary names next to their
/// final ones; dropping it removes them.
#[derive(Debug)]
pub struct StoreCreator {
    store: Option<Store>,
    working: Table,
    paths: Vec<PathBuf>,
}

impl StoreCreator {
    /// Reserves the space and writes header and manifest. There is a path for each drive, the main
    /// file's first; the manifest's number of drives follows them.
    ///
    /// # Errors
    /// `NoSpace`, `Format` when a store is already there, `Unsupported`, `Io`; nothing is left behind.
    pub fn new(
        paths: &[PathBuf],
        manifest: Manifest,
        engine: Choice,
        ledger: &Ledger,
    ) -> Result<Self> {
        drives::check_count(paths.len())?;
        let (engine, engine_note) = choice::start(engine, paths.len())?;
        Self::over(engine, engine_note, paths, manifest, ledger)
    }

    /// The same, over an engine that runs.
    pub(crate) fn over(
        engine: Arc<dyn Engine>,
        engine_note: Option<String>,
        paths: &[PathBuf],
        manifest: Manifest,
        ledger: &Ledger,
    ) -> Result<Self> {
        drives::refuse_one_twice(paths)?;
        check_names(paths)?;
        let manifest = Manifest { drives: paths.len(), ..manifest };
        let invalid = |reason: String| Error::invalid(reason);
        let layout = Layout::new(&manifest).map_err(invalid)?;
        let text = serde_json::to_vec(&manifest).map_err(|e| Error::invalid(e.to_string()))?;
        // Whatever reads it later must find it acceptable.
        Manifest::parse(&text).map_err(invalid)?;
        let uuid = file::random_uuid()?;
        let header = |drive| {
            Header::new(uuid, &layout, &text, drive)
                .ok_or_else(|| Error::invalid("the store is too large to address"))
        };
        let headers = (0..paths.len()).map(header).collect::<Result<Vec<_>>>()?;
        let mut places = Vec::new();
        for (path, header) in paths.iter().zip(&headers) {
            let partial = partial_path(path);
            if partial.exists() {
                // Left by an import that was killed. The lock tells whether that one still runs.
                DirectFile::open(&partial)?.remove()?;
            }
            places.push((partial, header.file_bytes));
        }
        let drives = Drives::create(&places)?;
        let (header, life) = (headers[0].clone(), drives.life());
        let files = drives.clone();
        let opened = Opened { drives, engine, engine_note, header, manifest, layout, life };
        let made = Self::fill(opened, &headers, &text, ledger);
        let (store, working) = made.inspect_err(|_| remove_unfinished(&files, paths))?;
        Ok(Self { store: Some(store), working, paths: paths.into() })
    }

    /// Writes manifest and headers.
    fn fill(
        opened: Opened,
        headers: &[Header],
        text: &[u8],
        ledger: &Ledger,
    ) -> Result<(Store, Table)> {
        let working = Table::empty(&opened.layout);
        let mut slot = Slot::standalone(text.len().max(PAGE_BYTES), ledger, "import")?;
        slot[..text.len()].copy_from_slice(text);
        let store = recovery::assemble(opened, None, ledger)?;
        let offset = store.header.manifest_offset;
        let file = store.drives.main();
        engine::perform(&*store.engine, Operation::Write, file, offset, Some(slot)).1?;
        for (file, header) in store.drives.iter().zip(headers) {
            for offset in HEADER_OFFSETS {
                store.write_page_of(file, &header.encode()[..], offset)?;
            }
        }
        Ok((store, working))
    }

    /// UUID of the store that is being made.
    ///
    /// # Errors
    /// `Invalid` after `finish`.
    pub fn uuid(&self) -> Result<[u8; 16]> {
        Ok(self.store()?.header.uuid)
    }

    /// The store's layout.
    ///
    /// # Errors
    /// `Invalid` after `finish`.
    pub fn layout(&self) -> Result<&Layout> {
        Ok(&self.store()?.layout)
    }

    /// Writes the first `planes` planes of a plane group from the front of `slot` and gives the slot
    /// back; bytes of the extent beyond the planes must be zero. Blocks.
    ///
    /// # Errors
    /// `Io`, `Invalid` when the slot is too small.
    pub fn write_group(
        &mut self,
        chunk: usize,
        group: Group,
        planes: usize,
        slot: Slot,
    ) -> Result<Slot> {
        let store = self.store.as_ref().ok_or_else(|| Error::invalid("the store is finished"))?;
        let plan = store.plan_write(&self.working, chunk, group, planes)?;
        let bytes = store.layout.chunks()[chunk].stored_bytes(group, planes);
        if planes == 0 || bytes > slot.len() {
            return Err(Error::invalid(format!(
                "{planes} planes in a slot of {} bytes",
                slot.len()
            )));
        }
        let (front, rest) = slot.split_at(bytes);
        let sums = checksum::sums(&plan.binding, &front);
        let (front, result) = engine::perform(
            &*store.engine,
            Operation::Write,
            store.drives.file(plan.drive),
            plan.offset,
            Some(front),
        );
        result?;
        self.working.set(&store.layout, chunk, group, plan.entry, &sums);
        Ok(front.ok_or_else(|| Error::invalid("the engine kept a slot"))?.join(rest))
    }

    /// Commits what was written as generation 1, gives the store its final name, and returns its UUID.
    ///
    /// # Errors
    /// `Io`; the temporary files are removed.
    pub fn finish(mut self, blob: &[u8]) -> Result<[u8; 16]> {
        let store = self.store.take().ok_or_else(|| Error::invalid("the store is finished"))?;
        let finished = store
            .commit(self.working.clone(), blob)
            .and_then(|_| store.mark_clean())
            .and_then(|()| store.drives.rename(&self.paths));
        if let Err(error) = finished {
            remove_unfinished(&store.drives, &self.paths);
            return Err(error);
        }
        Ok(store.header.uuid)
    }

    fn store(&self) -> Result<&Store> {
        self.store.as_ref().ok_or_else(|| Error::invalid("the store is finished"))
    }
}

impl Drop for StoreCreator {
    fn drop(&mut self) {
        if let Some(store) = self.store.take() {
            remove_unfinished(&store.drives, &self.paths);
        }
    }
}

fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.to_path_buf().into_os_string();
    name.push(".partial");
    name.into()
}

/// Removes the files of a store that did not come to be, by whichever of its two names each has.
fn remove_unfinished(drives: &Drives, paths: &[PathBuf]) {
    for (file, path) in drives.iter().zip(paths) {
        let names = [partial_path(path), path.clone()];
        // The first failure is the one to report; what cannot be removed cannot be helped here.
        names.iter().filter(|name| file.lies_at(name)).for_each(|name| drop(fs::remove_file(name)));
    }
}

fn check_names(paths: &[PathBuf]) -> Result {
    for path in paths {
        if fs::symlink_metadata(path).is_ok() {
            return Err(Error::format(
                path,
                "there is already a file of this name, perhaps a store that somebody trains; choose another place, or move it away",
            ));
        }
    }
    Ok(())
}

impl Store {
    /// Creates an empty store (every plane zero) and opens it; for tests and tools.
    ///
    /// # Errors
    /// As `StoreCreator::new` and `Store::open`.
    pub fn create_empty(
        paths: &[PathBuf],
        manifest: Manifest,
        options: OpenOptions,
        ledger: &Ledger,
    ) -> Result<Self> {
        StoreCreator::new(paths, manifest, options.engine, ledger)?.finish(&[])?;
        Self::open(paths, options, ledger)
    }
}
