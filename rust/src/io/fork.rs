//! Descriptors that a forked child must not hold. A lock lives as long as any copy of its descriptor:
//! a data loader's worker that outlives its killed parent would keep the store locked, and a ring's
//! memory pinned.
//!
//! `pthread_atfork` knows no context, so the table is global; it is the crate's only global state.
#![allow(unsafe_code, reason = "a handler that runs in the child, and the call it makes")]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::error::{Error, Result};

/// Open stores and rings at once, at most.
const PLACES: usize = 256;
const VACANT: i32 = -1;
static DESCRIPTORS: [AtomicI32; PLACES] = [const { AtomicI32::new(VACANT) }; PLACES];
/// `/dev/null`, open for as long as the process lives; or why it is not to be had.
static NULL: OnceLock<Result<File>> = OnceLock::new();

/// While it lives, a forked child gets `/dev/null` in the descriptor's place. Drop it before the
/// descriptor is closed.
#[derive(Debug)]
pub(crate) struct NotInherited {
    place: &'static AtomicI32,
}

impl NotInherited {
    /// Keeps `descriptor` from forked children.
    ///
    /// # Errors
    /// `Invalid` when 256 are kept already, `Io` when the system takes no handler.
    pub(crate) fn new(descriptor: &impl AsRawFd) -> Result<Self> {
        NULL.get_or_init(prepare).as_ref().map_err(Clone::clone)?;
        let descriptor = descriptor.as_raw_fd();
        let order = (Ordering::AcqRel, Ordering::Relaxed);
        DESCRIPTORS
            .iter()
            .find(|place| place.compare_exchange(VACANT, descriptor, order.0, order.1).is_ok())
            .map(|place| Self { place })
            .ok_or_else(|| Error::invalid(format!("{PLACES} stores and rings are open already")))
    }
}

/// Opens `/dev/null` and registers the handler.
fn prepare() -> Result<File> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = null.map_err(|e| Error::io("open", "/dev/null", 0, 0, e))?;
    // SAFETY: the handler calls async-signal-safe functions only, and is never unloaded before the
    // process ends: an extension module stays loaded.
    match unsafe { libc::pthread_atfork(None, None, Some(in_child)) } {
        0 => Ok(null),
        code => {
            let source = std::io::Error::from_raw_os_error(code);
            Err(Error::io("register a handler for forks of", "this process", 0, 0, source))
        }
    }
}

impl Drop for NotInherited {
    fn drop(&mut self) {
        self.place.store(VACANT, Ordering::Release);
    }
}

/// Runs in the child, between `fork` and its return. The number stays taken, by `/dev/null`, so that
/// the child closing what it believes to be its file can hit nothing else.
extern "C" fn in_child() {
    let Some(Ok(null)) = NULL.get() else { return };
    for place in &DESCRIPTORS {
        let descriptor: RawFd = place.load(Ordering::Acquire);
        if descriptor != VACANT {
            // SAFETY: `dup3` is async-signal-safe; both descriptors are kept open by this process.
            unsafe { libc::dup3(null.as_raw_fd(), descriptor, libc::O_CLOEXEC) };
        }
    }
}
