//! The thread that owns the ring: cuts requests into pieces, keeps the ring full, reaps.
#![allow(unsafe_code, reason = "io_uring takes raw addresses; this file alone hands them over")]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use crate::error::Error;
use crate::io::engine::{Completion, Counters, Operation, Request};
use crate::memory::slot::Region;

/// The kernel registers at most 1 GiB as one buffer.
const REGISTERED_BYTES: usize = 1 << 30;
/// How long a drop waits for the kernel; drives give up on a request after 30 s.
const DRAIN_WAIT: Duration = Duration::from_secs(60);
const WAKE: u64 = u64::MAX;

/// How the ring is set up and requests are cut. The default needs no tuning: `benches/README.md` says why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Pieces in flight at once.
    pub depth: usize,
    /// Larger requests are cut into pieces of this size.
    pub piece_bytes: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { depth: 64, piece_bytes: 2 << 20 }
    }
}

/// What the front asks of the driver.
pub(super) enum Command {
    Submit(Request),
    Register(Arc<Region>, Sender<Result<(), String>>),
    Unregister(Sender<()>),
}

/// A request and how far it is.
struct InFlight {
    request: Request,
    /// Bytes handed to the kernel at least once.
    cut: usize,
    /// Pieces that the kernel has now.
    outstanding: usize,
    /// Bytes transferred.
    done: usize,
    /// The first failure; the request ends when the kernel has no piece of it left.
    failed: Option<Failure>,
}

enum Failure {
    System(io::Error),
    EndOfFile(usize),
}

/// A run of bytes of one request.
#[derive(Clone, Copy)]
struct Piece {
    entry: usize,
    start: usize,
    bytes: usize,
}

pub(super) struct Driver {
    ring: IoUring,
    inbox: Receiver<Command>,
    wake: Arc<File>,
    /// Where the kernel puts the eventfd's count; boxed, so that its address stays.
    wake_count: Box<[u8; 8]>,
    counters: Arc<Counters>,
    entries: Vec<Option<InFlight>>,
    vacant: Vec<usize>,
    /// Requests with bytes that were not handed to the kernel yet, oldest first.
    waiting: VecDeque<usize>,
    /// Pieces to hand over again: interrupted, or the rest of a short transfer.
    again: VecDeque<Piece>,
    pieces: Vec<Option<Piece>>,
    vacant_pieces: Vec<usize>,
    registered: Weak<Region>,
    /// Whether the kernel has the read of `wake`.
    wake_armed: bool,
    closing: bool,
    piece_bytes: usize,
}

impl Driver {
    pub(super) fn new(
        ring: IoUring,
        inbox: Receiver<Command>,
        wake: Arc<File>,
        counters: Arc<Counters>,
        tuning: Tuning,
    ) -> Self {
        Self {
            ring,
            inbox,
            wake,
            wake_count: Box::new([0; 8]),
            counters,
            entries: Vec::new(),
            vacant: Vec::new(),
            waiting: VecDeque::new(),
            again: VecDeque::new(),
            pieces: (0..tuning.depth).map(|_| None).collect(),
            vacant_pieces: (0..tuning.depth).rev().collect(),
            registered: Weak::new(),
            wake_armed: false,
            closing: false,
            piece_bytes: tuning.piece_bytes,
        }
    }

    /// Serves until the front is gone. What the kernel still has when this returns, or panics, must
    /// never be freed: the caller leaks the driver unless `is_drained`.
    pub(super) fn run(&mut self) {
        let mut deadline = None;
        loop {
            self.receive();
            if self.is_drained() {
                return;
            }
            if self.closing && Instant::now() > *deadline.get_or_insert(Instant::now() + DRAIN_WAIT)
            {
                return;
            }
            if !self.closing && !self.wake_armed {
                self.arm_wake();
            }
            self.hand_over();
            if let Err(error) = self.wait().and_then(|()| self.reap()) {
                self.give_up(&error);
                return;
            }
        }
    }

    /// Whether the kernel has nothing of ours and nothing is left to do.
    pub(super) fn is_drained(&self) -> bool {
        self.closing && !self.wake_armed && self.entries.iter().all(Option::is_none)
    }

    /// The ring is beyond use: every request ends with the cause. Slots that the kernel may still
    /// touch do not go back with it; they stay here and are leaked with the driver.
    fn give_up(&mut self, cause: &io::Error) {
        let failed = |operation: Operation| {
            let again = cause.raw_os_error().map(io::Error::from_raw_os_error);
            let source = again.unwrap_or_else(|| cause.kind().into());
            Error::io(operation.name(), "through io_uring", 0, 0, source)
        };
        for in_flight in self.entries.iter().flatten() {
            let Request { operation, tag, reply, .. } = &in_flight.request;
            let _ =
                reply.send(Completion { tag: *tag, slot: None, result: Err(failed(*operation)) });
        }
        // Until the front goes away, whatever still comes fails at once.
        for command in &self.inbox {
            match command {
                Command::Submit(request) => {
                    let error = failed(request.operation);
                    request.complete(Err(error));
                }
                Command::Register(_, reply) => {
                    let _ = reply.send(Err(cause.to_string()));
                }
                Command::Unregister(reply) => {
                    let _ = reply.send(());
                }
            }
        }
    }

    fn receive(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Submit(request)) => self.accept(request),
                Ok(Command::Register(region, reply)) => {
                    let _ = reply.send(self.register(&region));
                }
                Ok(Command::Unregister(reply)) => {
                    self.unregister();
                    let _ = reply.send(());
                }
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.closing = true;
                    return;
                }
            }
        }
    }

    fn accept(&mut self, request: Request) {
        let entry = InFlight { request, cut: 0, outstanding: 0, done: 0, failed: None };
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        self.entries[index] = Some(entry);
        self.waiting.push_back(index);
    }

    /// Fills the ring up to its depth.
    fn hand_over(&mut self) {
        while let Some(slot) = self.vacant_pieces.pop() {
            let Some(piece) = self.next_piece() else {
                self.vacant_pieces.push(slot);
                return;
            };
            let sqe = self.build(piece).user_data(slot as u64);
            self.pieces[slot] = Some(piece);
            self.push(&sqe);
        }
    }

    fn next_piece(&mut self) -> Option<Piece> {
        if let Some(piece) = self.again.pop_front() {
            return Some(piece);
        }
        let entry = *self.waiting.front()?;
        let in_flight = self.entries[entry].as_mut()?;
        let start = in_flight.cut;
        let bytes = self.piece_bytes.min(in_flight.request.bytes - start);
        in_flight.cut += bytes;
        in_flight.outstanding += 1;
        if in_flight.cut == in_flight.request.bytes {
            self.waiting.pop_front();
        }
        Some(Piece { entry, start, bytes })
    }

    fn build(&mut self, piece: Piece) -> squeue::Entry {
        let registered = &self.registered;
        let Some(in_flight) = self.entries[piece.entry].as_mut() else {
            return opcode::Nop::new().build();
        };
        let request = &mut in_flight.request;
        let file = Fd(request.file.file().as_raw_fd());
        let Some(slot) = request.slot.as_mut() else {
            return opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build();
        };
        let offset = request.offset + piece.start as u64;
        let bytes = u32::try_from(piece.bytes).unwrap_or(0);
        let address = slot.address().wrapping_add(piece.start);
        let (region, place) = slot.place();
        let place = place + piece.start;
        let buffer = place / REGISTERED_BYTES;
        let fixed = std::ptr::eq(registered.as_ptr(), Arc::as_ptr(region))
            && buffer == (place + piece.bytes - 1) / REGISTERED_BYTES;
        let buffer = u16::try_from(buffer).unwrap_or(0);
        let durable =
            if request.operation == Operation::WriteDurable { libc::RWF_DSYNC } else { 0 };
        match (request.operation, fixed) {
            (Operation::Read, true) => {
                opcode::ReadFixed::new(file, address, bytes, buffer).offset(offset).build()
            }
            (Operation::Read, false) => {
                opcode::Read::new(file, address, bytes).offset(offset).build()
            }
            (_, true) => opcode::WriteFixed::new(file, address, bytes, buffer)
                .offset(offset)
                .rw_flags(durable)
                .build(),
            (_, false) => {
                opcode::Write::new(file, address, bytes).offset(offset).rw_flags(durable).build()
            }
        }
    }

    fn push(&mut self, sqe: &squeue::Entry) {
        // SAFETY: the entry's address and file belong to an entry of `self.entries` (or to
        // `self.wake_count` and `self.wake`), which stays there until the completion was reaped.
        let pushed = unsafe { self.ring.submission().push(sqe) };
        // The ring has twice as many places as there are pieces: a full one is our bug.
        assert!(pushed.is_ok(), "the submission queue is full");
    }

    fn arm_wake(&mut self) {
        let address = self.wake_count.as_mut_ptr();
        let sqe = opcode::Read::new(Fd(self.wake.as_raw_fd()), address, 8).build().user_data(WAKE);
        self.push(&sqe);
        self.wake_armed = true;
    }

    fn wait(&mut self) -> io::Result<()> {
        let outcome = if self.closing {
            // Bounded, so that the deadline is looked at.
            let timeout = Timespec::new().sec(1);
            let arguments = SubmitArgs::new().timespec(&timeout);
            self.ring.submitter().submit_with_args(1, &arguments)
        } else {
            self.ring.submit_and_wait(1)
        };
        use rustix::io::Errno;
        // All of these mean: look at the completions, then try again.
        let expected = [Errno::INTR, Errno::AGAIN, Errno::BUSY, Errno::TIME];
        match outcome {
            Err(error)
                if !expected.iter().any(|e| error.raw_os_error() == Some(e.raw_os_error())) =>
            {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    fn reap(&mut self) -> io::Result<()> {
        let reaped: Vec<(u64, i32)> =
            self.ring.completion().map(|cqe| (cqe.user_data(), cqe.result())).collect();
        let mut outcome = Ok(());
        for (user_data, result) in reaped {
            if user_data == WAKE {
                self.wake_armed = false;
                // Without its bell the driver would spin or sleep for ever.
                outcome = failure(result).filter(|error| !is_transient(error)).map_or(Ok(()), Err);
                continue;
            }
            let slot = crate::units::to_usize(user_data);
            if let Some(piece) = self.pieces[slot].take() {
                self.vacant_pieces.push(slot);
                self.finish_piece(piece, result);
            }
        }
        outcome
    }

    fn finish_piece(&mut self, piece: Piece, result: i32) {
        let Some(in_flight) = self.entries[piece.entry].as_mut() else { return };
        let is_sync = in_flight.request.operation == Operation::Sync;
        match failure(result).map_or_else(|| Ok(usize::try_from(result).unwrap_or(0)), Err) {
            Ok(_) if is_sync => in_flight.outstanding -= 1,
            Ok(0) => {
                in_flight.outstanding -= 1;
                match (&mut in_flight.failed, in_flight.request.operation) {
                    (Some(Failure::EndOfFile(at)), _) => *at = piece.start.min(*at),
                    (Some(Failure::System(_)), _) => {}
                    (none, Operation::Read) => *none = Some(Failure::EndOfFile(piece.start)),
                    (none, _) => *none = Some(Failure::System(io::ErrorKind::WriteZero.into())),
                }
            }
            Ok(moved) if moved < piece.bytes => {
                in_flight.done += moved;
                let rest =
                    Piece { start: piece.start + moved, bytes: piece.bytes - moved, ..piece };
                self.again.push_back(rest);
            }
            Ok(moved) => {
                in_flight.done += moved;
                in_flight.outstanding -= 1;
            }
            Err(error) if is_transient(&error) => self.again.push_back(piece),
            Err(error) => {
                in_flight.outstanding -= 1;
                in_flight.failed.get_or_insert(Failure::System(error));
            }
        }
        self.finish_request(piece.entry);
    }

    fn finish_request(&mut self, index: usize) {
        let Some(in_flight) = self.entries[index].as_ref() else { return };
        let all_cut = in_flight.cut == in_flight.request.bytes;
        if in_flight.outstanding > 0 || !(all_cut || in_flight.failed.is_some()) {
            return;
        }
        self.waiting.retain(|waiting| *waiting != index);
        self.vacant.push(index);
        let Some(InFlight { request, failed, done, .. }) = self.entries[index].take() else {
            return;
        };
        match failed {
            Some(Failure::System(error)) => request.fail(error),
            Some(Failure::EndOfFile(at)) => request.truncated(at),
            None => {
                self.counters.add(request.operation, done as u64);
                request.complete(Ok(()));
            }
        }
    }

    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.unregister();
        let mut buffers = Vec::new();
        let mut start = 0;
        while start < region.bytes() {
            let bytes = REGISTERED_BYTES.min(region.bytes() - start);
            let address = region.address().wrapping_add(start);
            buffers.push(libc::iovec { iov_base: address.cast(), iov_len: bytes });
            start += bytes;
        }
        // SAFETY: the addresses are the region's own. The kernel pins the pages, so even a region
        // that is dropped while registered cannot be written to at another owner's expense, and
        // `build` uses the registration only for slots of this very region (compared by `Weak`,
        // which keeps the region's identity from being reused).
        let registered = unsafe { self.ring.submitter().register_buffers(&buffers) };
        match registered {
            Ok(()) => {
                self.registered = Arc::downgrade(region);
                Ok(())
            }
            Err(error) => Err(format!("io_uring_register of {} bytes: {error}", region.bytes())),
        }
    }

    fn unregister(&mut self) {
        if self.registered.as_ptr() != Weak::<Region>::new().as_ptr() {
            // Requests in flight keep their own hold on the pages.
            let _ = self.ring.submitter().unregister_buffers();
            self.registered = Weak::new();
        }
    }
}

/// The error that a completion's result names.
fn failure(result: i32) -> Option<io::Error> {
    (result < 0).then(|| io::Error::from_raw_os_error(result.saturating_neg()))
}

/// Whether the kernel asks for the same operation again.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}
