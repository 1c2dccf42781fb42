//! The engine for places where io_uring is refused: `pread` and `pwrite` in a few threads.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::buffer::Region;
use crate::engine::{Counters, Engine, Operation, Request};
use crate::error::{Error, Result};
use crate::file::DirectFile;

/// Requests in flight at once, for each drive: as deep as a consumer NVMe rewards at 2 MiB a request.
const THREADS: usize = 8;
/// Larger transfers are cut, so that one request does not hold a thread while others wait.
const PIECE_BYTES: usize = 2 << 20;

/// `pread`/`pwrite` in a thread pool.
#[derive(Debug)]
pub struct Threads {
    requests: Option<Sender<Request>>,
    workers: Vec<JoinHandle<()>>,
    counters: Arc<Counters>,
    process: u32,
}

impl Threads {
    /// Starts the threads for so many drives.
    ///
    /// # Errors
    /// `Io` when the system refuses a thread.
    pub fn start(drives: usize) -> Result<Self> {
        let (requests, queue) = unbounded::<Request>();
        let counters = Arc::new(Counters::default());
        let workers = (0..THREADS * drives.max(1))
            .map(|index| {
                let (queue, counters) = (queue.clone(), Arc::clone(&counters));
                std::thread::Builder::new()
                    .name(format!("mt-io-{index}"))
                    .spawn(move || work(&queue, &counters))
                    .map_err(|e| Error::io("start of an I/O thread", "engine threads", 0, 0, e))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { requests: Some(requests), workers, counters, process: std::process::id() })
    }
}

impl Engine for Threads {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn submit(&self, request: Request) {
        if let Err(error) = request.validate() {
            request.complete(Err(error));
        } else if let Some(requests) = &self.requests
            && let Err(refused) = requests.send(request)
        {
            refused.into_inner().complete(Err(Error::invalid("the engine has stopped")));
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
        self.requests = None;
        if std::process::id() != self.process {
            // A fork has no threads to wait for.
            std::mem::forget(std::mem::take(&mut self.workers));
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn work(queue: &Receiver<Request>, counters: &Counters) {
    for mut request in queue {
        let bytes = request.bytes as u64;
        match run(&mut request) {
            Ok(done) if done == request.bytes => {
                counters.add(request.operation, bytes);
                request.complete(Ok(()));
            }
            Ok(done) => request.truncated(done),
            Err(error) => request.fail(error),
        }
    }
}

/// Transfers everything; fewer bytes than asked for means the end of the file.
fn run(request: &mut Request) -> io::Result<usize> {
    let Request { operation, file, offset, slot, bytes, .. } = request;
    let file: &DirectFile = file;
    let Some(slot) = slot else {
        file.file().sync_data()?;
        return Ok(*bytes);
    };
    let mut done = 0;
    while done < *bytes {
        let end = (done + PIECE_BYTES).min(*bytes);
        let position = *offset + done as u64;
        let moved = match operation {
            Operation::Read => file.read_at(&mut slot[done..end], position),
            _ => file.write_at(&slot[done..end], position),
        };
        match moved {
            Ok(0) if *operation == Operation::Read => return Ok(done),
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(moved) => done += moved,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            Err(error) => return Err(error),
        }
    }
    if *operation == Operation::WriteDurable {
        file.file().sync_data()?;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_rules_of_an_engine() {
        crate::engine::conformance::run(&Threads::start(1).expect("threads"));
    }
}
