//! The file that transfers are measured on, and how long the drive takes to make writes durable.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, Result};
use crate::io::engine::{Engine, Operation, perform_once};
use crate::io::file::DirectFile;
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;

/// The contents repeat after so many bytes, so that a request of any size and place holds the same.
pub(super) const PERIOD_BYTES: usize = 1 << 20;

/// A preallocated file without a name: however the process ends, nothing is left behind.
#[derive(Debug)]
pub struct ScratchFile {
    pub(super) file: Arc<DirectFile>,
    pub(super) bytes: u64,
    pub(super) contents: Vec<u8>,
}

impl ScratchFile {
    /// Reserves `bytes` (rounded up to 1 MiB) in a folder that exists, with contents of its own.
    /// Nothing is written yet: reading what was never written does not reach the drive.
    ///
    /// # Errors
    /// `NoSpace`, `Unsupported` for a network file system, `Io`.
    pub fn create(folder: &Path, bytes: u64) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let bytes = bytes.max(1).next_multiple_of(PERIOD_BYTES as u64);
        let name = format!(".megatrain-io-bench-{}-{number}", std::process::id());
        let place = NamedFor::make(folder.join(name))?;
        let file = Arc::new(DirectFile::create(&place.0.join("scratch"), bytes)?);
        drop(place);
        // Random, because some drives squeeze what repeats; seeded by the clock, so that what an
        // earlier run left on the drive cannot pass for this one's.
        let mut contents = vec![0; PERIOD_BYTES];
        fastrand::Rng::new().fill(&mut contents);
        Ok(Self { file, bytes, contents })
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether transfers bypass the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.file.is_direct()
    }

    /// Reads the whole file and compares every byte with what was written.
    ///
    /// # Errors
    /// `Format` naming the first place that differs, `Io`.
    pub fn verify(&self, engine: &Arc<dyn Engine>) -> Result {
        let mut slot = Slot::standalone(4 << 20, &Ledger::new(), "bench")?;
        let mut offset = 0;
        while offset < self.bytes {
            let bytes = crate::units::to_usize(self.bytes - offset).min(slot.len());
            slot.fill(0);
            let (back, result) =
                perform_once(&**engine, Operation::Read, &self.file, offset, Some(slot), bytes);
            result?;
            slot = back.ok_or_else(|| Error::invalid("the engine kept a slot"))?;
            self.compare(&slot[..bytes], offset)?;
            offset += bytes as u64;
        }
        Ok(())
    }

    fn compare(&self, found: &[u8], offset: u64) -> Result {
        let differs = |(index, part): (usize, &[u8])| {
            (part != &self.contents[..part.len()]).then_some(index * PERIOD_BYTES)
        };
        match found.chunks(PERIOD_BYTES).enumerate().find_map(differs) {
            None => Ok(()),
            Some(within) => Err(Error::format(
                self.file.path(),
                format!(
                    "the MiB at offset {} is not what was written to it: these figures are worth nothing",
                    offset + within as u64
                ),
            )),
        }
    }
}

/// A folder that holds the file, and the hint beside it, until both are open and need no name.
struct NamedFor(PathBuf);

impl NamedFor {
    fn make(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).map_err(|e| Error::io("create the folder", &path, 0, 0, e))?;
        Ok(Self(path))
    }
}

impl Drop for NamedFor {
    fn drop(&mut self) {
        // What cannot be removed cannot be helped here.
        let _ = fs::remove_dir_all(&self.0);
    }
}
