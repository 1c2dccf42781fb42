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
use crate::memory::slot::{Slot, SlotList};
use crate::store::checksum::{self, Binding};
use crate::store::{ReadPlan, Sequence, Sequenced, Store, Table, WritePlan};
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
    /// What was written of each chunk, where that was a copy.
    copied: Vec<(usize, Binding, Vec<u32>)>,
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
    Read {
        transfer: u64,
        chunk: usize,
        plan: ReadPlan,
    },
    Write {
        transfer: u64,
        chunk: usize,
        plan: WritePlan,
        bytes: usize,
        sums: Vec<u32>,
        copied: bool,
    },
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
    /// What is put from memory that its owner could change is copied into these; none for who never does.
    copies: SlotList,
    /// What is free of the slot that was taken last.
    copy_rest: Option<Slot>,
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
    pub(super) fn new(store: Arc<Store>, inbox: Receiver<Command>, copies: SlotList) -> Self {
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
            copies,
            copy_rest: None,
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
        let is_shared = writes && matches!(transfer.home, Home::Allocation(..));
        let copied = is_shared && self.copies.count() > 0;
        let part = &mut transfer.parts[transfer.state.started];
        let slot = if copied {
            let Some(source) = part else { return true };
            let Some(mut slot) = free_copy(&self.copies, &mut self.copy_rest, source.len()) else {
                return false;
            };
            slot.copy_from_slice(source);
            slot
        } else {
            let Some(slot) = part.take() else { return true };
            slot
        };
        transfer.state.started += 1;
        transfer.state.in_flight += 1;
        let planned = if writes {
            self.plan_write(id, chunk, &slot, copied)
        } else {
            self.plan_read(id, chunk)
        };
        match planned {
            Ok(plan) => {
                let busy = self.busy.entry(chunk).or_default();
                *busy = (busy.0 + u32::from(!writes), writes);
                self.in_flight_bytes += slot.len();
                self.submit(Pending { plan, again: false }, Some(slot));
            }
            Err(error) => self.part_ended(id, chunk, Some(slot).filter(|_| !copied), Err(error)),
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

    fn plan_write(&self, transfer: u64, chunk: usize, bytes: &[u8], copied: bool) -> Result<Plan> {
        self.store.check()?;
        let plan = self.store.plan_write(&self.working, chunk, Group::Weight, 1)?;
        let sums = checksum::sums_on_this_thread(&plan.binding, bytes);
        Ok(Plan::Write { transfer, chunk, plan, bytes: bytes.len(), sums, copied })
    }

    fn torn_error(&self, chunk: usize, cause: Option<&Error>) -> Error {
        let record = self.store.layout().chunks()[chunk].record;
        let name = &self.store.manifest().records[record].name;
        let cause = match cause {
            None => "it was interrupted".to_owned(),
            Some(Error::Changed { .. }) => "it was changed meanwhile".to_owned(),
            Some(error) => error.to_string(),
        };
        Error::invalid(format!(
            "the last put of tensor {name} was not finished ({cause}): put it again, or close the store without a \
             commit"
        ))
    }

    /// Submits an operation, or completes it at once when there is nothing on disk.
    fn submit(&mut self, pending: Pending, slot: Option<Slot>) {
        let (operation, chunk, offset, bytes) = match &pending.plan {
            Plan::Read { plan, chunk, .. } => (Operation::Read, *chunk, plan.offset, plan.bytes),
            Plan::Write { chunk, plan, bytes, .. } => {
                (Operation::Write, *chunk, plan.offset, *bytes)
            }
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
            Plan::Write { transfer, chunk, plan, sums, copied, .. } => {
                if result.is_ok() {
                    let layout = self.store.layout();
                    self.working.set(layout, chunk, Group::Weight, plan.entry, &sums);
                    self.torn.remove(&chunk);
                }
                if copied {
                    // The slot goes back to its list; what it was copied from never left.
                    slot = None;
                    if let Some(transfer) = self.transfers.get_mut(&transfer) {
                        transfer.state.copied.push((chunk, plan.binding, sums));
                    }
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
        if let Some(slot) = slot {
            transfer.parts[chunk - transfer.first_chunk] = Some(slot);
        }
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

    /// What the owners of all that is being put may do to it.
    #[cfg(test)]
    pub(super) fn change_what_is_put(&mut self, value: u8) {
        let puts = self.transfers.values_mut().filter(|t| t.operation == Operation::Write);
        puts.flat_map(|put| put.parts.iter_mut().flatten()).for_each(|part| part.fill(value));
    }

    /// Whether a put's memory still holds what was copied of each chunk: if all do, the copies are the bytes of
    /// this moment. If not, its owner changed it, and nobody may take the tensor for whole.
    fn compare_with_copies(&mut self, transfer: &mut Flight) {
        for (chunk, binding, sums) in std::mem::take(&mut transfer.state.copied) {
            let part = transfer.parts[chunk - transfer.first_chunk].as_deref();
            let is_same = part.is_some_and(|bytes| {
                checksum::verify_on_this_thread(&binding, bytes, &sums).is_ok()
            });
            if is_same {
                continue;
            }
            let record = self.store.layout().chunks()[chunk].record;
            let tensor = self.store.manifest().records[record].name.clone();
            let changed = Error::Changed { tensor };
            // A put behind this one may have written the chunk anew.
            if self.working.sums(self.store.layout(), chunk, Group::Weight) == sums {
                self.torn.insert(chunk, Some(changed.clone()));
            }
            transfer.state.failed.get_or_insert(changed);
        }
    }

    /// Hands a transfer's memory back and answers, if nothing of it is left to do.
    fn finish(&mut self, id: u64) {
        let is_over = |t: &Flight| t.state.in_flight == 0 && t.state.started == t.parts.len();
        if !self.transfers.get(&id).is_some_and(is_over) {
            return;
        }
        let Some(mut transfer) = self.transfers.remove(&id) else { return };
        self.compare_with_copies(&mut transfer);
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

/// A part of the free memory for copies; `None` until more of it is free.
fn free_copy(copies: &SlotList, rest: &mut Option<Slot>, bytes: usize) -> Option<Slot> {
    if rest.as_ref().is_none_or(|rest| rest.len() < bytes) {
        // Let go first: it could be what keeps the last slot from its list.
        *rest = None;
        *rest = copies.try_take();
    }
    let (front, left) = rest.take()?.split_at(bytes);
    *rest = Some(left).filter(|left| !left.is_empty());
    Some(front)
}

impl Drop for Mover {
    fn drop(&mut self) {
        // A bug of ours; those who wait are told by their channels.
        if std::thread::panicking() && self.store.is_scratch() {
            let _ = self.store.give_up();
        }
    }
}
