//! Descriptors that a forked child must not hold. A lock lives as long as any copy of its descriptor:
//! a data loader's worker that outlives its killed parent would keep the store locked, and a ring's
//! memory pinned.
//!
//! `pthread_atfork` knows no context, so the table is global; it is the crate's only global state.
#![allow(unsafe_code, reason = "a handler that runs in the child, and the three calls it makes")]

use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::error::{Error, Result};

/// Open stores and rings at once, at most.
const PLACES: usize = 256;
const VACANT: i32 = -1;
static DESCRIPTORS: [AtomicI32; PLACES] = [const { AtomicI32::new(VACANT) }; PLACES];
static HANDLER: OnceLock<i32> = OnceLock::new();

/// While it lives, a forked child gets `/dev/null` in the descriptor's place. Drop it before the
/// descriptor is closed.
#[derive(Debug)]
pub struct NotInherited {
    place: &'static AtomicI32,
}

impl NotInherited {
    /// Keeps `descriptor` from forked children.
    ///
    /// # Errors
    /// `Invalid` when 256 are kept already, `Io` when the system takes no handler.
    pub fn new(descriptor: &impl AsRawFd) -> Result<Self> {
        // SAFETY: the handler calls async-signal-safe functions only, and is never unloaded before
        // the process ends: an extension module stays loaded.
        let code =
            *HANDLER.get_or_init(|| unsafe { libc::pthread_atfork(None, None, Some(in_child)) });
        if code != 0 {
            let source = std::io::Error::from_raw_os_error(code);
            return Err(Error::io("pthread_atfork", "this process", 0, 0, source));
        }
        let descriptor = descriptor.as_raw_fd();
        let order = (Ordering::AcqRel, Ordering::Relaxed);
        DESCRIPTORS
            .iter()
            .find(|place| place.compare_exchange(VACANT, descriptor, order.0, order.1).is_ok())
            .map(|place| Self { place })
            .ok_or_else(|| Error::invalid(format!("{PLACES} stores and rings are open already")))
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
    // SAFETY: `open` is async-signal-safe and gets a C string.
    let null = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    for place in &DESCRIPTORS {
        let descriptor: RawFd = place.load(Ordering::Acquire);
        if descriptor != VACANT && null >= 0 {
            // SAFETY: `dup3` is async-signal-safe; the descriptor is one that this process keeps open.
            unsafe { libc::dup3(null, descriptor, libc::O_CLOEXEC) };
        }
    }
    if null >= 0 {
        // SAFETY: `close` is async-signal-safe; the descriptor was opened above.
        unsafe { libc::close(null) };
    }
}
