//! The data files of one store, one on each of its drives. The first is the main one: it has tables,
//! superblocks and clean marker, and whoever holds its lock may use the others.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::io::file::{self, DirectFile, Owner};

/// A store lies on so many drives at most.
pub(crate) const DRIVES_MAX: usize = 16;

/// The open files, in the order of the drives; never empty.
#[derive(Clone, Debug)]
pub struct Drives {
    files: Vec<Arc<DirectFile>>,
}

impl Drives {
    /// Files that are open already, in the order of the drives.
    ///
    /// # Errors
    /// `Invalid` for none or too many.
    pub fn new(files: Vec<DirectFile>) -> Result<Self> {
        check_count(files.len())?;
        let numbered = files.into_iter().enumerate();
        Ok(Self { files: numbered.map(|(drive, file)| Arc::new(file.on_drive(drive))).collect() })
    }

    /// Creates, locks and reserves a file for each of `(path, bytes)`; when any of this fails, nothing
    /// is left behind.
    ///
    /// # Errors
    /// As `DirectFile::create`.
    pub fn create(places: &[(PathBuf, u64)]) -> Result<Self> {
        let mut files = Vec::new();
        for (path, bytes) in places {
            match DirectFile::create(path, *bytes) {
                Ok(file) => files.push(file),
                Err(error) => {
                    files.iter().for_each(|file| drop(fs::remove_file(file.path())));
                    return Err(error);
                }
            }
        }
        Self::new(files)
    }

    /// Opens and locks them one after another, the main one first; see `DirectFile::open_waiting`.
    ///
    /// # Errors
    /// As `DirectFile::open_waiting`.
    pub fn open_waiting(
        paths: &[PathBuf],
        waiting: &mut dyn FnMut(&Owner, Duration) -> Result,
    ) -> Result<Self> {
        refuse_one_twice(paths)?;
        let open = |path: &PathBuf| DirectFile::open_waiting(path, waiting);
        Self::new(paths.iter().map(open).collect::<Result<_>>()?)
    }

    /// Opens them for reading, without their locks.
    ///
    /// # Errors
    /// As `DirectFile::open_unlocked`.
    pub fn open_unlocked(paths: &[PathBuf]) -> Result<Self> {
        let open = |path: &PathBuf| DirectFile::open_unlocked(path);
        Self::new(paths.iter().map(open).collect::<Result<_>>()?)
    }

    /// Number of drives.
    #[must_use]
    pub fn count(&self) -> usize {
        self.files.len()
    }

    /// The file with tables, superblocks and clean marker.
    #[must_use]
    pub fn main(&self) -> &Arc<DirectFile> {
        &self.files[0]
    }

    /// Path of the main file, which is what messages call the store.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.main().path()
    }

    /// The file on one drive.
    ///
    /// # Panics
    /// When there is no such drive; layouts are checked against the number of files.
    #[must_use]
    pub fn file(&self, drive: usize) -> &Arc<DirectFile> {
        &self.files[drive]
    }

    /// All files.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<DirectFile>> {
        self.files.iter()
    }

    /// Whether transfers to all of them bypass the page cache.
    #[must_use]
    pub fn are_direct(&self) -> bool {
        self.iter().all(|file| file.is_direct())
    }

    /// The life of kernel and mounts: equal ones mean that what the kernel had taken is not lost, as neither it
    /// nor a mount of these files went away in between. The first half is the kernel's alone; zero where it tells none.
    ///
    /// A file system that turned read-only has taken writes that it never made: only its next mount knows.
    #[must_use]
    pub(crate) fn life(&self) -> [u8; 16] {
        let mut life = file::boot_id();
        if life == [0; 16] {
            return life;
        }
        let mut mounts = 0_u64;
        for (drive, file) in (0_u32..).zip(&self.files) {
            mounts ^= file::mount_number(file.file()).unwrap_or(0).rotate_left(4 * drive);
        }
        for (byte, mixed) in life[8..].iter_mut().zip(mounts.to_le_bytes()) {
            *byte ^= mixed;
        }
        life
    }

    /// Whether each of the files can be found again; see `DirectFile::check_is_found`.
    ///
    /// # Errors
    /// `NameLost`, `Io`.
    pub(crate) fn check_are_found(&self) -> Result {
        self.iter().try_for_each(|file| file.check_is_found())
    }

    /// Gives the files their final names, the main one last: without it the others are no store.
    ///
    /// # Errors
    /// `Format` when a name leads elsewhere by now, `Io`; then files may have either name.
    pub fn rename(&self, names: &[PathBuf]) -> Result {
        self.iter().try_for_each(|file| file.check_name())?;
        for (file, name) in self.files.iter().zip(names).rev() {
            file::rename_new(file.path(), name)?;
            file::sync_directory(name)?;
        }
        Ok(())
    }
}

/// Two drives cannot have one file, whatever the paths to it: whoever locked it once would wait for itself.
///
/// # Errors
/// `Format` naming the second path.
pub(crate) fn refuse_one_twice(paths: &[PathBuf]) -> Result {
    // What is not there yet is known by its folder and its name.
    let place = |path: &PathBuf| {
        let whole = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let folder = whole.parent().and_then(|folder| folder.canonicalize().ok());
        folder
            .zip(whole.file_name())
            .map_or_else(|| whole.clone(), |(folder, name)| folder.join(name))
    };
    let places: Vec<PathBuf> = paths.iter().map(place).collect();
    for (index, place) in places.iter().enumerate() {
        if let Some(first) = places[..index].iter().position(|earlier| earlier == place) {
            return Err(Error::format(
                &paths[index],
                format!(
                    "files {} and {} of the store are this one file: give each drive a file of its own, in a folder of \
                     its own",
                    first + 1,
                    index + 1
                ),
            ));
        }
    }
    Ok(())
}

/// # Errors
/// `Invalid` for no drive or too many.
pub(crate) fn check_count(drives: usize) -> Result {
    match drives {
        1..=DRIVES_MAX => Ok(()),
        _ => Err(Error::invalid(format!("{drives} drives: 1 to {DRIVES_MAX} are possible"))),
    }
}
