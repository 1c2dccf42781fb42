//! The data file: how it is opened, locked and given its space.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, IFlags, MemfdFlags};

use crate::error::{Error, Result};
use crate::io::file::direct::{Access, Opened};
use crate::io::file::file_system::{BTRFS, available_bytes, file_system, refuse_network};
use crate::io::fork::NotInherited;
use crate::units::PAGE_BYTES;

mod direct;
mod file_system;
mod owner;

pub use direct::DioAlignment;
pub use owner::Owner;

/// How long an open waits for the lock: a killed process holds it until its last writes have landed.
pub(crate) const LOCK_WAIT: Duration = Duration::from_secs(5);
/// After so long a person should be told what is waited for.
pub const LOCK_NOTICE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// An open data file. All I/O on it goes through an engine, which keeps it open while in flight.
#[derive(Debug)]
pub struct DirectFile {
    // Before the file: what is no longer guarded must not be closed yet.
    _not_inherited: NotInherited,
    file: File,
    path: PathBuf,
    direct: bool,
    alignment: Option<DioAlignment>,
    /// Whether `path` is a name that it should have: one in RAM has none.
    is_named: bool,
    locked: bool,
    drive: usize,
}

impl DirectFile {
    /// Creates a file that did not exist, locks it, and reserves `bytes` on the disk. When any of
    /// this fails, nothing is left behind.
    ///
    /// # Errors
    /// `NoSpace`, `Unsupported` for a network file system, `InUse`, `Io`.
    pub fn create(path: &Path, bytes: u64) -> Result<Self> {
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        refuse_network(parent)?;
        let available = available_bytes(parent)?;
        if available < bytes {
            return Err(Error::NoSpace { path: path.into(), needed: bytes, available });
        }
        let opened = direct::open(path, Access::Create)?;
        let made = Self::over(opened, path).and_then(|mut file| {
            // Locked before anything else, so that no other process can take it for a left-over.
            file.lock(&mut |_, _| Ok(()))?;
            file.check_name()?;
            Self::prepare(&file.file, path, bytes)?;
            Ok(file)
        });
        made.inspect_err(|_| {
            // The first failure is the one to report; what cannot be removed cannot be helped here.
            let _ = fs::remove_file(path);
        })
    }

    fn prepare(file: &File, path: &Path, bytes: u64) -> Result {
        let refused = |source: rustix::io::Errno| match source {
            rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT => {
                match path.parent().and_then(|p| available_bytes(p).ok()) {
                    // Less than was free a moment ago. Where enough is, free space is not what lacks.
                    Some(available) if available < bytes => {
                        Error::NoSpace { path: path.into(), needed: bytes, available }
                    }
                    _ => Error::io("reservation", path, 0, bytes, source),
                }
            }
            other => Error::io("reservation", path, 0, bytes, other),
        };
        // The umask may have taken bits away or the directory's ACL added some.
        file.set_permissions(fs::Permissions::from_mode(0o600))
            .map_err(|e| Error::io("set permissions of", path, 0, 0, e))?;
        if file_system(file) == Some(BTRFS) {
            // Copy-on-write would turn direct writes into buffered ones; it can be turned off only
            // while the file is empty.
            if let Ok(flags) = rustix::fs::ioctl_getflags(file) {
                let _ = rustix::fs::ioctl_setflags(file, flags | IFlags::NOCOW);
            }
        }
        rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes).map_err(refused)?;
        file.sync_all().map_err(|e| Error::io("fsync", path, 0, 0, e))
    }

    /// Opens and locks an existing file, with direct I/O where the file system has it.
    ///
    /// # Errors
    /// `InUse` after [`LOCK_WAIT`], `Unsupported` for a network file system, `Io`.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_waiting(path, &mut |_, _| Ok(()))
    }

    /// The same; while another process holds the file, `waiting` is called every few milliseconds with
    /// what is known of it and the time waited so far. Its error ends the wait.
    ///
    /// # Errors
    /// As `open`, and what `waiting` returns.
    pub fn open_waiting(
        path: &Path,
        waiting: &mut dyn FnMut(&Owner, Duration) -> Result,
    ) -> Result<Self> {
        let mut file = Self::open_as(path, Access::Use)?;
        file.lock(waiting)?;
        // Asked only now: whoever held it may have removed it.
        match file.metadata()?.nlink() {
            1 => Ok(file),
            0 => Err(Error::format(path, "the file was removed while it was waited for")),
            links => Err(Error::format(
                path,
                format!("the file has {links} names (hard links); a store must have one"),
            )),
        }
    }

    /// Opens an existing file for reading, without its lock: another process may write it meanwhile.
    ///
    /// # Errors
    /// `Unsupported` for a network file system, `Io`.
    pub fn open_unlocked(path: &Path) -> Result<Self> {
        Self::open_as(path, Access::Look)
    }

    fn open_as(path: &Path, access: Access) -> Result<Self> {
        refuse_network(path)?;
        let file = Self::over(direct::open(path, access)?, path)?;
        if !file.metadata()?.is_file() {
            return Err(Error::format(path, "not a regular file"));
        }
        Ok(file)
    }

    /// A file without a name, in RAM: what an engine is tried out on.
    ///
    /// # Errors
    /// `Io` when the system refuses it.
    pub fn in_memory(bytes: u64) -> Result<Self> {
        let path = Path::new("a file in memory");
        let failed = |e| Error::io("create", path, 0, 0, e);
        let file = rustix::fs::memfd_create("megatrain-io", MemfdFlags::CLOEXEC).map_err(failed)?;
        rustix::fs::ftruncate(&file, bytes).map_err(failed)?;
        let opened = Opened { file: file.into(), direct: false, alignment: None };
        let mut file = Self::over(opened, path)?;
        (file.path, file.is_named) = (path.into(), false);
        Ok(file)
    }

    fn over(opened: Opened, path: &Path) -> Result<Self> {
        let Opened { file, direct, alignment } = opened;
        let not_inherited = NotInherited::new(&file)?;
        // Whoever changes the working directory afterwards must not lose it; who may not walk to it from the root
        // keeps to the path that was given.
        let whole = std::path::absolute(path).ok();
        let path = whole.filter(|whole| whole.exists()).unwrap_or_else(|| path.into());
        let (is_named, locked, drive) = (true, false, 0);
        let _not_inherited = not_inherited;
        Ok(Self { _not_inherited, file, path, direct, alignment, is_named, locked, drive })
    }

    /// Who holds an existing file, or `None` when nobody does. Waits for nothing.
    ///
    /// # Errors
    /// `Io` when it cannot be opened or asked.
    pub fn owner_of(path: &Path) -> Result<Option<Owner>> {
        let file = Self::open_unlocked(path)?;
        // Shared, so that two who ask do not take each other for a holder.
        match file.file.try_lock_shared() {
            Ok(()) => Ok(None),
            Err(TryLockError::WouldBlock) => Ok(Some(Owner::of(path))),
            Err(TryLockError::Error(error)) => Err(Error::io("lock", path, 0, 0, error)),
        }
    }

    fn lock(&mut self, waiting: &mut dyn FnMut(&Owner, Duration) -> Result) -> Result {
        let start = Instant::now();
        loop {
            match self.file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {
                    let (owner, waited) = (Owner::of(&self.path), start.elapsed());
                    if waited >= LOCK_WAIT {
                        let is_this_process = owner.process == Some(std::process::id());
                        return Err(Error::InUse {
                            path: self.path.clone(),
                            owner: owner.to_string(),
                            is_this_process: is_this_process && !owner.has_ended,
                            waited_s: waited.as_secs_f64(),
                        });
                    }
                    waiting(&owner, waited)?;
                    std::thread::sleep(LOCK_RETRY);
                }
                Err(TryLockError::Error(error)) => {
                    return Err(Error::io("lock", &self.path, 0, 0, error));
                }
            }
        }
        self.locked = true;
        // For messages only: without it we are "another process".
        let _ = Owner::leave(&self.path);
        Ok(())
    }

    /// Whether the file still has the name it was opened by: before it was locked, another process
    /// could have taken it for a left-over and removed it.
    ///
    /// # Errors
    /// `Format` when the name leads elsewhere or nowhere, `Io`.
    pub fn check_name(&self) -> Result {
        let ours = self.metadata()?;
        match fs::symlink_metadata(&self.path) {
            Ok(there) if (ours.dev(), ours.ino()) == (there.dev(), there.ino()) => Ok(()),
            Ok(_) => Err(Error::format(&self.path, "another file has this name by now")),
            Err(error) => Err(Error::io("look at", &self.path, 0, 0, error)),
        }
    }

    /// Whether what was written can be found again: under its name, in this very file. Two calls of the
    /// kernel; nothing is read or written.
    ///
    /// # Errors
    /// `NameLost` when it was removed, moved away or replaced since it was opened; `Io`.
    pub fn check_is_found(&self) -> Result {
        if !self.is_named {
            return Ok(());
        }
        let ours = self.metadata()?;
        let there = fs::symlink_metadata(&self.path);
        let (is_found, is_taken) = match there {
            Ok(there) => ((ours.dev(), ours.ino()) == (there.dev(), there.ino()), true),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                (false, false)
            }
            // A folder that may not be searched any more hides the name: no reason to stop.
            Err(_) => (true, true),
        };
        if is_found && ours.nlink() > 0 {
            return Ok(());
        }
        let (process, descriptor) = (std::process::id(), self.file.as_raw_fd());
        let open = PathBuf::from(format!("/proc/{process}/fd/{descriptor}"));
        let moved_to = fs::read_link(&open).ok().filter(|_| ours.nlink() > 0);
        Err(Error::NameLost { path: self.path.clone(), is_taken, moved_to, open })
    }

    /// Whether this file is the one that lies at `path`.
    #[must_use]
    pub(crate) fn lies_at(&self, path: &Path) -> bool {
        let (ours, there) = (self.metadata().ok(), fs::symlink_metadata(path).ok());
        let identity = |file: fs::Metadata| (file.dev(), file.ino());
        ours.is_some() && ours.map(identity) == there.map(identity)
    }

    /// Removes the file, durably. Whoever waits for its lock finds it gone.
    ///
    /// # Errors
    /// `Invalid` without the lock, `Format` when its name leads elsewhere by now, `Io`.
    pub fn remove(self) -> Result {
        if !self.locked {
            return Err(Error::invalid("a file is removed by the one that locked it"));
        }
        self.check_name()?;
        fs::remove_file(&self.path).map_err(|e| Error::io("remove", &self.path, 0, 0, e))?;
        sync_directory(&self.path)
    }

    fn metadata(&self) -> Result<fs::Metadata> {
        self.file.metadata().map_err(|e| Error::io("look at", &self.path, 0, 0, e))
    }

    /// The same file as that of another drive of its store.
    #[must_use]
    pub fn on_drive(mut self, drive: usize) -> Self {
        self.drive = drive;
        self
    }

    /// Which of its store's drives it lies on.
    #[must_use]
    pub fn drive(&self) -> usize {
        self.drive
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether transfers bypass the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// What the kernel says that direct transfers must be aligned to; `None` where it does not say.
    #[must_use]
    pub fn dio_alignment(&self) -> Option<DioAlignment> {
        self.alignment
    }

    /// Length in bytes.
    ///
    /// # Errors
    /// `Io` when the system cannot say.
    pub fn bytes(&self) -> Result<u64> {
        self.metadata().map(|m| m.len())
    }

    /// The open file, for engines.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Reads at `offset` into the whole of `buffer` without the engine; for tests and engines.
    ///
    /// # Errors
    /// The system's own.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    /// Writes at `offset` without the engine; for tests and engines.
    ///
    /// # Errors
    /// The system's own.
    pub fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<usize> {
        self.file.write_at(buffer, offset)
    }
}

impl Drop for DirectFile {
    fn drop(&mut self) {
        // Still locked here (the file closes after this body): no other owner's hint is removed. In the
        // child of a fork the hint is its parent's, and stays.
        if self.locked && Owner::of(&self.path).process == Some(std::process::id()) {
            Owner::forget(&self.path);
        }
    }
}

/// Makes a directory entry (a creation or a rename) durable.
///
/// # Errors
/// `Io` when the directory cannot be opened or flushed.
pub(crate) fn sync_directory(path: &Path) -> Result {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(|e| Error::io("fsync the folder of", path, 0, 0, e))
}

/// The kernel's id of this boot: equal ids mean that the kernel never went down in between.
#[must_use]
pub(crate) fn boot_id() -> [u8; 16] {
    let mut text = String::new();
    let read =
        File::open("/proc/sys/kernel/random/boot_id").and_then(|mut f| f.read_to_string(&mut text));
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let mut id = [0; 16];
    if read.is_ok() && digits.len() == 32 {
        for (byte, pair) in id.iter_mut().zip(digits.chunks(2)) {
            let pair = std::str::from_utf8(pair).unwrap_or("0");
            *byte = u8::from_str_radix(pair, 16).unwrap_or(0);
        }
    }
    id
}

/// Number of the mount that a file is reached through, never given twice between two boots
/// (`STATX_MNT_ID_UNIQUE`); `None` before Linux 6.8.
#[must_use]
pub(crate) fn mount_number(file: &File) -> Option<u64> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);
    let found = statx(file, "", AtFlags::EMPTY_PATH, UNIQUE).ok()?;
    (found.stx_mask & UNIQUE.bits() != 0).then_some(found.stx_mnt_id)
}

/// 16 random bytes from the kernel, shaped as a version 4 UUID.
///
/// # Errors
/// `Io` when `/dev/urandom` cannot be read.
pub(crate) fn random_uuid() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut id))
        .map_err(|e| Error::io("read", "/dev/urandom", 0, 16, e))?;
    id[6] = (id[6] & 0x0f) | 0x40;
    id[8] = (id[8] & 0x3f) | 0x80;
    Ok(id)
}

/// Gives a file its final name, unless something else has it.
///
/// # Errors
/// `Io`; nothing was renamed.
pub(crate) fn rename_new(from: &Path, to: &Path) -> Result {
    use rustix::fs::{CWD, RenameFlags};
    rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)
        .map_err(|e| Error::io("rename a new store to", to, 0, 0, e))
}

/// Whether `bytes` is a multiple of the transfer alignment.
#[must_use]
pub(crate) fn is_aligned(bytes: u64) -> bool {
    bytes.is_multiple_of(PAGE_BYTES as u64)
}

#[cfg(test)]
mod tests;
