//! Direct I/O: opening a file for it, what the kernel asks of its transfers, and doing without it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};

use crate::error::{Error, Result};
use crate::units::PAGE_BYTES;

/// What direct transfers of a file must be multiples of, in bytes; zero where it has no direct I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DioAlignment {
    /// Of the address in memory.
    pub memory: u32,
    /// Of the offset in the file and of the length.
    pub offset: u32,
}

impl DioAlignment {
    /// As the kernel says (`STATX_DIOALIGN`), or `None` where it does not: before Linux 6.1, and on
    /// file systems that leave it open.
    #[must_use]
    pub fn of(file: &File) -> Option<Self> {
        let found = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        let told = found.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
        let (memory, offset) = (found.stx_dio_mem_align, found.stx_dio_offset_align);
        told.then_some(Self { memory, offset })
    }

    /// What the files of a folder will need; tried on one without a name, which leaves nothing behind.
    ///
    /// # Errors
    /// `Io` when no such file can be made there.
    pub fn in_folder(folder: &Path) -> Result<Option<Self>> {
        let mut options = OpenOptions::new();
        let file = i32::try_from((OFlags::TMPFILE | OFlags::DIRECT).bits())
            .map_err(io::Error::other)
            .and_then(|flags| options.read(true).write(true).custom_flags(flags).open(folder))
            .map_err(|error| Error::io("create a file in", folder, 0, 0, error))?;
        Ok(Self::of(&file))
    }

    /// Whether transfers that are aligned to 4 KiB meet it.
    #[must_use]
    pub fn is_met(self) -> bool {
        let page = u32::try_from(PAGE_BYTES).unwrap_or_default();
        [self.memory, self.offset].iter().all(|bytes| *bytes > 0 && page.is_multiple_of(*bytes))
    }
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Look,
    Use,
    Create,
}

/// A file, whether its transfers are direct, and what is known of their alignment.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) direct: bool,
    pub(super) alignment: Option<DioAlignment>,
}

/// Opens for direct I/O, or without where the file system refuses that, has none for this file
/// (ext4 with `data=journal`, encryption), or asks for more than our 4 KiB.
pub(super) fn open(path: &Path, access: Access) -> Result<Opened> {
    let create = access == Access::Create;
    let open = |flags: OFlags| {
        let mut options = OpenOptions::new();
        let flags = i32::try_from((OFlags::NOFOLLOW | flags).bits()).map_err(io::Error::other)?;
        options.read(true).write(access != Access::Look).create_new(create);
        options.mode(0o600).custom_flags(flags).open(path)
    };
    let failed = |error| Error::io(if create { "create" } else { "open" }, path, 0, 0, error);
    match open(OFlags::DIRECT) {
        Ok(file) => opened(file).map_err(failed),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
            if create {
                // Some kernels make the file before they refuse the flag.
                let _ = fs::remove_file(path);
            }
            let file = open(OFlags::empty()).map_err(failed)?;
            let alignment = DioAlignment::of(&file);
            Ok(Opened { file, direct: false, alignment })
        }
        Err(error) => Err(failed(error)),
    }
}

/// The kernel took `O_DIRECT`; it goes again where transfers would fail, or be buffered on the quiet.
fn opened(file: File) -> io::Result<Opened> {
    let alignment = DioAlignment::of(&file);
    let direct = alignment.is_none_or(DioAlignment::is_met);
    if !direct {
        fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::DIRECT)?;
    }
    Ok(Opened { file, direct, alignment })
}

#[cfg(test)]
mod tests;
