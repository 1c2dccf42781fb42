//! How bytes move: the trait that all engines share, and blocking calls on top of it.
//!
//! Ownership: a [`Slot`] moves into the [`Request`] and comes back with the [`Completion`], also on
//! error. While it is in flight the engine owns slot and file.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::{Sender, unbounded};

use crate::error::{Error, Result};
use crate::io::file::DirectFile;
use crate::memory::slot::{Region, Slot};

pub(crate) mod choice;
pub(crate) mod faulty;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(test), allow(dead_code, reason = "the fuzz target compares less than the tests"))]
pub(crate) mod memory;
pub mod threads;
#[cfg(all(feature = "uring", target_os = "linux"))]
pub mod uring;

/// What to do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Fill the slot from the file.
    Read,
    /// Write the slot to the file.
    Write,
    /// Write, and return only when it is on stable storage (`RWF_DSYNC`).
    WriteDurable,
    /// `fdatasync`: covers the writes that have completed before it is submitted, no others.
    Sync,
}

impl Operation {
    /// The name used in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write | Self::WriteDurable => "write",
            Self::Sync => "fdatasync",
        }
    }
}

/// An operation on its way to the engine.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// The file; kept open until the completion.
    pub file: Arc<DirectFile>,
    /// File offset in bytes, a multiple of 4 KiB.
    pub offset: u64,
    /// The bytes; `None` for [`Operation::Sync`].
    pub slot: Option<Slot>,
    /// How many bytes from the slot's start to transfer, a multiple of 4 KiB.
    pub bytes: usize,
    /// The caller's own number for it, returned with the completion.
    pub tag: u64,
    /// Where the completion goes. If nobody listens any more, the slot returns to its list.
    pub reply: Sender<Completion>,
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Completion {
    /// The request's tag.
    pub tag: u64,
    /// The request's slot.
    pub slot: Option<Slot>,
    /// `Ok` only when every byte was transferred.
    pub result: Result,
}

impl Request {
    /// Ends the request.
    pub fn complete(self, result: Result) {
        // A caller that went away needs no answer; its slot returns to its list here.
        let _ = self.reply.send(Completion { tag: self.tag, slot: self.slot, result });
    }

    /// Ends the request with an operating system error.
    pub fn fail(self, source: impl Into<std::io::Error>) {
        let error = Error::io(
            self.operation.name(),
            self.file.path(),
            self.offset,
            self.bytes as u64,
            source,
        );
        self.complete(Err(error));
    }

    /// Ends a read that met the end of the file after `done` bytes.
    pub fn truncated(self, done: usize) {
        let error = Error::Truncated {
            path: self.file.path().into(),
            end: self.offset + done as u64,
            offset: self.offset,
            length: self.bytes as u64,
        };
        self.complete(Err(error));
    }

    /// Checks what every engine relies on: aligned, inside the slot.
    ///
    /// # Errors
    /// `Invalid` naming the rule that is broken.
    pub fn validate(&self) -> Result {
        let available = self.slot.as_ref().map_or(0, |slot| slot.len());
        let aligned = crate::io::file::is_aligned(self.offset)
            && crate::io::file::is_aligned(self.bytes as u64);
        if self.operation == Operation::Sync {
            return Ok(());
        }
        if self.bytes == 0 || self.bytes > available || !aligned {
            return Err(Error::invalid(format!(
                "{} of {} bytes at offset {} into a slot of {available}: must be aligned to 4 KiB, not empty, and fit",
                self.operation.name(),
                self.bytes,
                self.offset
            )));
        }
        Ok(())
    }
}

/// Bytes that an engine has moved since it was started.
#[derive(Debug, Default)]
pub struct Counters {
    read: AtomicU64,
    written: AtomicU64,
}

impl Counters {
    /// Adds a finished transfer.
    pub fn add(&self, operation: Operation, bytes: u64) {
        match operation {
            Operation::Read => self.read.fetch_add(bytes, Ordering::Relaxed),
            Operation::Write | Operation::WriteDurable => {
                self.written.fetch_add(bytes, Ordering::Relaxed)
            }
            Operation::Sync => 0,
        };
    }

    /// Bytes read and written.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        (self.read.load(Ordering::Relaxed), self.written.load(Ordering::Relaxed))
    }
}

/// How bytes move. Engines differ in speed only: the bytes and the order of effects are the same.
pub trait Engine: Send + Sync + std::fmt::Debug {
    /// The engine's name: `uring`, `threads`.
    fn name(&self) -> &'static str;

    /// Starts an operation. The completion comes through `request.reply`, always exactly one, also
    /// when the request is refused.
    fn submit(&self, request: Request);

    /// Tells the engine about memory that many operations will use.
    ///
    /// # Errors
    /// Why the memory could not be registered; operations on it work all the same.
    fn register(&self, region: &Arc<Region>) -> Result<(), String>;

    /// Forgets the registered memory, so that it is freed with its last slot.
    fn unregister(&self);

    /// Bytes moved so far.
    fn counters(&self) -> &Counters;
}

/// Performs one operation on the whole slot and waits for it; the slot comes back in both cases. A
/// read or plain write that the drive failed is tried once more; what promises durability is not.
///
/// # Errors
/// Beside the slot: the operation's own error.
pub(crate) fn perform(
    engine: &dyn Engine,
    operation: Operation,
    file: &Arc<DirectFile>,
    offset: u64,
    slot: Option<Slot>,
) -> (Option<Slot>, Result) {
    let bytes = slot.as_ref().map_or(0, |slot| slot.len());
    match perform_once(engine, operation, file, offset, slot, bytes) {
        (Some(slot), Err(error))
            if error.is_worth_a_retry() && operation != Operation::WriteDurable =>
        {
            perform_once(engine, operation, file, offset, Some(slot), bytes)
        }
        outcome => outcome,
    }
}

/// Performs one operation on the first `bytes` of the slot and waits for it.
///
/// # Errors
/// Beside the slot: the operation's own error.
pub(crate) fn perform_once(
    engine: &dyn Engine,
    operation: Operation,
    file: &Arc<DirectFile>,
    offset: u64,
    slot: Option<Slot>,
    bytes: usize,
) -> (Option<Slot>, Result) {
    let (reply, completions) = unbounded();
    let file = Arc::clone(file);
    engine.submit(Request { operation, file, offset, slot, bytes, tag: 0, reply });
    match completions.recv() {
        Ok(completion) => (completion.slot, completion.result),
        Err(_) => (None, Err(Error::invalid("the engine dropped a request"))),
    }
}

#[cfg(test)]
mod tests;
