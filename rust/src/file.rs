//! The data file: how it is opened, locked and given its space.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, IFlags, OFlags};

use crate::error::{Error, Result};
use crate::fork::NotInherited;
use crate::units::PAGE_BYTES;

/// How long an open waits for the lock: a killed process holds it until its last writes have landed.
pub const LOCK_WAIT: Duration = Duration::from_secs(5);

/// File systems that live on another machine: no promise about flushes holds there.
const NETWORK_FILE_SYSTEMS: [(u64, &str); 6] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x0102_1997, "9p (a Windows drive seen from WSL, or a VM share)"),
    (0x00c3_6400, "Ceph"),
];
const BTRFS: u64 = 0x9123_683e;

/// An open data file. All I/O on it goes through an engine, which keeps it open while in flight.
#[derive(Debug)]
pub struct DirectFile {
    // Before the file: what is no longer guarded must not be closed yet.
    _not_inherited: NotInherited,
    file: File,
    path: PathBuf,
    direct: bool,
    locked: bool,
    process: u32,
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
        let (file, direct) = open_with(path, true)?;
        let made = Self::over(file, path, direct).and_then(|mut file| {
            // Locked before anything else, so that no other process can take it for a left-over.
            file.lock()?;
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
            rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT | rustix::io::Errno::FBIG => {
                let available = path.parent().and_then(|p| available_bytes(p).ok()).unwrap_or(0);
                Error::NoSpace { path: path.into(), needed: bytes, available }
            }
            other => Error::io("reserve", path, 0, bytes, other),
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
        file.sync_all().map_err(|e| Error::io("fsync", path, 0, bytes, e))
    }

    /// Opens and locks an existing file, with direct I/O where the file system has it.
    ///
    /// # Errors
    /// `InUse` after [`LOCK_WAIT`], `Unsupported` for a network file system, `Io`.
    pub fn open(path: &Path) -> Result<Self> {
        refuse_network(path)?;
        let (file, direct) = open_with(path, false)?;
        let metadata = file.metadata().map_err(|e| Error::io("stat", path, 0, 0, e))?;
        if !metadata.is_file() {
            return Err(Error::format(path, "not a regular file"));
        }
        if metadata.nlink() != 1 {
            let links = metadata.nlink();
            return Err(Error::format(
                path,
                format!("the file has {links} names (hard links); a store must have one"),
            ));
        }
        let mut file = Self::over(file, path, direct)?;
        file.lock()?;
        Ok(file)
    }

    fn over(file: File, path: &Path, direct: bool) -> Result<Self> {
        let not_inherited = NotInherited::new(&file)?;
        let (path, process) = (path.to_owned(), std::process::id());
        Ok(Self { _not_inherited: not_inherited, file, path, direct, locked: false, process })
    }

    fn lock(&mut self) -> Result {
        let start = Instant::now();
        loop {
            match self.file.try_lock() {
                Ok(()) => {
                    self.locked = true;
                    break;
                }
                Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_WAIT => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::WouldBlock) => {
                    let owner = fs::read_to_string(self.owner_path()).unwrap_or_default();
                    let owner = if owner.trim().is_empty() {
                        "another process".into()
                    } else {
                        owner.trim().into()
                    };
                    let waited_s = start.elapsed().as_secs_f64();
                    return Err(Error::InUse { path: self.path.clone(), owner, waited_s });
                }
                Err(TryLockError::Error(error)) => {
                    return Err(Error::io("lock", &self.path, 0, 0, error));
                }
            }
        }
        // A hint for the message above; the lock is the truth.
        let command =
            fs::read("/proc/self/comm").map(|c| String::from_utf8_lossy(&c).trim().to_owned());
        let hint = format!("process {} ({})\n", std::process::id(), command.unwrap_or_default());
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let _ = options.open(self.owner_path()).and_then(|mut f| f.write_all(hint.as_bytes()));
        Ok(())
    }

    fn owner_path(&self) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(".owner");
        name.into()
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

    /// Length in bytes.
    ///
    /// # Errors
    /// `Io` when the system cannot say.
    pub fn bytes(&self) -> Result<u64> {
        self.file.metadata().map(|m| m.len()).map_err(|e| Error::io("stat", &self.path, 0, 0, e))
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
        // Still locked here (the file closes after this body): no other owner's hint is removed, and a
        // forked child removes none.
        if self.locked && self.process == std::process::id() {
            let _ = fs::remove_file(self.owner_path());
        }
    }
}

/// Makes a directory entry (a creation or a rename) durable.
///
/// # Errors
/// `Io` when the directory cannot be opened or flushed.
pub fn sync_directory(path: &Path) -> Result {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(|e| Error::io("fsync directory of", path, 0, 0, e))
}

/// The kernel's id of this boot: equal ids mean that the kernel never went down in between.
#[must_use]
pub fn boot_id() -> [u8; 16] {
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

/// 16 random bytes from the kernel, shaped as a version 4 UUID.
///
/// # Errors
/// `Io` when `/dev/urandom` cannot be read.
pub fn random_uuid() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut id))
        .map_err(|e| Error::io("read", "/dev/urandom", 0, 16, e))?;
    id[6] = (id[6] & 0x0f) | 0x40;
    id[8] = (id[8] & 0x3f) | 0x80;
    Ok(id)
}

/// Opens for direct I/O, or without where the file system refuses that; the second value says which.
fn open_with(path: &Path, create: bool) -> Result<(File, bool)> {
    let open = |flags: OFlags| {
        let mut options = OpenOptions::new();
        let flags = i32::try_from((OFlags::NOFOLLOW | flags).bits()).map_err(io::Error::other)?;
        options.read(true).write(true).create_new(create).mode(0o600).custom_flags(flags).open(path)
    };
    let failed = |error| Error::io(if create { "create" } else { "open" }, path, 0, 0, error);
    match open(OFlags::DIRECT) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
            if create {
                // Some kernels make the file before they refuse the flag.
                let _ = fs::remove_file(path);
            }
            Ok((open(OFlags::empty()).map_err(failed)?, false))
        }
        Err(error) => Err(failed(error)),
    }
}

/// Gives a file its final name, unless something else has it.
///
/// # Errors
/// `Io`; nothing was renamed.
pub fn rename_new(from: &Path, to: &Path) -> Result {
    use rustix::fs::{CWD, RenameFlags};
    rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)
        .map_err(|e| Error::io("rename", from, 0, 0, e))
}

fn file_system(file: &File) -> Option<u64> {
    rustix::fs::fstatfs(file).ok().and_then(|s| u64::try_from(s.f_type).ok())
}

fn refuse_network(path: &Path) -> Result {
    let stat = rustix::fs::statfs(path).map_err(|e| Error::io("open", path, 0, 0, e))?;
    let magic = u64::try_from(stat.f_type).unwrap_or_default() & 0xffff_ffff;
    match NETWORK_FILE_SYSTEMS.iter().find(|(id, _)| *id == magic) {
        Some((_, name)) => Err(Error::Unsupported {
            feature: format!("a store on {}", path.display()),
            reason: format!(
                "it is {name}, not a local drive; choose a local NVMe with memory.store_dir"
            ),
        }),
        None => Ok(()),
    }
}

fn available_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|e| Error::io("stat", path, 0, 0, e))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether `bytes` is a multiple of the transfer alignment.
#[must_use]
pub fn is_aligned(bytes: u64) -> bool {
    bytes.is_multiple_of(PAGE_BYTES as u64)
}
