//! Where gradients wait for the norm of all: in buffers of their own, or on the drive. The layout here is
//! that of pieces.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::file::DirectFile;
use crate::pipeline::memory::kept_bytes;
use crate::store::Store;
use crate::store::checksum::Binding;
use crate::store::layout::Layout;
use crate::units::Group;

/// Files for gradients that have no buffer of their own, one for each drive of the store.
///
/// They have no name: a process that is killed leaves nothing behind, and nobody ever believes what an
/// earlier one wrote.
#[derive(Clone, Debug, Default)]
pub struct GradientFiles {
    files: Vec<Arc<DirectFile>>,
}

impl GradientFiles {
    /// Reserves the room on the drives; what lies at `paths` is removed first. `own` are the pieces of
    /// `Store::pieces` that have a buffer of their own.
    ///
    /// # Errors
    /// `NoSpace`; `Invalid` when there is not one path for each drive; `Io`, `Unsupported`.
    pub fn create(paths: &[PathBuf], pieces: &Layout, own: &[usize]) -> Result<Self> {
        let drives = pieces.drives();
        if paths.len() != drives {
            return Err(Error::invalid(format!(
                "{} files for gradients, and the store lies on {drives} drives",
                paths.len()
            )));
        }
        let (_, bytes) = places(pieces, own);
        let create = |(drive, path): (usize, &PathBuf)| {
            if path.exists() {
                fs::remove_file(path).map_err(|e| Error::io("remove", path, 0, 0, e))?;
            }
            let file = DirectFile::create(path, bytes[drive].max(1))?;
            fs::remove_file(path).map_err(|e| Error::io("remove", path, 0, 0, e))?;
            Ok(file)
        };
        Self::over(paths.iter().enumerate().map(create).collect::<Result<_>>()?)
    }

    /// The same over files that are open.
    pub(super) fn over(files: Vec<DirectFile>) -> Result<Self> {
        // An engine that keeps drives apart takes them for other ones than the store's.
        let drives = files.len();
        let number = |(drive, file): (usize, DirectFile)| Arc::new(file.on_drive(drives + drive));
        Ok(Self { files: files.into_iter().enumerate().map(number).collect() })
    }

    pub(super) fn are_there(&self) -> bool {
        !self.files.is_empty()
    }
}

/// Drive and offset of each chunk's gradient, and bytes on each drive. Pieces that have a buffer of their
/// own have none.
fn places(pieces: &Layout, own: &[usize]) -> (Vec<Option<(usize, u64)>>, Vec<u64>) {
    let mut bytes = vec![0; pieces.drives()];
    let places = pieces
        .chunks()
        .iter()
        .map(|chunk| {
            if own.contains(&chunk.record) || !chunk.format().is_trainable() {
                return None;
            }
            let offset = bytes[chunk.drive];
            bytes[chunk.drive] += kept_bytes(chunk.parameters) as u64;
            Some((chunk.drive, offset))
        })
        .collect();
    (places, bytes)
}

/// What is known of the gradients on the drive.
#[derive(Debug)]
pub(super) struct OnDrive {
    files: Vec<Arc<DirectFile>>,
    places: Vec<Option<(usize, u64)>>,
    /// Checksums of each chunk's gradient as it was written last.
    sums: Vec<Vec<u32>>,
    /// Of each chunk: writes that are to come or in flight, and whether one is in flight.
    unwritten: Vec<usize>,
    in_flight: Vec<bool>,
    store: [u8; 16],
}

impl OnDrive {
    pub(super) fn new(
        files: &GradientFiles,
        store: &Store,
        pieces: &Layout,
        own: &[usize],
    ) -> Self {
        let chunks = pieces.chunks().len();
        let places = if files.are_there() { places(pieces, own).0 } else { vec![None; chunks] };
        Self {
            files: files.files.clone(),
            places,
            sums: vec![Vec::new(); chunks],
            unwritten: vec![0; chunks],
            in_flight: vec![false; chunks],
            store: store.uuid(),
        }
    }

    /// Whether the gradient of a chunk waits on the drive when it is kept.
    pub(super) fn holds(&self, chunk: usize) -> bool {
        self.places[chunk].is_some()
    }

    /// Where it lies.
    pub(super) fn place(&self, chunk: usize) -> Result<(Arc<DirectFile>, u64)> {
        self.places[chunk]
            .and_then(|(drive, offset)| Some((Arc::clone(self.files.get(drive)?), offset)))
            .ok_or_else(|| Error::invalid(format!("no file for the gradient of chunk {chunk}")))
    }

    /// What its checksums are bound to. The bit keeps it from being taken for a store's generation.
    pub(super) fn binding(&self, chunk: usize, step: u64) -> Binding {
        let chunk = u32::try_from(chunk).unwrap_or(u32::MAX);
        Binding { store: self.store, chunk, group: Group::Update, generation: step | 1 << 63 }
    }

    pub(super) fn sums(&self, chunk: usize) -> &[u32] {
        &self.sums[chunk]
    }

    pub(super) fn is_written(&self, chunk: usize) -> bool {
        self.unwritten[chunk] == 0
    }

    pub(super) fn is_in_flight(&self, chunk: usize) -> bool {
        self.in_flight[chunk]
    }

    /// A write of it will be started.
    pub(super) fn expect(&mut self, chunk: usize) {
        self.unwritten[chunk] += 1;
    }

    pub(super) fn starts(&mut self, chunk: usize, sums: Vec<u32>) {
        self.sums[chunk] = sums;
        self.in_flight[chunk] = true;
    }

    pub(super) fn wrote(&mut self, chunk: usize) {
        self.unwritten[chunk] -= 1;
        self.in_flight[chunk] = false;
    }

    /// Nothing is in flight any more, and nothing that was kept is wanted.
    pub(super) fn forget(&mut self) {
        self.unwritten.fill(0);
        self.in_flight.fill(false);
    }
}
