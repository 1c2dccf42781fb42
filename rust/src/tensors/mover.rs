//! The one thread that moves tensors: what to start next, what has ended, when a commit is due.
//!
//! Commands are taken in their order. One that must wait (for a transfer of the same chunk, for a
//! commit, for bytes in flight to become fewer) holds up those behind it, so a read sees what was put
//! before it, and a commit has exactly what was put before it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Select, Sender, unbounded};

use crate::error::{Error, Result};
use crate::io::engine::{Completion, Operation, Request};
use crate::memory::slot::Slot;
use crate::store::checksum;
use crate::store::{Entry, ReadPlan, Sequence, Sequenced, Store, Table};
use crate::tensors::arena::Allocation;
use crate::tensors::ticket::Outcome;
use crate::units::Group;

mod commits;

/// Bytes of transfers that are in flight at most, but for one chunk: a drive's queue stays full while
/// checksums are computed.
const IN_FLIGHT_BYTES: usize = 64 << 20;

pub(super) enum Command {
    Transfer(Flight),
    /// Make durable what was put before.
    Commit(Sender<Outcome>),
    /// Answer when all before has ended.
    Drain(Sender<Outcome>),
    /// These chunks were to be written, and were not.
    Tear(Range<usize>),
    Stop,
}

/// A run of chunks to write or to read.
pub(super) struct Flight {
    pub(super) operation: Operation,
    pub(super) first_chunk: usize,
    /// By chunk, each as long as its extent; away while in flight.
    pub(super) parts: Vec<Option<Slot>>,
    pub(super) home: Home,
    pub(super) done: Sender<Outcome>,
    state: Progress,
}

#[derive(Default)]
struct Progress {
    started: usize,
    in_flight: usize,
    failed: Option<Error>,
}

/// Where the slots of a transfer go when it has ended.
pub(super) enum Home {
    /// Back to this run, whose rest is the slot here.
    Allocation(Arc<Allocation>, Slot),
    /// To the caller, with the outcome.
    Caller,
    /// To the list that they were taken from.
    List,
}

impl Flight {
    pub(super) fn new(
        operation: Operation,
        first_chunk: usize,
        parts: Vec<Option<Slot>>,
        home: Home,
        done: Sender<Outcome>,
    ) -> Self {
        Self { operation, first_chunk, parts, home, done, state: Progress::default() }
    }
}

enum Queued {
    Transfer(u64),
    Commit(Sender<Outcome>),
    Drain(Sender<Outcome>),
    Tear(Range<usize>),
}

/// An operation in flight.
struct Pending {
    plan: Plan,
    /// Whether this is the second attempt; there is no third.
    again: bool,
}

enum Plan {
    Read { transfer: u64, chunk: usize, plan: ReadPlan },
    Write { transfer: u64, chunk: usize, offset: u64, bytes: usize, entry: Entry, sums: Vec<u32> },
    Sequence,
}

/// Operations in a fixed order, for a first write or for a commit.
struct Running {
    sequence: Sequence,
    commit: Option<Sender<Outcome>>,
}

pub(super) struct Mover {
    store: Arc<Store>,
    inbox: Receiver<Command>,
    completions: Receiver<Completion>,
    reply: Sender<Completion>,
    working: Table,
    queue: VecDeque<Queued>,
    transfers: HashMap<u64, Flight>,
    next_transfer: u64,
    pending: HashMap<u64, Pending>,
    next_tag: u64,
    in_flight_bytes: usize,
    pub(super) in_flight_bytes_max: usize,
    /// Chunks in flight: how many reads, or a write.
    busy: HashMap<usize, (u32, bool)>,
    /// Chunks whose last write failed, or was never made, and why: their tensors are part old.
    torn: BTreeMap<usize, Option<Error>>,
    running: Option<Running>,
    /// Whether the working table differs from the committed one.
    touched: bool,
    stopping: bool,
}

impl Mover {
    pub(super) fn new(store: Arc<Store>, inbox: Receiver<Command>) -> Self {
        let (reply, completions) = unbounded();
        let working = Table::clone(&store.committed().table);
        Self {
            store,
            inbox,
            completions,
            reply,
            working,
            queue: VecDeque::new(),
            transfers: HashMap::new(),
            next_transfer: 0,
            pending: HashMap::new(),
            next_tag: 0,
            in_flight_bytes: 0,
            in_flight_bytes_max: IN_FLIGHT_BYTES,
            busy: HashMap::new(),
            torn: BTreeMap::new(),
            running: None,
            touched: false,
            stopping: false,
        }
    }

    pub(super) fn run(mut self) {
        while self.turn() {
            let mut select = Select::new();
            select.recv(&self.inbox);
            select.recv(&self.completions);
            select.ready();
            self.receive();
        }
    }

    /// Starts all that can be started now; `false` when it was told to stop and nothing is left.
    pub(super) fn turn(&mut self) -> bool {
        while self.running.is_none() && self.start_front() {}
        let is_idle = self.queue.is_empty() && self.pending.is_empty() && self.running.is_none();
        if self.stopping && is_idle {
            self.finish_scratch();
            return false;
        }
        true
    }

    pub(super) fn receive(&mut self) {
        while let Ok(completion) = self.completions.try_recv() {
            self.complete(completion);
        }
        // Once told to stop it looks no further: nobody sends any more.
        while !self.stopping {
            match self.inbox.try_recv() {
                Ok(command) => self.obey(command),
                Err(error) => {
                    self.stopping = error.is_disconnected();
                    return;
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        let queued = match command {
            Command::Transfer(transfer) => {
                let id = self.next_transfer;
                self.next_transfer += 1;
                self.transfers.insert(id, transfer);
                Queued::Transfer(id)
            }
            Command::Commit(done) => Queued::Commit(done),
            Command::Drain(done) => Queued::Drain(done),
            Command::Tear(chunks) => Queued::Tear(chunks),
            Command::Stop => {
                self.stopping = true;
                return;
            }
        };
        self.queue.push_back(queued);
    }

    /// Goes on with the first command; `false` when it must wait, or there is none.
    fn start_front(&mut self) -> bool {
        match self.queue.front() {
            None => return false,
            Some(Queued::Transfer(id)) => {
                let id = *id;
                if !self.start_next_part(id) {
                    return false;
                }
                if self.transfers.get(&id).is_some_and(|t| t.state.started < t.parts.len()) {
                    return true;
                }
                self.finish(id);
            }
            Some(Queued::Commit(_) | Queued::Drain(_)) if !self.pending.is_empty() => {
                return false;
            }
            Some(_) => {}
        }
        match self.queue.pop_front() {
            Some(Queued::Commit(done)) => self.commit(done),
            Some(Queued::Drain(done)) => drop(done.send(Ok(None))),
            Some(Queued::Tear(chunks)) => self.torn.extend(chunks.map(|chunk| (chunk, None))),
            Some(Queued::Transfer(_)) | None => {}
        }
        true
    }

    /// Starts a transfer's next chunk; `false` when it must wait.
    fn start_next_part(&mut self, id: u64) -> bool {
        let Some(transfer) = self.transfers.get_mut(&id) else { return true };
        let chunk = transfer.first_chunk + transfer.state.started;
        let writes = transfer.operation == Operation::Write;
        if transfer.state.failed.is_some() {
            if writes {
                let end = transfer.first_chunk + transfer.parts.len();
                self.torn.extend((chunk..end).map(|chunk| (chunk, transfer.state.failed.clone())));
            }
            transfer.state.started = transfer.parts.len();
            return true;
        }
        let is_blocked = match self.busy.get(&chunk) {
            Some((_, true)) => true,
            Some(_) => writes,
            None => false,
        };
        if is_blocked || self.in_flight_bytes >= self.in_flight_bytes_max {
            return false;
        }
        if writes && !self.store.is_writable() && self.store.check().is_ok() {
            return self.start_writing(id);
        }
        let Some(slot) = transfer.parts[transfer.state.started].take() else { return true };
        transfer.state.started += 1;
        transfer.state.in_flight += 1;
        let planned =
            if writes { self.plan_write(id, chunk, &slot) } else { self.plan_read(id, chunk) };
        match planned {
            Ok(plan) => {
                let busy = self.busy.entry(chunk).or_default();
                *busy = (busy.0 + u32::from(!writes), writes);
                self.in_flight_bytes += slot.len();
                self.submit(Pending { plan, again: false }, Some(slot));
            }
            Err(error) => self.part_ended(id, chunk, Some(slot), Err(error)),
        }
        true
    }

    /// Clears the way for a first write; `false` while that is under way.
    fn start_writing(&mut self, id: u64) -> bool {
        let outcome = self.store.start_writing().map(|sequence| {
            self.go_on(Running { sequence, commit: None });
        });
        if self.running.is_some() {
            return false;
        }
        if let (false, Some(transfer)) = (self.store.is_writable(), self.transfers.get_mut(&id)) {
            let kept = || Error::invalid("the engine kept a commit buffer");
            transfer.state.failed = Some(outcome.err().unwrap_or_else(kept));
        }
        true
    }

    fn plan_read(&self, transfer: u64, chunk: usize) -> Result<Plan> {
        self.store.check()?;
        if let Some(cause) = self.torn.get(&chunk) {
            return Err(self.torn_error(chunk, cause.as_ref()));
        }
        let plan = self.store.plan_read(&self.working, chunk, Group::Weight);
        Ok(Plan::Read { transfer, chunk, plan })
    }

    fn plan_write(&self, transfer: u64, chunk: usize, bytes: &[u8]) -> Result<Plan> {
        self.store.check()?;
        let plan = self.store.plan_write(&self.working, chunk, Group::Weight, 1)?;
        let sums = checksum::sums_on_this_thread(&plan.binding, bytes);
        let (offset, entry, bytes) = (plan.offset, plan.entry, bytes.len());
        Ok(Plan::Write { transfer, chunk, offset, bytes, entry, sums })
    }

    fn torn_error(&self, chunk: usize, cause: Option<&Error>) -> Error {
        let record = self.store.layout().chunks()[chunk].record;
        let name = &self.store.manifest().records[record].name;
        let cause = cause.map_or_else(|| "it was interrupted".to_owned(), Error::to_string);
        Error::invalid(format!(
            "the last put of tensor {name} was not finished ({cause}): put it again, or close the store without a \
             commit"
        ))
    }

    /// Submits an operation, or completes it at once when there is nothing on disk.
    fn submit(&mut self, pending: Pending, slot: Option<Slot>) {
        let (operation, chunk, offset, bytes) = match &pending.plan {
            Plan::Read { plan, chunk, .. } => (Operation::Read, *chunk, plan.offset, plan.bytes),
            Plan::Write { chunk, offset, bytes, .. } => (Operation::Write, *chunk, *offset, *bytes),
            Plan::Sequence => return,
        };
        let drive = self.store.layout().chunks()[chunk].drive;
        self.request(pending, Sequenced { operation, drive, offset, slot, bytes });
    }

    fn request(&mut self, pending: Pending, what: Sequenced) {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.pending.insert(tag, pending);
        let Sequenced { operation, drive, offset, slot, bytes } = what;
        let reply = self.reply.clone();
        if bytes == 0 && operation == Operation::Read {
            // Through the same channel, so that there is one way only.
            let _ = reply.send(Completion { tag, slot, result: Ok(()) });
            return;
        }
        let file = Arc::clone(self.store.drives().file(drive));
        self.store.engine().0.submit(Request { operation, file, offset, slot, bytes, tag, reply });
    }

    fn complete(&mut self, completion: Completion) {
        let Completion { tag, mut slot, mut result } = completion;
        let Some(pending) = self.pending.remove(&tag) else { return };
        let worth_it = match (&result, &slot, &pending.plan) {
            (_, _, Plan::Sequence) => return self.sequence_completed(slot, result),
            (Err(error), Some(_), _) => error.is_worth_a_retry(),
            (Ok(()), Some(slot), Plan::Read { plan, chunk, .. }) => {
                let bytes = &slot[..plan.bytes];
                let verified = checksum::verify_on_this_thread(&plan.binding, bytes, &plan.sums);
                // A flip on the bus or in RAM is gone at the second reading.
                result = verified
                    .map_err(|bad| self.store.corrupt(*chunk, Group::Weight, plan.offset, bad));
                result.is_err()
            }
            _ => false,
        };
        if worth_it && !pending.again {
            return self.submit(Pending { again: true, ..pending }, slot);
        }
        let (transfer, chunk) = match pending.plan {
            Plan::Sequence => return,
            Plan::Read { transfer, chunk, plan } => {
                // What was never written is zero.
                if let Some(slot) = &mut slot {
                    slot[plan.bytes..].fill(0);
                }
                (transfer, chunk)
            }
            Plan::Write { transfer, chunk, entry, sums, .. } => {
                if result.is_ok() {
                    let layout = self.store.layout();
                    self.working.set(layout, chunk, Group::Weight, entry, &sums);
                    self.torn.remove(&chunk);
                }
                self.touched = true;
                (transfer, chunk)
            }
        };
        self.in_flight_bytes -= self.store.layout().chunks()[chunk].extent_bytes(Group::Weight);
        if let Some((reads, _)) = self.busy.get_mut(&chunk).filter(|(reads, _)| *reads > 1) {
            *reads -= 1;
        } else {
            self.busy.remove(&chunk);
        }
        self.part_ended(transfer, chunk, slot, result);
    }

    fn part_ended(&mut self, id: u64, chunk: usize, slot: Option<Slot>, result: Result) {
        let Some(transfer) = self.transfers.get_mut(&id) else { return };
        transfer.state.in_flight -= 1;
        transfer.parts[chunk - transfer.first_chunk] = slot;
        if let Err(error) = result {
            // What the next call would be told is told to this one, too.
            let error = self.store.check().err().unwrap_or(error);
            if transfer.operation == Operation::Write {
                self.torn.insert(chunk, Some(error.clone()));
            }
            transfer.state.failed.get_or_insert(error);
        }
        if transfer.state.started == transfer.parts.len() {
            self.finish(id);
        }
    }

    /// Hands a transfer's memory back and answers, if nothing of it is left to do.
    fn finish(&mut self, id: u64) {
        let is_over = |t: &Flight| t.state.in_flight == 0 && t.state.started == t.parts.len();
        if !self.transfers.get(&id).is_some_and(is_over) {
            return;
        }
        let Some(transfer) = self.transfers.remove(&id) else { return };
        let Flight { parts, home, done, state, .. } = transfer;
        let parts: Option<Vec<Slot>> = parts.into_iter().collect();
        let whole = parts.and_then(|parts| parts.into_iter().reduce(Slot::join));
        let outcome = state.failed.map_or(Ok(()), Err);
        let outcome = match (home, whole) {
            (Home::Allocation(allocation, rest), Some(whole)) => {
                allocation.put_back(whole.join(rest));
                outcome.map(|()| None)
            }
            (Home::Caller, Some(whole)) => outcome.map(|()| Some(whole)),
            (Home::List, Some(_)) => outcome.map(|()| None),
            (_, None) => outcome.and(Err(Error::invalid("the engine kept a slot"))),
        };
        // Nobody may wait for it.
        let _ = done.send(outcome);
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        // A bug of ours; those who wait are told by their channels.
        if std::thread::panicking() && self.store.is_scratch() {
            let _ = self.store.give_up();
        }
    }
}
