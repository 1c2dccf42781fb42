//! A first write, flush and read through a new ring. Setting a ring up is a promise that some kernels and
//! sandboxes do not keep: operations are then refused, never end, or move nothing.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, unbounded};

use crate::io::engine::{Engine, Operation, Request};
use crate::io::file::DirectFile;
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::units::PAGE_BYTES;

/// For each of the operations: on a file in memory they take microseconds.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Why the ring is of no use.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) reason: String,
    /// The kernel may still have an operation of ours.
    pub(super) is_stuck: bool,
}

/// Tries the engine out on a file in memory; what it wrote is read without it.
pub(super) fn run(engine: &dyn Engine, patience: Duration) -> Result<(), Failure> {
    let failed = |reason| Failure { reason, is_stuck: false };
    let made = DirectFile::in_memory(PAGE_BYTES as u64).and_then(|file| {
        let slot = || Slot::standalone(PAGE_BYTES, &Ledger::new(), "trial");
        Ok((Arc::new(file), slot()?, slot()?))
    });
    let (file, mut out, back) = made.map_err(|error| failed(error.to_string()))?;
    let expected: Vec<u8> = (0..=u8::MAX).cycle().take(PAGE_BYTES).collect();
    out.copy_from_slice(&expected);
    let try_out = |operation, slot| attempt(engine, operation, &file, slot, patience);
    try_out(Operation::Write, Some(out))?;
    let mut written = vec![0; PAGE_BYTES];
    let length = file.read_at(&mut written, 0).map_err(|error| failed(error.to_string()))?;
    if length != PAGE_BYTES || written != expected {
        return Err(failed("a first write said that it succeeded, and wrote other bytes".into()));
    }
    try_out(Operation::Sync, None)?;
    if try_out(Operation::Read, Some(back))?.is_none_or(|back| back[..] != expected) {
        return Err(failed("a first read said that it succeeded, and read other bytes".into()));
    }
    Ok(())
}

fn attempt(
    engine: &dyn Engine,
    operation: Operation,
    file: &Arc<DirectFile>,
    slot: Option<Slot>,
    patience: Duration,
) -> Result<Option<Slot>, Failure> {
    let (reply, completions) = unbounded();
    let (file, bytes) = (Arc::clone(file), slot.as_ref().map_or(0, |slot| slot.len()));
    engine.submit(Request { operation, file, offset: 0, slot, bytes, tag: 0, reply });
    let name = operation.name();
    match completions.recv_timeout(patience) {
        Ok(completion) => completion.result.map(|()| completion.slot).map_err(|error| {
            let reason = format!("a ring was set up, but a first operation failed: {error}");
            Failure { reason, is_stuck: false }
        }),
        Err(RecvTimeoutError::Timeout) => {
            let reason =
                format!("a ring was set up, but a first {name} did not end in {patience:?}");
            Err(Failure { reason, is_stuck: true })
        }
        Err(RecvTimeoutError::Disconnected) => {
            let reason = format!("a ring was set up, but lost a first {name}");
            Err(Failure { reason, is_stuck: true })
        }
    }
}

#[cfg(test)]
mod tests;
