//! The one thread that decides: what to read next, what to update, when a step is whole.
//!
//! Loads and updates each keep the schedule's order among themselves, but do not wait for one
//! another: an update that waits for its gradient must not hold up the next block's weights.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Select, Sender, unbounded};
use rayon::ThreadPool;

use crate::adamw::{AdamW, Kernel};
use crate::buffer::Slot;
use crate::engine::{Completion, Operation};
use crate::error::{Error, Result};
use crate::pipeline::executor::flights::Flights;
use crate::pipeline::executor::residents::Held;
use crate::pipeline::memory::weight_list;
use crate::pipeline::stalls::Causes;
use crate::pipeline::update::Settings;
use crate::pipeline::{Command, Options, Shared, schedule};
use crate::pool::Pool;
use crate::store::{Entry, Next, ReadPlan, Sequence, Sequenced, Store, Table};
use crate::units::Group;

mod flights;
mod reads;
mod residents;
mod stalls;
mod updates;

/// Kinds of buffer that weights are loaded into: for blocks, for larger records, and the record's own.
const OUTER: usize = 1;
const RESIDENT: usize = 2;

/// A record's weights on their way into a buffer.
struct Load {
    /// Number among all loads since the pipeline's start.
    number: u64,
    chunks: Range<usize>,
    /// Updates of each chunk that must have been written first.
    needs: Vec<u64>,
    /// Chunks whose reads were started.
    started: usize,
    /// The part of the buffer that no read was started for yet.
    unread: Option<Slot>,
    /// Parts that were read, by chunk.
    parts: Vec<Option<Slot>>,
    missing: usize,
}

/// A chunk's update that has not got a chunk slot yet.
struct PlannedUpdate {
    step: u64,
    chunk: usize,
    needs: u64,
}

/// A chunk's update that has all memory it needs.
struct Update {
    step: u64,
    chunk: usize,
    /// `None` where the record's weights stay in RAM: they are updated in place.
    weight_out: Option<Slot>,
    planes: Option<Slot>,
    is_read: bool,
    /// Table entries of the writes in flight.
    written: Vec<(Group, Entry, Vec<u32>)>,
    writes_left: usize,
}

/// A record's gradient and the weights it belongs to.
struct Source {
    /// The weights of each chunk that was not updated yet.
    weights: Vec<Option<Slot>>,
    gradient: Slot,
    chunks_left: usize,
}

struct Step {
    number: u64,
    adamw: AdamW,
    updates_left: usize,
    /// Records whose gradient has not been submitted.
    expected: HashSet<usize>,
    ended: bool,
    /// Whether it is to be committed: then what stays in RAM is written, too.
    commits: bool,
    commit: Option<Vec<u8>>,
}

/// An operation in flight.
struct Pending {
    operation: Operation,
    drive: usize,
    offset: u64,
    bytes: usize,
    /// Whether this is the second attempt; there is no third.
    again: bool,
    work: Work,
}

/// What an operation is for.
enum Work {
    Load { number: u64, chunk: usize, plan: ReadPlan },
    Planes { chunk: usize, plan: ReadPlan, rest: Slot },
    Write { chunk: usize, group: Group },
    Sequence,
}

/// Operations in a fixed order that the store needs before a first write, or for a commit.
struct Running {
    sequence: Sequence,
    commits: bool,
}

pub(super) struct Executor {
    store: Arc<Store>,
    pool: Pool,
    shared: Arc<Shared>,
    inbox: Receiver<Command>,
    completions: Receiver<Completion>,
    reply: Sender<Completion>,
    workers: ThreadPool,
    kernel: Kernel,
    settings: Settings,
    working: Table,
    /// Loads by kind of buffer, in the schedule's order.
    loads: [VecDeque<Load>; 3],
    planned: VecDeque<PlannedUpdate>,
    updates: Vec<Update>,
    sources: Vec<Option<Source>>,
    steps: VecDeque<Step>,
    begun: u64,
    /// Per chunk: updates that were scheduled, and updates that are on disk, or in RAM to stay.
    scheduled: Vec<u64>,
    on_disk: Vec<u64>,
    held: Held,
    pending: HashMap<u64, Pending>,
    next_tag: u64,
    running: Option<Running>,
    /// Whether extents were written since the last commit.
    touched: bool,
    failed: bool,
    /// What the last round could not do for lack of a slot.
    starved: Starved,
    /// Whether an update ended in the last round: no completion will tell of it.
    ended_in_ram: bool,
    causes: Causes,
    flights: Flights,
    aborting: Option<Sender<Result>>,
    stopping: bool,
}

#[derive(Default)]
struct Starved {
    buffers: [bool; 2],
    chunk_slots: bool,
    /// Records whose own buffer is lent, or on its way to the drive.
    residents: Vec<usize>,
}

impl Executor {
    pub(super) fn new(
        store: Arc<Store>,
        pool: Pool,
        options: &Options,
        shared: Arc<Shared>,
        inbox: Receiver<Command>,
    ) -> Result<Self> {
        let settings = Settings::new(store.manifest(), store.layout(), &options.tensors)?;
        // Said in full: rayon's own default can be changed from outside.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = if options.threads == 0 { cores } else { options.threads };
        let workers = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("mt-adamw-{index}"))
            .build()
            .map_err(|e| Error::invalid(format!("cannot start the update threads: {e}")))?;
        let (reply, completions) = unbounded();
        let chunks = store.layout().chunks().len();
        let working = Table::clone(&store.committed().table);
        let sources = store.layout().records().iter().map(|_| None).collect();
        Ok(Self {
            pool,
            shared,
            inbox,
            completions,
            reply,
            workers,
            kernel: options.kernel.unwrap_or_else(Kernel::detect),
            settings,
            working,
            loads: Default::default(),
            planned: VecDeque::new(),
            updates: Vec::new(),
            sources,
            steps: VecDeque::new(),
            begun: 0,
            scheduled: vec![0; chunks],
            on_disk: vec![0; chunks],
            held: Held::new(store.layout()),
            pending: HashMap::new(),
            next_tag: 0,
            running: None,
            touched: false,
            failed: false,
            starved: Starved::default(),
            ended_in_ram: false,
            causes: Causes::default(),
            flights: Flights::default(),
            aborting: None,
            stopping: false,
            store,
        })
    }

    pub(super) fn run(mut self) {
        while self.turn() {
            self.wait();
            self.receive();
        }
    }

    /// Does all that can be done without waiting; `false` when it has stopped for good.
    pub(super) fn turn(&mut self) -> bool {
        if self.is_active() {
            self.advance();
            self.publish_causes();
        }
        if !self.is_active() && self.pending.is_empty() {
            self.finish_abort();
            return !self.stopping;
        }
        true
    }

    /// Whether there is work to go on with: nothing failed, and if the step under way is to be dropped
    /// (abort, stop), a step before it has ended and is still to be written.
    fn is_active(&self) -> bool {
        let halting = self.aborting.is_some() || self.stopping;
        let ended = self.steps.front().is_some_and(|step| step.ended);
        !self.failed && (!halting || ended)
    }

    /// Does all that can be done now.
    fn advance(&mut self) {
        self.starved = Starved::default();
        self.ended_in_ram = false;
        for class in 0..RESIDENT {
            self.start_loads(class);
        }
        self.start_resident_loads();
        self.start_plane_reads();
        if let Some(index) = self.ready_update() {
            self.publish_causes();
            // One chunk at a time: completions are looked at in between.
            let outcome = match self.store.is_writable() {
                true => self.update(index),
                false if self.running.is_none() => self.start_writing(),
                false => Ok(()),
            };
            if let Err(error) = outcome {
                self.fail(error);
            }
        }
        self.settle();
    }

    fn wait(&self) {
        let can_write = self.store.is_writable() || self.running.is_none();
        let goes_on = self.ended_in_ram || (can_write && self.ready_update().is_some());
        if self.is_active() && goes_on {
            return;
        }
        let mut select = Select::new();
        select.recv(&self.inbox);
        select.recv(&self.completions);
        if self.is_active() {
            if self.starved.buffers[0] {
                select.recv(self.pool.block_buffers.availability());
            }
            if self.starved.buffers[1] {
                select.recv(self.pool.outer_buffers.availability());
            }
            if self.starved.chunk_slots {
                select.recv(self.pool.chunk_slots.availability());
            }
            for record in &self.starved.residents {
                if let Some(list) = self.pool.residents.weights_of(*record) {
                    select.recv(list.availability());
                }
            }
        }
        select.ready();
    }

    pub(super) fn receive(&mut self) {
        while let Ok(completion) = self.completions.try_recv() {
            self.complete(completion);
        }
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.obey(command),
                Err(error) => {
                    self.stopping |= error.is_disconnected();
                    return;
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Stop => self.stopping = true,
            Command::Abort { reply } => self.aborting = Some(reply),
            // After a failure callers get its error; what they still send is dropped here.
            _ if self.failed => {}
            Command::Begin { schedule, adamw, commits, first_load } => {
                if let Err(error) = self.held.schedule(&schedule, &self.pool, commits) {
                    return self.fail(error);
                }
                self.begin(&schedule, adamw, commits, first_load);
            }
            Command::Submit { record, weights, gradient } => {
                let step = self.steps.back_mut().filter(|step| !step.ended);
                if !step.is_some_and(|step| step.expected.remove(&record)) {
                    self.fail(Error::invalid(format!(
                        "the gradient of record {record} was submitted and the step does not (or no longer) expect it"
                    )));
                    return;
                }
                let layout = Arc::clone(self.store.layout());
                let chunks = layout.records()[record].clone();
                let chunks_left = chunks.len();
                let mut rest = weights;
                let weights = chunks.map(|chunk| {
                    let bytes = layout.chunks()[chunk].extent_bytes(Group::Weight);
                    let at = rest.split_off(bytes);
                    Some(std::mem::replace(&mut rest, at))
                });
                let weights = weights.collect();
                self.sources[record] = Some(Source { weights, gradient, chunks_left });
            }
            Command::End { commit } => {
                if let Some(step) = self.steps.back_mut() {
                    if let Some(record) = step.expected.iter().min() {
                        let error =
                            format!("the step ended without the gradient of record {record}");
                        self.fail(Error::invalid(error));
                        return;
                    }
                    step.ended = true;
                    step.commit = commit;
                }
            }
        }
    }

    fn begin(
        &mut self,
        schedule: &schedule::Schedule,
        adamw: AdamW,
        commits: bool,
        first_load: u64,
    ) {
        self.begun += 1;
        let layout = Arc::clone(self.store.layout());
        let mut number = first_load;
        for operation in schedule.operations() {
            let chunk = operation.chunk;
            let record = layout.chunks()[chunk].record;
            match operation.kind {
                schedule::Kind::Load if chunk == layout.records()[record].start => {
                    let chunks = layout.records()[record].clone();
                    let list = weight_list(&self.pool, &self.store, record);
                    let class = if self.pool.residents.weights_of(record).is_some() {
                        RESIDENT
                    } else {
                        OUTER * usize::from(!std::ptr::eq(list, &raw const self.pool.block_buffers))
                    };
                    self.loads[class].push_back(Load {
                        number,
                        needs: self.scheduled[chunks.clone()].to_vec(),
                        started: 0,
                        unread: None,
                        parts: chunks.clone().map(|_| None).collect(),
                        missing: chunks.len(),
                        chunks,
                    });
                    number += 1;
                }
                schedule::Kind::Load => {}
                schedule::Kind::Update => {
                    let needs = self.scheduled[chunk];
                    self.scheduled[chunk] += 1;
                    self.planned.push_back(PlannedUpdate { step: self.begun, chunk, needs });
                }
            }
        }
        let updated = schedule.operations().iter().filter(|op| op.kind == schedule::Kind::Update);
        self.steps.push_back(Step {
            number: self.begun,
            adamw,
            updates_left: schedule.updates(),
            expected: updated.map(|op| layout.chunks()[op.chunk].record).collect(),
            ended: false,
            commits,
            commit: None,
        });
    }

    /// Commits the oldest step when all its writes have completed: the drain before the flush.
    fn settle(&mut self) {
        while self.running.is_none()
            && self.steps.front().is_some_and(|s| s.ended && s.updates_left == 0)
        {
            match self.steps.front_mut().and_then(|step| step.commit.take()) {
                Some(blob) => match self.store.start_commit(self.working.clone(), &blob) {
                    Ok(sequence) => {
                        self.touched = false;
                        self.flights.commit = self.shared.events.now();
                        self.go_on(Running { sequence, commits: true });
                    }
                    Err(error) => return self.fail(error),
                },
                None => self.settle_front(),
            }
        }
    }

    fn start_writing(&mut self) -> Result {
        let sequence = self.store.start_writing()?;
        self.go_on(Running { sequence, commits: false });
        Ok(())
    }

    /// Submits a sequence's next operations, or takes note of its end.
    fn go_on(&mut self, mut running: Running) {
        loop {
            match self.store.next_operation(&mut running.sequence) {
                Ok(Next::Operation(Sequenced { operation, drive, offset, slot, bytes })) => {
                    let (again, work) = (false, Work::Sequence);
                    self.submit(Pending { operation, drive, offset, bytes, again, work }, slot);
                }
                Ok(Next::Wait) => return self.running = Some(running),
                Ok(Next::End) if running.commits => {
                    self.held.committed();
                    self.commit_ended();
                    return self.settle_front();
                }
                Ok(Next::End) => return,
                Err(error) => return self.fail(error),
            }
        }
    }

    fn settle_front(&mut self) {
        self.steps.pop_front();
        self.shared.lock().settled += 1;
        self.shared.changed.notify_all();
    }

    fn fail(&mut self, error: Error) {
        self.failed = true;
        // What the next call would be told is told to the one that waits now, too.
        let error = self.store.check().err().unwrap_or(error);
        self.shared.lock().failure.get_or_insert(error);
        self.shared.changed.notify_all();
    }

    /// Back to the last commit, once nothing is in flight any more.
    fn finish_abort(&mut self) {
        if self.touched && self.store.is_scratch() && (self.stopping || self.aborting.is_some()) {
            let _ = self.store.give_up();
        }
        let Some(reply) = self.aborting.take() else { return };
        self.touched = false;
        self.loads = Default::default();
        self.planned.clear();
        self.updates.clear();
        self.sources.iter_mut().for_each(|source| *source = None);
        self.steps.clear();
        self.scheduled.fill(0);
        self.on_disk.fill(0);
        self.held.back_to_the_last_commit();
        self.working = Table::clone(&self.store.committed().table);
        let outcome = self.store.check();
        self.failed = outcome.is_err();
        let mut state = self.shared.lock();
        state.loads.clear();
        state.ended = state.begun;
        state.settled = state.begun;
        state.failure = outcome.clone().err();
        drop(state);
        self.shared.changed.notify_all();
        let _ = reply.send(outcome);
    }
}
