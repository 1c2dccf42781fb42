//! Deliberately broken protocols, to show that the model would see them. A protocol without one of
//! its rules is the real code over an engine on which that rule has no effect.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::unbounded;

use super::base::Base;
use crate::error::Result;
use crate::io::engine::faulty::Faulty;
use crate::io::engine::{Counters, Engine, Operation, Request};
use crate::memory::ledger::Ledger;
use crate::memory::slot::{Region, Slot};

/// The rule that is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Breakage {
    Nothing,
    /// Extents count as written when they are submitted: the flush does not cover them.
    NoDrain,
    /// Both generations share one place for their superblock, and there is no mirror.
    OneSuperblock,
    /// Superblocks are written without a flush before them.
    NoFlush,
    /// Of several drives, only the main one is flushed before a superblock.
    OneDriveFlushed,
    /// Superblocks are written like any other block.
    NoDurableSuperblock,
    /// The commit is acknowledged before its superblock is durable: the gate opens early.
    NoGate,
    /// What a killed process wrote is believed before it is flushed.
    NoSyncAtOpen,
    /// The lock goes with the process, not with its last write.
    PosixLock,
    /// The first write since the last commit goes to the copy that is committed.
    InPlace,
}

impl Breakage {
    pub(super) const ALL: [Self; 9] = [
        Self::NoDrain,
        Self::OneSuperblock,
        Self::NoFlush,
        Self::OneDriveFlushed,
        Self::NoDurableSuperblock,
        Self::NoGate,
        Self::NoSyncAtOpen,
        Self::PosixLock,
        Self::InPlace,
    ];
}

/// The faulty drive, seen through a missing rule.
#[derive(Debug)]
pub(super) struct Broken {
    drive: Arc<Faulty>,
    breakage: Breakage,
    data_offset: u64,
    copy_bytes: u64,
    /// Whether a store is being opened now.
    opening: AtomicBool,
}

const MIB: u64 = 1 << 20;

impl Broken {
    pub(super) fn over(drive: Arc<Faulty>, breakage: Breakage, base: &Base) -> Arc<Self> {
        let (data_offset, copy_bytes) = (base.data_offset, base.copy_bytes);
        let opening = AtomicBool::new(false);
        Arc::new(Self { drive, breakage, data_offset, copy_bytes, opening })
    }

    pub(super) fn set_opening(&self, opening: bool) {
        self.opening.store(opening, Ordering::Relaxed);
    }

    /// Says that the operation is done and lets it happen later.
    fn acknowledge_early(&self, request: Request) {
        let mut copy = Slot::standalone(request.bytes, &Ledger::new(), "test").expect("memory");
        copy.copy_from_slice(&request.slot.as_deref().unwrap_or_default()[..request.bytes]);
        let (reply, _) = unbounded();
        let file = Arc::clone(&request.file);
        self.drive.submit(Request { slot: Some(copy), file, reply, ..request_like(&request) });
        request.complete(Ok(()));
    }
}

fn request_like(request: &Request) -> Request {
    Request {
        operation: request.operation,
        file: Arc::clone(&request.file),
        offset: request.offset,
        slot: None,
        bytes: request.bytes,
        tag: request.tag,
        reply: request.reply.clone(),
    }
}

impl Engine for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn submit(&self, mut request: Request) {
        use Breakage as B;
        use Operation as O;
        let opening = self.opening.load(Ordering::Relaxed);
        let copy_b = self.data_offset + self.copy_bytes;
        let is_extent = request.offset >= self.data_offset;
        match (self.breakage, request.operation) {
            (B::NoSyncAtOpen, O::Sync) if opening => return request.complete(Ok(())),
            (B::NoFlush, O::Sync) if !opening => return request.complete(Ok(())),
            (B::OneDriveFlushed, O::Sync) if !opening && request.file.drive() > 0 => {
                return request.complete(Ok(()));
            }
            (B::NoDurableSuperblock, O::WriteDurable) => request.operation = O::Write,
            (B::OneSuperblock, O::Read | O::WriteDurable)
                if (MIB..2 * MIB + MIB / 2).contains(&request.offset) =>
            {
                // Where the import's superblock is.
                request.offset = 2 * MIB;
            }
            (B::InPlace, O::Read | O::Write) if request.offset >= copy_b => {
                request.offset -= self.copy_bytes;
            }
            (B::NoDrain, O::Write) if is_extent && !opening => {
                return self.acknowledge_early(request);
            }
            (B::NoGate, O::WriteDurable) if !opening => return self.acknowledge_early(request),
            // The process itself sees what it wrote, in flight or not.
            (B::NoDrain, O::Read) if is_extent => while self.drive.deliver() {},
            _ => {}
        }
        self.drive.submit(request);
    }

    fn register(&self, _region: &Arc<Region>) -> Result<(), String> {
        Ok(())
    }

    fn unregister(&self) {}

    fn counters(&self) -> &Counters {
        self.drive.counters()
    }
}
