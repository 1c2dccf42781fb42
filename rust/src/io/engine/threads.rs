//! The engine for places where io_uring is refused: `pread` and `pwrite` in a few threads.
//!
//! A large request is cut into pieces that several threads serve at once. Each piece owns its part of the
//! slot; whoever ends the last one joins them and completes the request.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, unbounded};

use crate::error::{Error, Result};
use crate::io::engine::{Counters, Engine, Operation, Request};
use crate::memory::slot::{Region, Slot};

/// How the engine cuts and serves requests. The default needs no tuning: `benches/README.md` says why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Pieces in flight at once.
    pub threads: usize,
    /// Larger requests are cut into pieces of this size.
    pub piece_bytes: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { threads: 16, piece_bytes: 2 << 20 }
    }
}

/// `pread`/`pwrite` in a thread pool.
#[derive(Debug)]
pub struct Threads {
    pieces: Option<Sender<Piece>>,
    piece_bytes: usize,
    workers: Vec<JoinHandle<()>>,
    counters: Arc<Counters>,
    process: u32,
}

/// A run of bytes of one request; without a slot it is a flush.
#[derive(Debug)]
struct Piece {
    whole: Arc<Whole>,
    index: usize,
    start: usize,
    slot: Option<Slot>,
}

/// A request whose slot is out in pieces.
#[derive(Debug)]
struct Whole {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Taken by the last piece.
    request: Option<Request>,
    /// Parts that are back, by piece; the last is what lies behind the request's bytes.
    parts: Vec<Option<Slot>>,
    left: usize,
    failed: Option<Failure>,
}

#[derive(Debug)]
enum Failure {
    System(io::Error),
    EndOfFile(usize),
}

impl Threads {
    /// Starts the threads for so many drives.
    ///
    /// # Errors
    /// `Io` when the system refuses a thread.
    pub fn start(drives: usize) -> Result<Self> {
        let Tuning { threads, piece_bytes } = Tuning::default();
        Self::start_with(Tuning { threads: threads * drives.max(1), piece_bytes })
    }

    /// The same, tuned; for benchmarks.
    ///
    /// # Errors
    /// As `start`.
    pub fn start_with(tuning: Tuning) -> Result<Self> {
        let (pieces, queue) = unbounded::<Piece>();
        let counters = Arc::new(Counters::default());
        let workers = (0..tuning.threads)
            .map(|index| {
                let (queue, counters) = (queue.clone(), Arc::clone(&counters));
                std::thread::Builder::new()
                    .name(format!("mt-io-{index}"))
                    .spawn(move || queue.iter().for_each(|piece| piece.serve(&counters)))
                    .map_err(|e| Error::io("start a thread of", "this process", 0, 0, e))
            })
            .collect::<Result<Vec<_>>>()?;
        let (pieces, process) = (Some(pieces), std::process::id());
        Ok(Self { pieces, piece_bytes: tuning.piece_bytes, workers, counters, process })
    }
}

impl Engine for Threads {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn submit(&self, mut request: Request) {
        if let Err(error) = request.validate() {
            return request.complete(Err(error));
        }
        let Some(queue) = &self.pieces else { return };
        let mut slots = Vec::new();
        let mut rest = request.slot.take();
        let mut start = 0;
        while start < request.bytes
            && let Some(slot) = rest.take()
        {
            let bytes = self.piece_bytes.min(request.bytes - start);
            let (piece, behind) = slot.split_at(bytes);
            slots.push((start, Some(piece)));
            rest = Some(behind);
            start += bytes;
        }
        if request.operation == Operation::Sync {
            slots.push((0, None));
        }
        let left = slots.len();
        let mut parts: Vec<Option<Slot>> = slots.iter().map(|_| None).collect();
        parts.push(rest);
        let state = State { request: Some(request), parts, left, failed: None };
        let whole = Arc::new(Whole { state: Mutex::new(state) });
        for (index, (start, slot)) in slots.into_iter().enumerate() {
            let piece = Piece { whole: Arc::clone(&whole), index, start, slot };
            if let Err(refused) = queue.send(piece) {
                let stopped = io::Error::other("the engine has stopped");
                refused.into_inner().end(Some(Failure::System(stopped)), &self.counters);
            }
        }
    }

    fn register(&self, _region: &Arc<Region>) -> Result<(), String> {
        Ok(())
    }

    fn unregister(&self) {}

    fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Closing the queue lets each worker finish what it holds and what is queued; then the
        // join proves that no system call on our buffers is left.
        self.pieces = None;
        if std::process::id() != self.process {
            // A fork has no threads to wait for.
            std::mem::forget(std::mem::take(&mut self.workers));
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Piece {
    fn serve(mut self, counters: &Counters) {
        let (operation, file, offset) = {
            let state = self.whole.lock();
            let is_lost = matches!(state.failed, Some(Failure::System(_)));
            let Some(request) = state.request.as_ref().filter(|_| !is_lost) else {
                // The request has failed: what is left of it is not tried. (Where the file ends is only
                // known when the pieces before have been read.)
                drop(state);
                return self.end(None, counters);
            };
            (request.operation, Arc::clone(&request.file), request.offset + self.start as u64)
        };
        let failed = match self.slot.as_deref_mut() {
            Some(bytes) => transfer(operation, file.file(), offset, bytes).err(),
            None => file.file().sync_data().err().map(Failure::System),
        };
        let failed = failed.map(|failure| match failure {
            Failure::EndOfFile(at) => Failure::EndOfFile(self.start + at),
            other => other,
        });
        drop(file);
        self.end(failed, counters);
    }

    /// Gives the part back; the last piece of a request completes it.
    fn end(self, failed: Option<Failure>, counters: &Counters) {
        let Self { whole, index, slot, .. } = self;
        let mut state = whole.lock();
        state.parts[index] = slot;
        state.left -= 1;
        state.failed = match (state.failed.take(), failed) {
            // The file ends where the first of them met its end.
            (Some(Failure::EndOfFile(a)), Some(Failure::EndOfFile(b))) => {
                Some(Failure::EndOfFile(a.min(b)))
            }
            (first, second) => first.or(second),
        };
        if state.left > 0 {
            return;
        }
        let Some(mut request) = state.request.take() else { return };
        request.slot = std::mem::take(&mut state.parts).into_iter().flatten().reduce(Slot::join);
        let failed = state.failed.take();
        drop(state);
        let durable = request.operation == Operation::WriteDurable && failed.is_none();
        let flushed = if durable { request.file.file().sync_data() } else { Ok(()) };
        match (failed, flushed) {
            (Some(Failure::System(error)), _) | (None, Err(error)) => request.fail(error),
            (Some(Failure::EndOfFile(at)), _) => request.truncated(at),
            (None, Ok(())) => {
                counters.add(request.operation, request.bytes as u64);
                request.complete(Ok(()));
            }
        }
    }
}

impl Whole {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Transfers all of `bytes`; a read that meets the end of the file says after how many.
fn transfer(
    operation: Operation,
    file: &std::fs::File,
    offset: u64,
    bytes: &mut [u8],
) -> Result<(), Failure> {
    use std::os::unix::fs::FileExt as _;
    let mut done = 0;
    while done < bytes.len() {
        let position = offset + done as u64;
        let moved = match operation {
            Operation::Read => file.read_at(&mut bytes[done..], position),
            _ => file.write_at(&bytes[done..], position),
        };
        match moved {
            Ok(0) if operation == Operation::Read => return Err(Failure::EndOfFile(done)),
            Ok(0) => return Err(Failure::System(io::ErrorKind::WriteZero.into())),
            Ok(moved) => done += moved,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            Err(error) => return Err(Failure::System(error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
