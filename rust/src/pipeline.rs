//! The pipeline executes a schedule: it reads ahead, updates, and writes behind, while the caller
//! computes. One executor thread owns all decisions; callers only wait and hand buffers over.
//!
//! What one buffer holds is a *piece*: a whole record, or where [`Options::by_chunk`] is set a chunk, so
//! that who computes elsewhere needs few chunks of memory here.
//!
//! A caller's step: [`Pipeline::begin`], then for each load of the schedule, in its order,
//! [`Pipeline::take_weights`]; for each piece to update [`Pipeline::take_gradient`] and
//! [`Pipeline::submit`]; then [`Pipeline::end`]. The next step may begin at once: its loads wait,
//! chunk by chunk, for the writes that they depend on, and its updates wait until the last step is
//! durable.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Sender, bounded, unbounded};

use crate::error::{Error, Result};
use crate::memory::huge_pages::HugePages;
use crate::memory::pool::{Pool, PoolSizes};
use crate::memory::slot::Slot;
use crate::optimizer::adamw::{AdamW, Kernel};
use crate::pipeline::memory::check_pool;
use crate::pipeline::squares::Squares;
use crate::store::layout::Layout;
use crate::store::{BLOB_BYTES_MAX, Store};

mod events;
mod executor;
mod gradient_files;
mod memory;
mod pieces;
mod schedule;
mod squares;
mod stalls;
mod update;
mod waits;

pub use events::{Event, Events, Lane};
pub use gradient_files::GradientFiles;
pub use memory::{Residents, chunk_slot_bytes};
pub use schedule::{ChunkOp, Kind, Schedule};
pub use stalls::{Cause, Timings};
pub use update::TensorSettings;

/// How long a wait for a gradient buffer goes on before its cause is looked at again: nobody tells of a
/// change there.
const SLICE: Duration = Duration::from_millis(2);

/// How a pipeline is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// The pool.
    pub pool: PoolSizes,
    /// Threads for AdamW and checksums; 0 means one per core.
    pub threads: usize,
    /// The AdamW kernel; `None` picks the fastest.
    pub kernel: Option<Kernel>,
    /// Weight decay and learning-rate scale of each tensor, by record and offset.
    pub tensors: Vec<TensorSettings>,
    /// What stays in RAM from step to step.
    pub residents: Residents,
    /// Where gradients are kept that have no buffer of their own; none is kept there without.
    pub gradient_files: GradientFiles,
    /// Whether a buffer holds a chunk, not a whole record. The pool then has `block_buffers` for the weights
    /// of a chunk, `block_gradients` for its gradient, `outer_buffers` for weights that come back for their
    /// update, and no use for `outer_gradients`. Schedules must be made for `Store::pieces(true)`.
    pub by_chunk: bool,
}

/// What becomes of the gradients that a step has kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum After {
    /// Nothing was kept, or the updates that the step has made stand.
    Stands,
    /// The next step applies them, multiplied by this; updates that the step has made are taken back.
    Applied(f32),
}

/// A load of the schedule that the caller has not taken yet.
#[derive(Debug)]
struct Loaded {
    piece: usize,
    weights: Option<Slot>,
}

#[derive(Debug, Default)]
struct State {
    /// Number of the first load in `loads`, counted from the pipeline's start.
    first_load: u64,
    loads: VecDeque<Loaded>,
    failure: Option<Error>,
    /// Steps that were begun, ended, and settled (written, and committed if that was asked for).
    begun: u64,
    ended: u64,
    settled: u64,
    /// Of the step that was begun last: whether it is to be committed, the pieces whose gradients it
    /// keeps, those that it updates with them at once, and how many get a gradient.
    commits: bool,
    keeps: BTreeSet<usize>,
    updates: BTreeSet<usize>,
    gradients: usize,
    /// The squares of its gradients so far.
    squares: Squares,
    /// Pieces whose gradients the last step kept, to be applied by the next one.
    waiting: Option<BTreeSet<usize>>,
    /// Whether a step has ended without a commit since the last one that is committed.
    is_uncommitted: bool,
    /// What callers wait for, if they do.
    causes: stalls::Causes,
}

impl State {
    /// Nobody takes the weights of the loads so far any more.
    fn forget_loads(&mut self) {
        self.first_load += self.loads.len() as u64;
        self.loads.clear();
    }
}

/// What caller and executor share.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    timings: Timings,
    events: events::Recorder,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete under the lock; a panic elsewhere cannot leave it half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the callers when the executor dies of a panic, which is a bug of ours; they would wait for
/// ever.
struct Obituary(Arc<Shared>, Arc<Store>);

impl Drop for Obituary {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let error = if self.1.is_scratch() {
                self.1.give_up()
            } else {
                Error::invalid(
                    "the pipeline thread panicked: this is a bug. The last committed step is safe",
                )
            };
            self.0.lock().failure.get_or_insert(error);
            self.0.changed.notify_all();
        }
    }
}

enum Command {
    Begin { schedule: Arc<Schedule>, adamw: AdamW, commits: bool, first_load: u64, number: u64 },
    Submit { piece: usize, weights: Option<Slot>, gradient: Slot },
    End { commit: Option<Vec<u8>>, after: After },
    Abort { reply: Sender<Result> },
    Stop,
}

/// The executor's front.
#[derive(Debug)]
pub struct Pipeline {
    store: Arc<Store>,
    pieces: Arc<Layout>,
    pool: Pool,
    shared: Arc<Shared>,
    commands: Sender<Command>,
    executor: Option<JoinHandle<()>>,
    registration: Option<String>,
    can_spill: bool,
    process: u32,
}

impl Pipeline {
    /// Allocates the pool and starts the executor.
    ///
    /// # Errors
    /// `Invalid` when the pool cannot hold what the store's records need; `Io`.
    pub fn start(store: Arc<Store>, options: &Options) -> Result<Self> {
        let (mut pipeline, executor) = Self::assemble(store, options)?;
        let (shared, store) = (Arc::clone(&pipeline.shared), Arc::clone(&pipeline.store));
        let thread = std::thread::Builder::new()
            .name("mt-pipeline".into())
            .spawn(move || {
                let _obituary = Obituary(shared, store);
                executor.run();
            })
            .map_err(|e| Error::io("start of the pipeline thread", "pipeline", 0, 0, e))?;
        pipeline.executor = Some(thread);
        Ok(pipeline)
    }

    /// Front and executor, without a thread.
    fn assemble(store: Arc<Store>, options: &Options) -> Result<(Self, executor::Executor)> {
        store.check()?;
        let pieces = Arc::clone(store.pieces(options.by_chunk));
        let residents = options.residents.sizes(&pieces)?;
        let spills = options.gradient_files.are_there();
        check_pool(&store, &pieces, &options.pool, &residents, &options.tensors, spills)?;
        let pool = Pool::allocate(&options.pool, &residents, store.ledger())?;
        let registration = store.engine().0.register(&pool.region).err();
        let shared = Arc::new(Shared::default());
        let (commands, inbox) = unbounded();
        let executor = executor::Executor::new(
            Arc::clone(&store),
            pool.clone(),
            options,
            Arc::clone(&shared),
            inbox,
        )?;
        let process = std::process::id();
        let front = Self {
            store,
            pieces,
            pool,
            shared,
            commands,
            executor: None,
            registration,
            can_spill: spills,
            process,
        };
        Ok((front, executor))
    }

    /// Begins a step: its reads start at once. `commits` says whether `end` will get a trainer blob: then
    /// what stays in RAM is written as it is updated.
    ///
    /// # Errors
    /// `Invalid` when loads of the last step were not taken, when the step does not apply exactly the
    /// gradients that wait, or when it would have to take its updates back and could not: they go beside
    /// the state before it only if that is committed. The pipeline's failure.
    pub fn begin(&self, schedule: Arc<Schedule>, adamw: AdamW, commits: bool) -> Result {
        self.store.check()?;
        if !schedule.is_for(&self.pieces) {
            let is_other = schedule.layout().is_by_chunk() != self.pieces.is_by_chunk();
            return Err(Error::invalid(match is_other {
                true => "of schedule and pipeline one is by chunk and the other is not",
                false => "the schedule was made for another store",
            }));
        }
        let mut state = self.shared.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        if state.begun != state.ended {
            return Err(Error::invalid("the last step was begun and not ended"));
        }
        if let Some(left) = state.loads.front() {
            return Err(Error::invalid(format!(
                "the last step's weights of {} were not taken",
                self.pieces.piece_name(left.piece)
            )));
        }
        if *schedule.applied() != *state.waiting.as_ref().unwrap_or(&BTreeSet::new()) {
            return Err(Error::invalid(format!(
                "the step applies kept gradients of {} {:?}, and those of {:?} wait",
                self.kind(),
                schedule.applied(),
                state.waiting
            )));
        }
        let is_guess = !schedule.kept().is_empty() && !schedule.updated().is_empty();
        if is_guess && (state.is_uncommitted || self.store.is_scratch()) {
            return Err(Error::invalid(
                "updates can be taken back only if the step before is committed",
            ));
        }
        if let Some(piece) = schedule.kept().iter().find(|piece| !self.can_keep(**piece)) {
            let name = self.pieces.piece_name(*piece);
            return Err(Error::invalid(format!(
                "there is no place to keep the gradient of {name}"
            )));
        }
        state.waiting = None;
        state.squares = Squares::default();
        state.keeps.clone_from(schedule.kept());
        state.updates.clone_from(schedule.updated());
        state.gradients = schedule.gradients();
        let first_load = state.first_load;
        state.loads.extend(schedule.loads().iter().map(|&piece| Loaded { piece, weights: None }));
        state.begun += 1;
        state.commits = commits;
        let number = state.begun;
        drop(state);
        self.send(Command::Begin { schedule, adamw, commits, first_load, number })
    }

    /// Ends the step. With a trainer blob it is committed as soon as its last write has completed,
    /// while the caller goes on; without, it is durable with the next commit. Of a step whose gradients are
    /// applied by the next one, that is when the next one has done so.
    ///
    /// # Errors
    /// `Invalid` when `begin` was told otherwise; the pipeline's failure.
    pub fn end(&self, commit: Option<Vec<u8>>, after: After) -> Result {
        self.store.check()?;
        if let Some(blob) = commit.as_ref().filter(|blob| blob.len() > BLOB_BYTES_MAX) {
            let bytes = blob.len();
            return Err(Error::invalid(format!(
                "a trainer blob of {bytes} bytes; the limit is {BLOB_BYTES_MAX}"
            )));
        }
        let mut state = self.shared.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        if state.begun == state.ended {
            return Err(Error::invalid("no step was begun"));
        }
        if state.commits != commit.is_some() {
            return Err(Error::invalid(match state.commits {
                true => "the step was begun to be committed and ends without a blob",
                false => "the step was not begun to be committed and ends with a blob",
            }));
        }
        let applies = matches!(after, After::Applied(_));
        if state.keeps.is_empty() && applies
            || !state.keeps.is_empty() && !applies && state.updates.is_empty()
        {
            return Err(Error::invalid(format!(
                "the step kept gradients of {} {}, updated {}, and ends with {after:?}",
                state.keeps.len(),
                self.kind(),
                if state.updates.is_empty() { "nothing" } else { "them" }
            )));
        }
        state.waiting = applies.then(|| std::mem::take(&mut state.keeps));
        let changes = state.gradients > 0;
        state.is_uncommitted = commit.is_none() && (changes || state.is_uncommitted);
        state.ended += 1;
        drop(state);
        self.send(Command::End { commit, after })
    }

    /// Drops the step that was begun and not ended, and with it everything since the last commit:
    /// the next step starts from the committed state. A step that has ended with a blob is committed
    /// first. After a failure only what was committed before it stands. Waits for what is in flight.
    /// Buffers that the caller still holds are the caller's to drop.
    ///
    /// # Errors
    /// `Failed` when the store itself can take no more calls.
    pub fn abort(&self) -> Result {
        let process = self.process;
        let child = std::process::id();
        if child != process {
            return Err(Error::UsedAfterFork { owner: process, child });
        }
        let (reply, answer) = bounded(1);
        self.send(Command::Abort { reply })?;
        answer.recv().map_err(|_| Error::invalid("the pipeline has stopped"))?
    }

    /// The store beneath.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The pool.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Where the time went.
    #[must_use]
    pub fn timings(&self) -> &Timings {
        &self.shared.timings
    }

    /// Records events from now on.
    pub fn record_events(&self) {
        self.shared.events.begin();
    }

    /// The events since this was last called; none without [`Self::record_events`]. A million are kept.
    #[must_use]
    pub fn take_events(&self) -> Events {
        self.shared.events.take()
    }

    /// Why the pool could not be registered with the kernel, if so; it costs CPU time only.
    #[must_use]
    pub fn registration_refused(&self) -> Option<&str> {
        self.registration.as_deref()
    }

    /// How much of the pool lies in huge pages; `None` where the kernel does not say.
    #[must_use]
    pub fn huge_pages(&self) -> Option<HugePages> {
        self.pool.huge_pages
    }

    fn send(&self, command: Command) -> Result {
        self.commands.send(command).map_err(|_| match &self.shared.lock().failure {
            Some(failure) => failure.clone(),
            None => Error::invalid("the pipeline has stopped"),
        })
    }
}

impl Drop for Pipeline {
    /// Steps that have ended are still written and committed; a step under way is dropped.
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // A fork has no executor to wait for.
            std::mem::forget(self.executor.take());
            return;
        }
        let _ = self.commands.send(Command::Stop);
        if let Some(executor) = self.executor.take() {
            let _ = executor.join();
        }
        self.store.engine().0.unregister();
    }
}

#[cfg(test)]
mod crash_model;
#[cfg(test)]
mod tests;
