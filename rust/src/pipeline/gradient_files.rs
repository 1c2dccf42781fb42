//! Files for the gradients that wait on the drive for the norm of all. The layout here is that of units.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::file::DirectFile;
use crate::pipeline::memory::deferred_bytes;
use crate::store::layout::Layout;

/// Files for gradients that have no buffer of their own, one for each drive of the store.
///
/// They have no name: a process that is killed leaves nothing behind, and nobody ever believes what an
/// earlier one wrote.
#[derive(Clone, Debug, Default)]
pub struct GradientFiles {
    files: Vec<Arc<DirectFile>>,
}

impl GradientFiles {
    /// Reserves the room on the drives; what lies at `paths` is removed first. `own` are the units of
    /// `Store::units` that have a buffer of their own.
    ///
    /// # Errors
    /// `NoSpace`; `Invalid` when there is not one path for each drive; `Io`, `Unsupported`.
    pub fn create(paths: &[PathBuf], units: &Layout, own: &[usize]) -> Result<Self> {
        let drives = units.drives();
        if paths.len() != drives {
            return Err(Error::invalid(format!(
                "{} files for gradients, and the store lies on {drives} drives",
                paths.len()
            )));
        }
        let (_, bytes) = places(units, own);
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

    /// By drive.
    pub(super) fn files(&self) -> &[Arc<DirectFile>] {
        &self.files
    }
}

/// Drive and offset of each chunk's gradient, and bytes on each drive. Units that have a buffer of their
/// own have none.
pub(super) fn places(units: &Layout, own: &[usize]) -> (Vec<Option<(usize, u64)>>, Vec<u64>) {
    let mut bytes = vec![0; units.drives()];
    let places = units
        .chunks()
        .iter()
        .map(|chunk| {
            if own.contains(&chunk.record) || !chunk.format().is_trainable() {
                return None;
            }
            let offset = bytes[chunk.drive];
            bytes[chunk.drive] += deferred_bytes(chunk.parameters) as u64;
            Some((chunk.drive, offset))
        })
        .collect();
    (places, bytes)
}
