//! The one error type. Every variant carries the facts that a person needs; the text says what
//! happened, with the numbers, then what is safe and what to do.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the crate returns.
pub type Result<T = (), E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. Adding a variant without a Python class does not compile.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused or failed an operation on a file.
    #[error("{}", io_failure(operation, path, *offset, *length, source))]
    Io {
        /// "read", "write", "fdatasync", "open", ...; what follows it is the path, or the place in it.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// File offset in bytes.
        offset: u64,
        /// Bytes asked for; 0 where the operation is one on the whole file.
        length: u64,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// The operating system has no more memory for us.
    #[error(
        "{needed} bytes of RAM ({needed_gib:.2} GiB) cannot be had: {source}. Give less (memory.ram; memory of a \
         TensorStore), end other programs, or raise the limit of this process (ulimit -v)", needed_gib = gib(*needed)
    )]
    NoMemory {
        /// Bytes asked for.
        needed: u64,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// A read met the end of the file.
    #[error(
        "{path} ends at {end} bytes, inside the {length} bytes at offset {offset}: the file was truncated. \
         Restore it from a copy or import the model again", path = path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Where the file ends, in bytes.
        end: u64,
        /// File offset of the transfer.
        offset: u64,
        /// Bytes asked for.
        length: u64,
    },
    /// The disk has not enough room for the store; found before anything was written.
    #[error(
        "{path} needs {needed} bytes ({needed_gib:.2} GiB) and {available} bytes ({available_gib:.2} GiB) are free; \
         nothing was left behind. Free space or choose another disk with memory.store_dir",
        path = path.display(),
        needed_gib = gib(*needed), available_gib = gib(*available)
    )]
    NoSpace {
        /// The file that was to be created.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free on that file system.
        available: u64,
    },
    /// Another process holds the store.
    #[error(
        "{path} is in use by {owner} (waited {waited_s:.1} s). Nothing was changed. {}",
        in_use_advice(path, *is_this_process), path = path.display()
    )]
    InUse {
        /// The store's file.
        path: PathBuf,
        /// What is known of the holder.
        owner: String,
        /// Whether this very process has it open already.
        is_this_process: bool,
        /// Seconds waited for the lock.
        waited_s: f64,
    },
    /// Not a store, or one that this build cannot read.
    #[error("{path}: {reason}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Bytes on disk are not the bytes that were written.
    #[error(
        "corrupt bytes in {what} at {path}+{offset}: checksum {expected:#010x} was written, {found:#010x} was read (twice). \
         Nothing was changed and the bytes were not used. Copy the store elsewhere and check the drive; then go back to the \
         state before this one where that is whole (--from-older-state), restore an export or import the model again", path = path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Record, chunk, plane group and tensors.
        what: String,
        /// File offset of the checksum unit.
        offset: u64,
        /// The checksum in the table.
        expected: u32,
        /// The checksum of what was read.
        found: u32,
    },
    /// A gradient that waited on the drive came back with other bytes.
    #[error(
        "corrupt bytes in the gradient of {record} that waited at {path}+{offset}: checksum {expected:#010x} was written, \
         {found:#010x} was read (twice). They were not used; the last committed step is whole. Check the drive, then go on \
         from that step", path = path.display()
    )]
    CorruptGradient {
        /// The file; it has no name any more.
        path: PathBuf,
        /// Name of the record.
        record: String,
        /// File offset of the checksum unit.
        offset: u64,
        /// The checksum that was kept.
        expected: u32,
        /// The checksum of what was read.
        found: u32,
    },
    /// The store failed earlier and takes no more calls; reopening it verifies it.
    #[error(
        "the store stopped after an earlier failure: {first}. The last committed step is safe; open the store again to go on from it"
    )]
    Failed {
        /// The failure that stopped it.
        first: Arc<Error>,
    },
    /// The name of an open store leads elsewhere, or nowhere.
    #[error("{}", name_lost(path, *is_taken, moved_to.as_deref(), open))]
    NameLost {
        /// The name by which it was opened.
        path: PathBuf,
        /// Whether something else has this name by now.
        is_taken: bool,
        /// Where the open file is now; `None` when it was removed.
        moved_to: Option<PathBuf>,
        /// What leads to the open file as long as this process lives.
        open: PathBuf,
    },
    /// A scratch store's step was stopped half-way: its state is a mixture.
    #[error(
        "{path}: a step was stopped half-way, and with durability scratch it cannot be taken back: the state is lost. \
         Import the model again, or train with memory.durability: step", path = path.display()
    )]
    Lost {
        /// The store's file.
        path: PathBuf,
    },
    /// A buffer was given back while tensors over it were still alive.
    #[error(
        "{what} is still in use by {exports} tensor(s); drop every tensor and view over it first"
    )]
    BufferInUse {
        /// Which buffer.
        what: String,
        /// Live exports.
        exports: usize,
    },
    /// A tensor was changed by its owner while it was being put.
    #[error(
        "tensor {tensor} was changed while it was being put: what was written of it does not count. Wait for the ticket of \
         a put before you change the tensor, and put it again"
    )]
    Changed {
        /// Its name.
        tensor: String,
    },
    /// A gradient has an element that is NaN or infinite.
    #[error("the gradient of {record} is not finite")]
    NotFinite {
        /// Name of the record.
        record: String,
    },
    /// This process is a fork of the one that opened the store.
    #[error(
        "the store was opened by process {owner}, and this is its fork {child}: a forked process cannot use it. Open it in the child, or start workers with 'spawn'"
    )]
    UsedAfterFork {
        /// Process that opened the store.
        owner: u32,
        /// This process.
        child: u32,
    },
    /// The machine or kernel lacks something.
    #[error("{feature} is not available: {reason}")]
    Unsupported {
        /// What was asked for.
        feature: String,
        /// Why it is not there and what to do.
        reason: String,
    },
    /// A call that contradicts the schedule, the layout or an earlier call.
    #[error("{reason}")]
    Invalid {
        /// What contradicts what.
        reason: String,
    },
}

impl Error {
    /// An operating system failure at a place in a file.
    pub fn io(
        operation: &'static str,
        path: impl Into<PathBuf>,
        offset: u64,
        length: u64,
        source: impl Into<io::Error>,
    ) -> Self {
        let source = Arc::new(source.into());
        Self::Io { operation, path: path.into(), offset, length, source }
    }

    /// A call that contradicts the schedule, the layout or an earlier call.
    pub fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid { reason: reason.into() }
    }

    /// Whether the same operation may succeed the second time: the drive itself reported a failure.
    #[must_use]
    pub fn is_worth_a_retry(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()))
    }

    /// A file that this build cannot read.
    pub fn format(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Format { path: path.into(), reason: reason.into() }
    }

    /// One of each variant, so that the Python side can be tested against all of them.
    #[must_use]
    pub fn examples() -> Vec<Self> {
        let path = PathBuf::from("/nvme/example/store.mtio");
        let io = Self::io("write", &path, 4096, 8192, io::Error::from_raw_os_error(5));
        vec![
            io.clone(),
            Self::Truncated { path: path.clone(), end: 100, offset: 4096, length: 8192 },
            Self::NoSpace { path: path.clone(), needed: 1 << 40, available: 1 << 30 },
            Self::NoMemory { needed: 1 << 40, source: Arc::new(io::Error::from_raw_os_error(12)) },
            Self::InUse {
                path: path.clone(),
                owner: "process 4711 (python) since 2026-11-23 14:02:11".into(),
                is_this_process: false,
                waited_s: 5.0,
            },
            Self::format(&path, "not a megatrain-io store"),
            Self::Corrupt {
                path,
                what: "record model.layers.0, chunk 3".into(),
                offset: 1 << 21,
                expected: 1,
                found: 2,
            },
            Self::CorruptGradient {
                path: "/nvme/example/store.mtio.gradients".into(),
                record: "block 3".into(),
                offset: 1 << 21,
                expected: 1,
                found: 2,
            },
            Self::Failed { first: Arc::new(io) },
            Self::NameLost {
                path: "/nvme/example/store.mtio".into(),
                is_taken: false,
                moved_to: None,
                open: "/proc/4711/fd/7".into(),
            },
            Self::Lost { path: "/nvme/example/store.mtio".into() },
            Self::BufferInUse { what: "weights of model.layers.0".into(), exports: 1 },
            Self::Changed { tensor: "model.layers.0".into() },
            Self::NotFinite { record: "block 3".into() },
            Self::UsedAfterFork { owner: 1, child: 2 },
            Self::Unsupported { feature: "io_uring".into(), reason: "EPERM".into() },
            Self::invalid("record 7 does not exist; the store has 4"),
        ]
    }
}

/// What failed, where, why, and what can be done about it.
fn io_failure(
    operation: &str,
    path: &Path,
    offset: u64,
    length: u64,
    source: &io::Error,
) -> String {
    let place = path.display();
    let failed = match length {
        0 => format!("{operation} {place}: {source}"),
        _ => format!("{operation} of {length} bytes at {place}+{offset}: {source}"),
    };
    match advice(source) {
        "" => failed,
        advice => format!("{failed}. {advice}"),
    }
}

/// What a person can do about a failure of the operating system; empty where nothing is known.
fn advice(source: &io::Error) -> &'static str {
    use rustix::io::Errno;
    let Some(code) = source.raw_os_error() else { return "" };
    match Errno::from_raw_os_error(code) {
        Errno::NOENT => "Check the path, and that its drive is mounted",
        Errno::NOTDIR => "What stands in place of a folder in this path is a file: check the path",
        Errno::ISDIR => "This is a folder: give the path of a file in it",
        Errno::EXIST => "Something has this name by now: choose another one, or remove it",
        Errno::LOOP => "This is a symbolic link: give the path of the file itself",
        Errno::NAMETOOLONG => "Choose a shorter name (255 bytes at most on most file systems)",
        Errno::ACCESS | Errno::PERM => {
            "Whoever runs this needs the right to read and write there: look at owner and permissions (ls -ld)"
        }
        Errno::ROFS => {
            "The file system is mounted read-only, or turned so after a failure (dmesg): mount it for writing"
        }
        Errno::NOSPC => "The file system is full: free space on it",
        Errno::DQUOT => "The quota on this file system is used up: free space, or have it raised",
        Errno::FBIG => {
            "The file is larger than this process may write (ulimit -f), or than the file system allows: raise that \
             limit, or choose another file system"
        }
        Errno::MFILE => "This process has too many files open: raise the limit (ulimit -n)",
        Errno::NFILE => "The machine has too many files open: raise the limit (sysctl fs.file-max)",
        Errno::NOMEM => {
            "The kernel has no memory for it: end other programs, or raise limits (ulimit -v, -l)"
        }
        Errno::AGAIN => {
            "No more threads can be started: raise the limit (ulimit -u, or pids of the container)"
        }
        Errno::IO => {
            "The drive reported a failure: see the system's log (dmesg) and check the drive"
        }
        Errno::NODEV | Errno::NXIO => "The drive is gone: see the system's log (dmesg)",
        Errno::TXTBSY | Errno::BUSY => "Another program has it in use: end that first",
        _ => "",
    }
}

fn in_use_advice(path: &Path, is_this_process: bool) -> String {
    if is_this_process {
        return "That is this very process: close it there first".into();
    }
    let path = path.display();
    format!(
        "Stop that process (`fuser {path}` lists all that have it open), or choose another store"
    )
}

/// What became of an open store whose name is lost, and how to get it back.
fn name_lost(path: &Path, is_taken: bool, moved_to: Option<&Path>, open: &Path) -> String {
    let (path, open) = (path.display(), open.display());
    let taken = if is_taken { ", and another file has its name" } else { "" };
    match moved_to {
        Some(now) => format!(
            "{path} was moved while it was open{taken}: it is {} now. Nothing is lost: move it back and open it again, \
             and do so when nobody has it open",
            now.display()
        ),
        None => format!(
            "{path} was removed while it was open{taken}: what it holds is lost when this process ends, as a command \
             does now, and nothing more is committed. Restore a copy or import the model again; a program of your own \
             that lives on can save it by `cp --sparse=always {open} COPY`, all files of the store together"
        ),
    }
}

/// Bytes as GiB, for messages.
#[expect(clippy::cast_precision_loss, reason = "a message shows two decimals")]
fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1_u32 << 30)
}

#[cfg(test)]
mod tests;
