//! What lies beneath a file: its kind of file system, and the room left on it.

use std::fs::File;
use std::path::Path;

use crate::error::{Error, Result};

/// File systems that live on another machine: no promise about flushes holds there.
const NETWORK_FILE_SYSTEMS: [(u64, &str); 6] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x0102_1997, "9p (a Windows drive seen from WSL, or a VM share)"),
    (0x00c3_6400, "Ceph"),
];
pub(super) const BTRFS: u64 = 0x9123_683e;

pub(super) fn file_system(file: &File) -> Option<u64> {
    rustix::fs::fstatfs(file).ok().and_then(|s| u64::try_from(s.f_type).ok())
}

pub(super) fn refuse_network(path: &Path) -> Result {
    let stat = rustix::fs::statfs(path).map_err(|e| Error::io("look at", path, 0, 0, e))?;
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

pub(super) fn available_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|e| Error::io("look at", path, 0, 0, e))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
