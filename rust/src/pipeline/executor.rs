//! The one thread that decides: what to read next, what to update, when a step is whole.
//!
//! Loads and updates each keep the schedule's order among themselves, but do not wait for one
//! another: an update that waits for its gradient must not hold up the next block's weights.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Select, Sender, unbounded};
use rayon::ThreadPool;

use crate::error::{Error, Result};
use crate::io::engine::{Completion, Operation};
use crate::io::file::DirectFile;
use crate::memory::pool::Pool;
use crate::memory::slot::Slot;
use crate::optimizer::adamw::{AdamW, Kernel};
use crate::pipeline::executor::flights::Flights;
use crate::pipeline::executor::residents::Held;
use crate::pipeline::kept::OnDrive;
use crate::pipeline::stalls::Causes;
use crate::pipeline::update::Settings;
use crate::pipeline::{Command, Options, Shared, schedule};
use crate::store::layout::Layout;
use crate::store::{Entry, ReadPlan, Sequence, Store, Table};
use crate::units::Group;

mod flights;
mod kept;
mod reads;
mod residents;
mod stalls;
mod steps;
mod updates;

/// Kinds of buffer that weights are loaded into: for blocks, for larger records, and the piece's own.
const OUTER: usize = 1;
const RESIDENT: usize = 2;

/// By chunk, loads of residents that are looked at though they wait: there may be thousands. They are taken
/// in order, so none waits for one behind it.
const RESIDENTS_AHEAD: usize = 8;

/// A piece's weights on their way into a buffer.
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
    /// Whether they are updated on the way, with the gradient that was kept.
    applies: bool,
}

/// A chunk's update that has not got a chunk slot yet.
struct PlannedUpdate {
    step: u64,
    chunk: usize,
    needs: u64,
    applies: bool,
}

/// A chunk's update that has all memory it needs.
struct Update {
    step: u64,
    chunk: usize,
    /// `None` where the piece's weights stay in RAM: they are updated in place.
    weight_out: Option<Slot>,
    planes: Option<Slot>,
    is_read: bool,
    /// Of a gradient that was kept on the drive: where it is read to.
    gradient: Part,
    /// Whether its gradient was kept by the step, and its weights are on their way to the caller.
    applies: bool,
    /// Table entries of the writes in flight.
    written: Vec<(Group, Entry, Vec<u32>)>,
    writes_left: usize,
}

/// A chunk's gradient that was kept.
enum Part {
    /// Not on the drive: the source has that of the whole piece.
    Whole,
    Coming,
    Here(Slot),
}

/// A piece's gradient and the weights it belongs to.
struct Source {
    /// The weights of each chunk: those that were not updated yet, or where they are handed over, all.
    weights: Vec<Option<Slot>>,
    /// `None` where it comes from the drive, chunk by chunk.
    gradient: Option<Slot>,
    chunks_left: usize,
    /// The number of the load that gets the weights when all are updated.
    hand_over: Option<u64>,
    /// The step that keeps the gradient when all are updated, where that is on the drive.
    kept_by: Option<u64>,
}

struct Step {
    number: u64,
    adamw: AdamW,
    updates_left: usize,
    /// Pieces whose gradient has not been submitted.
    expected: BTreeSet<usize>,
    schedule: Arc<schedule::Schedule>,
    ended: bool,
    /// Whether it is to be committed: then what stays in RAM is written, too.
    commits: bool,
    commit: Option<Vec<u8>>,
    kept: Kept,
}

/// What becomes of the gradients that a step keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    /// Nothing was kept, or it is not needed.
    Nothing,
    /// They wait for a step that applies them.
    Waiting,
    /// They are being applied.
    Applied,
}

/// An operation in flight.
struct Pending {
    operation: Operation,
    file: Arc<DirectFile>,
    offset: u64,
    bytes: usize,
    /// Whether this is the second attempt; there is no third.
    again: bool,
    work: Work,
}

/// What an operation is for.
enum Work {
    Load {
        number: u64,
        chunk: usize,
        plan: ReadPlan,
    },
    Planes {
        chunk: usize,
        plan: ReadPlan,
        rest: Slot,
    },
    Write {
        chunk: usize,
        group: Group,
    },
    /// A kept gradient, from the drive and to it.
    Gradient {
        chunk: usize,
        step: u64,
    },
    Keep {
        chunk: usize,
    },
    Sequence,
}

impl Work {
    /// The chunk that it is about, if one.
    fn chunk(&self) -> Option<usize> {
        match self {
            Self::Load { chunk, .. }
            | Self::Planes { chunk, .. }
            | Self::Write { chunk, .. }
            | Self::Gradient { chunk, .. }
            | Self::Keep { chunk } => Some(*chunk),
            Self::Sequence => None,
        }
    }
}

/// Operations in a fixed order that the store needs before a first write, or for a commit.
struct Running {
    sequence: Sequence,
    commits: bool,
}

pub(super) struct Executor {
    store: Arc<Store>,
    /// The store's layout by what one buffer holds.
    pieces: Arc<Layout>,
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
    /// By piece.
    sources: Vec<Option<Source>>,
    /// How many of them are handed over when they are updated.
    on_their_way: usize,
    /// Gradients that are to be kept on the drive, with the step that keeps them and the piece.
    keeping: VecDeque<(u64, usize, Slot)>,
    kept: OnDrive,
    steps: VecDeque<Step>,
    /// The step whose updates are to be taken back, once all are written: a guess that was wrong.
    taken_back: Option<u64>,
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
    /// Whether the step under way has a gradient that is not finite.
    is_refused: bool,
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
    /// Pieces whose own buffer is lent, or on its way to the drive.
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
        let pieces = Arc::clone(store.pieces(options.by_chunk));
        let chunks = pieces.chunks().len();
        let working = Table::clone(&store.committed().table);
        let sources = pieces.records().iter().map(|_| None).collect();
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
            on_their_way: 0,
            keeping: VecDeque::new(),
            kept: OnDrive::new(
                &options.gradient_files,
                &store,
                &pieces,
                &options.residents.gradients,
            ),
            steps: VecDeque::new(),
            taken_back: None,
            scheduled: vec![0; chunks],
            on_disk: vec![0; chunks],
            held: Held::new(&pieces),
            pending: HashMap::new(),
            next_tag: 0,
            running: None,
            touched: false,
            failed: false,
            is_refused: false,
            starved: Starved::default(),
            ended_in_ram: false,
            causes: Causes::default(),
            flights: Flights::default(),
            aborting: None,
            stopping: false,
            pieces,
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
            if self.is_stuck() {
                // What has ended cannot be finished: back to the last commit.
                self.steps.clear();
            }
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
        let halting = self.aborting.is_some() || self.stopping || self.is_refused;
        // A step whose gradients wait for one that applies them is not waited for.
        let ended = self.steps.front().is_some_and(|step| step.ended && step.kept != Kept::Waiting);
        !self.failed && (!halting || ended)
    }

    /// Does all that can be done now.
    fn advance(&mut self) {
        self.starved = Starved::default();
        self.ended_in_ram = false;
        self.take_back();
        self.start_keeping();
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

    /// Whether a step that has ended cannot be finished, because the caller did not give all buffers back
    /// and has dropped the step after it.
    fn is_stuck(&self) -> bool {
        let is_starved = self.starved.buffers.contains(&true)
            || self.starved.chunk_slots
            || !self.starved.residents.is_empty();
        let can_go_on = self.ended_in_ram || self.running.is_some() || !self.pending.is_empty();
        (self.aborting.is_some() || self.stopping)
            && self.steps.front().is_some_and(|step| step.kept == Kept::Applied)
            && is_starved
            && !can_go_on
            && self.ready_update().is_none()
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
            for piece in &self.starved.residents {
                if let Some(list) = self.pool.residents.weights_of(*piece) {
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
}
