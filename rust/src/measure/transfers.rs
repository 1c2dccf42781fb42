//! Transfers in flight together, from pool slots in huge pages that the engine has registered.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;

use crate::error::{Error, Result};
use crate::io::engine::{Engine, Operation, Request};
use crate::measure::scratch::{PERIOD_BYTES, ScratchFile};
use crate::measure::{Clocks, Figure};
use crate::memory::ledger::Ledger;
use crate::memory::slot::SlotList;
use crate::units::{Group, StateFormat};

/// Extents of a chunk of 2 Mi parameters in bf16: its weights, and all that only the update needs.
const WEIGHT_BYTES: u64 = (StateFormat::Bf16.group_bytes(Group::Weight) as u64) << 21;
const UPDATE_BYTES: u64 = (StateFormat::Bf16.group_bytes(Group::Update) as u64) << 21;
/// Both copies of such a chunk: what one cycle of [`Traffic::Training`] takes of the file.
pub const TRAINING_CYCLE_BYTES: u64 = 2 * (WEIGHT_BYTES + UPDATE_BYTES);

/// What the requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Reads, one after another through the file.
    Read,
    /// Writes, one after another through the file.
    Write,
    /// 14 bytes read for 12 written, in requests of one size: reads in the first half of the file,
    /// writes in the second.
    Mixed,
    /// 14 bytes read for 12 written, in the extents of training: the weights of a chunk twice and
    /// its update planes once are read from one copy, both are written to the other.
    Training,
}

/// Size and depth of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Bytes of a request, a multiple of 1 MiB. [`Traffic::Training`] has sizes of its own.
    pub bytes: usize,
    /// Requests in flight.
    pub depth: usize,
}

/// When a run ends: after so many bytes (rounded up to whole requests) or so much time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Bytes to transfer, reads and writes together.
    pub bytes: u64,
    /// No request is started after so long.
    pub time: Duration,
}

impl Limit {
    /// So many bytes, however long they take.
    #[must_use]
    pub fn bytes(bytes: u64) -> Self {
        Self { bytes, time: Duration::MAX }
    }
}

/// An engine with a pool for one form of request. Made outside what is timed.
#[derive(Debug)]
pub struct Transfers {
    engine: Arc<dyn Engine>,
    slots: SlotList,
    form: Form,
    registration_refused: Option<String>,
}

impl Transfers {
    /// Allocates the slots and registers them.
    ///
    /// # Errors
    /// `Invalid` for a form that is empty or no multiple of 1 MiB, `Io` when memory is refused.
    pub fn new(engine: &Arc<dyn Engine>, form: Form) -> Result<Self> {
        if form.depth == 0 || form.bytes == 0 || !form.bytes.is_multiple_of(PERIOD_BYTES) {
            return Err(Error::invalid(format!(
                "{} requests of {} bytes in flight: at least one, of whole MiB",
                form.depth, form.bytes
            )));
        }
        let (region, mut lists) =
            SlotList::cut(&[(form.bytes, form.depth)], &Ledger::new(), "bench")?;
        let _ = region.populate();
        // A refusal (RLIMIT_MEMLOCK) costs CPU time only, and is told.
        let registration_refused = engine.register(&region).err();
        let slots = lists.pop().ok_or_else(|| Error::invalid("one list was cut"))?;
        Ok(Self { engine: Arc::clone(engine), slots, form, registration_refused })
    }

    /// The same for [`Traffic::Training`]: slots that hold the largest extent.
    ///
    /// # Errors
    /// As `new`.
    pub fn for_training(engine: &Arc<dyn Engine>, depth: usize) -> Result<Self> {
        Self::new(engine, Form { bytes: crate::units::to_usize(UPDATE_BYTES), depth })
    }

    /// Why the engine works without registered memory.
    #[must_use]
    pub fn registration_refused(&self) -> Option<&str> {
        self.registration_refused.as_deref()
    }

    /// Transfers through the file, round and round, the first request at `offset`. Writes leave the
    /// file's own contents, and reads are compared with them when the clocks have stopped (those that
    /// the slots still hold).
    ///
    /// # Errors
    /// `Invalid` when the file is too small for one request of each kind; `Io`; `Format` when a read
    /// gave other bytes than were written. Nothing is in flight any more then.
    pub fn run(
        &self,
        file: &ScratchFile,
        traffic: Traffic,
        offset: u64,
        limit: Limit,
    ) -> Result<Figure> {
        let mut places = Places::new(traffic, self.form.bytes as u64, file.bytes, offset)?;
        self.prepare(file, traffic);
        let (reply, completions) = unbounded();
        let (mut in_flight, mut issued) = (0, 0);
        let (mut read, mut written, mut failed) = (0, 0, None);
        let (start, clocks) = (Instant::now(), Clocks::start());
        loop {
            while failed.is_none()
                && issued < limit.bytes
                && start.elapsed() < limit.time
                && let Some(slot) = self.slots.try_take()
            {
                let (operation, offset, bytes) = places.next_place();
                self.engine.submit(Request {
                    operation,
                    file: Arc::clone(&file.file),
                    offset,
                    slot: Some(slot),
                    bytes: crate::units::to_usize(bytes),
                    tag: bytes << 1 | u64::from(operation == Operation::Read),
                    reply: reply.clone(),
                });
                in_flight += 1;
                issued += bytes;
            }
            if in_flight == 0 {
                break;
            }
            let Ok(completion) = completions.recv() else { break };
            in_flight -= 1;
            match completion.result {
                Ok(()) if completion.tag & 1 == 1 => read += completion.tag >> 1,
                Ok(()) => written += completion.tag >> 1,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        let figure = clocks.figure(read, written);
        if let Some(error) = failed {
            return Err(error);
        }
        self.check(file)?;
        Ok(figure)
    }

    /// Slots that only read start without the contents, so that comparing them means something.
    fn prepare(&self, file: &ScratchFile, traffic: Traffic) {
        self.each_slot(|part| match traffic {
            Traffic::Read => part.fill(0),
            Traffic::Write | Traffic::Mixed | Traffic::Training => {
                part.copy_from_slice(&file.contents[..part.len()]);
            }
        });
    }

    /// A slot that was used holds the contents from its start on; how far depends on the request.
    fn check(&self, file: &ScratchFile) -> Result {
        let mut wrong = 0;
        self.each_slot(|part| {
            let untouched = part.iter().all(|byte| *byte == 0);
            wrong += u64::from(!untouched && *part != file.contents[..part.len()]);
        });
        if wrong == 0 {
            return Ok(());
        }
        Err(Error::format(
            file.file.path(),
            format!(
                "{wrong} MiB were read that are not what was written: these figures are worth nothing"
            ),
        ))
    }

    fn each_slot(&self, mut visit: impl FnMut(&mut [u8])) {
        let mut slots: Vec<_> = std::iter::from_fn(|| self.slots.try_take()).collect();
        for slot in &mut slots {
            slot.chunks_mut(PERIOD_BYTES).for_each(&mut visit);
        }
    }
}

impl ScratchFile {
    /// Writes the whole file once, so that every extent is more than reserved.
    ///
    /// # Errors
    /// `Io`.
    pub fn fill(&self, engine: &Arc<dyn Engine>) -> Result {
        let transfers = Transfers::new(engine, Form { bytes: 4 << 20, depth: 8 })?;
        transfers.run(self, Traffic::Write, 0, Limit::bytes(self.bytes)).map(|_| ())
    }
}

impl Drop for Transfers {
    fn drop(&mut self) {
        self.engine.unregister();
    }
}

/// The requests of a run, in order.
struct Places {
    cycle: Vec<(Operation, u64, u64)>,
    /// Bytes of the file that one turn of the cycle takes in each area; the next turn lies behind it.
    step: u64,
    turns: u64,
    turn: u64,
    index: usize,
}

impl Places {
    fn new(traffic: Traffic, bytes: u64, file_bytes: u64, offset: u64) -> Result<Self> {
        let (cycle, step, area) = match traffic {
            Traffic::Read => (vec![(Operation::Read, 0, bytes)], bytes, file_bytes),
            Traffic::Write => (vec![(Operation::Write, 0, bytes)], bytes, file_bytes),
            Traffic::Mixed => {
                let area = file_bytes / 2 / bytes * bytes;
                let place = |index: u64| match index % 2 {
                    0 => (Operation::Read, index / 2 * bytes, bytes),
                    _ => (Operation::Write, area + index / 2 * bytes, bytes),
                };
                ((0..13).map(place).collect(), 7 * bytes, area)
            }
            Traffic::Training => {
                let (copy, update) = (WEIGHT_BYTES + UPDATE_BYTES, WEIGHT_BYTES);
                let cycle = vec![
                    (Operation::Read, 0, WEIGHT_BYTES),
                    (Operation::Write, copy + update, UPDATE_BYTES),
                    (Operation::Read, 0, WEIGHT_BYTES),
                    (Operation::Write, copy, WEIGHT_BYTES),
                    (Operation::Read, update, UPDATE_BYTES),
                ];
                (cycle, TRAINING_CYCLE_BYTES, file_bytes)
            }
        };
        let turns = area / step;
        if turns == 0 {
            return Err(Error::invalid(format!(
                "a scratch file of {file_bytes} bytes is too small for {traffic:?} in requests of {bytes}"
            )));
        }
        Ok(Self { cycle, step, turns, turn: offset / step % turns, index: 0 })
    }

    fn next_place(&mut self) -> (Operation, u64, u64) {
        let (operation, offset, bytes) = self.cycle[self.index];
        let place = (operation, self.turn * self.step + offset, bytes);
        self.index += 1;
        if self.index == self.cycle.len() {
            self.index = 0;
            self.turn = (self.turn + 1) % self.turns;
        }
        place
    }
}
