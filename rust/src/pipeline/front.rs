//! The executor's front: what callers call. Calls that wait are in `waits`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded, unbounded};

use crate::error::{Error, Result};
use crate::memory::huge_pages::HugePages;
use crate::memory::pool::Pool;
use crate::memory::slot::Slot;
use crate::optimizer::hyperparameters::Hyperparameters;
use crate::pipeline::command::{After, Command};
use crate::pipeline::events::Events;
use crate::pipeline::executor::Executor;
use crate::pipeline::memory::{check_pool, gradient_bytes};
use crate::pipeline::options::Options;
use crate::pipeline::schedule::CheckedSchedule;
use crate::pipeline::shared::{Loaded, Shared};
use crate::pipeline::squares::Squares;
use crate::pipeline::stalls::Timings;
use crate::pipeline::unit_name::described;
use crate::store::layout::Layout;
use crate::store::{BLOB_BYTES_MAX, Store};
use crate::units::Unit;

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

/// The executor's front.
#[derive(Debug)]
pub struct Pipeline {
    pub(super) store: Arc<Store>,
    pub(super) units: Arc<Layout>,
    pub(super) pool: Pool,
    pub(super) shared: Arc<Shared>,
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
            .map_err(|e| Error::io("start a thread of", "this process", 0, 0, e))?;
        pipeline.executor = Some(thread);
        Ok(pipeline)
    }

    /// Front and executor, without a thread.
    pub(super) fn assemble(store: Arc<Store>, options: &Options) -> Result<(Self, Executor)> {
        store.check()?;
        let units = Arc::clone(store.units(options.unit));
        let residents = options.residents.sizes(&units)?;
        let spills = options.gradient_files.are_there();
        check_pool(&store, &units, &options.pool, &residents, &options.tensors, spills)?;
        let pool = Pool::allocate(&options.pool, &residents, store.ledger())?;
        let registration = store.engine().0.register(&pool.region).err();
        let shared = Arc::new(Shared::default());
        let (commands, inbox) = unbounded();
        let executor =
            Executor::new(Arc::clone(&store), pool.clone(), options, Arc::clone(&shared), inbox)?;
        let process = std::process::id();
        let front = Self {
            store,
            units,
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
    pub fn begin(
        &self,
        schedule: Arc<CheckedSchedule>,
        hyperparameters: impl Into<Hyperparameters>,
        commits: bool,
    ) -> Result {
        let hyperparameters = hyperparameters.into();
        self.store.check()?;
        if !schedule.is_for(&self.units) {
            let is_other = schedule.layout().unit() != self.units.unit();
            return Err(Error::invalid(match is_other {
                true => "of schedule and pipeline one is by chunk and the other is not",
                false => "the schedule was made for another store",
            }));
        }
        let mut state = self.shared.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        if state.is_pending() {
            return Err(Error::invalid("the last step is not finished"));
        }
        if let Some(left) = state.loads.front() {
            return Err(Error::invalid(format!(
                "the last step's weights of {} were not taken",
                self.units.unit_name(left.unit)
            )));
        }
        if *schedule.applied() != *state.waiting.as_ref().unwrap_or(&BTreeSet::new()) {
            return Err(Error::invalid(format!(
                "the step applies deferred gradients of {} {:?}, and those of {:?} wait",
                self.kind(),
                schedule.applied(),
                state.waiting
            )));
        }
        let is_speculative = !schedule.deferred().is_empty() && !schedule.updated().is_empty();
        if is_speculative && (state.is_uncommitted || self.store.is_scratch()) {
            return Err(Error::invalid(
                "updates can be taken back only if the step before is committed",
            ));
        }
        let gradients = schedule.gradients();
        if gradients > 0 && !self.store.has_own_updates() {
            let trained = (0..self.units.records().len())
                .filter(|unit| self.units.format(*unit).is_trainable())
                .count();
            if gradients < trained {
                return Err(self.one_number(&format!(
                    "the step updates {gradients} of {trained} trained {}",
                    self.kind()
                )));
            }
        }
        if let Some(unit) = schedule.deferred().iter().find(|unit| !self.can_defer(**unit)) {
            let name = self.units.unit_name(*unit);
            return Err(Error::invalid(format!(
                "there is no room for the deferred gradient of {name}"
            )));
        }
        state.waiting = None;
        state.squares = Squares::default();
        state.defers.clone_from(schedule.deferred());
        state.updates.clone_from(schedule.updated());
        state.gradients = gradients;
        let first_load = state.first_load;
        state.loads.extend(schedule.loads().iter().map(|&unit| Loaded { unit, weights: None }));
        state.newest += 1;
        state.commits = commits;
        let number = state.newest;
        drop(state);
        self.send(Command::Begin { schedule, hyperparameters, commits, first_load, number })
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
        if !state.is_pending() {
            return Err(Error::invalid("no step is pending"));
        }
        if state.commits != commit.is_some() {
            return Err(Error::invalid(match state.commits {
                true => "the step was begun to be committed and ends without a blob",
                false => "the step was not begun to be committed and ends with a blob",
            }));
        }
        let applies = matches!(after, After::Applied(_));
        if state.defers.is_empty() && applies
            || !state.defers.is_empty() && !applies && state.updates.is_empty()
        {
            return Err(Error::invalid(format!(
                "the step deferred gradients of {} {}, updated {}, and ends with {after:?}",
                state.defers.len(),
                self.kind(),
                if state.updates.is_empty() { "nothing" } else { "them" }
            )));
        }
        state.waiting = applies.then(|| std::mem::take(&mut state.defers));
        let changes = state.gradients > 0;
        state.is_uncommitted = commit.is_none() && (changes || state.is_uncommitted);
        state.finished += 1;
        drop(state);
        self.send(Command::End { commit, after })
    }

    /// Drops the pending step, and with it everything since the last commit:
    /// the next step starts from the committed state. A step that is finished with a blob is committed
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

    /// Hands the gradient of a whole unit over, with the weights it was computed from. The update
    /// runs behind the caller's back; both buffers return to the pool when it is done. Where the step only
    /// defers the gradient, weights may be left out; where they stay in RAM, they are in their own buffer.
    ///
    /// # Errors
    /// `Invalid` when a buffer is too small, missing, or not the unit's own; the pipeline's failure.
    pub fn submit(&self, unit: usize, weights: Option<Slot>, gradient: Slot) -> Result {
        self.store.check()?;
        self.check_unit(unit)?;
        let needed = (self.units.record_weight_bytes(unit), gradient_bytes(&self.units, unit));
        let given = (weights.as_ref().map_or(needed.0, |slot| slot.len()), gradient.len());
        let name = || self.units.unit_name(unit);
        if given.0 < needed.0 || given.1 < needed.1 {
            let name = name();
            return Err(Error::invalid(format!(
                "{name} takes buffers of {needed:?} bytes, got {given:?}"
            )));
        }
        if self.shared.lock().updates.contains(&unit) {
            let own = self.pool.residents.weights_of(unit);
            match &weights {
                None => {
                    let name = name();
                    return Err(Error::invalid(format!(
                        "the step updates {name}: its gradient is submitted with the weights"
                    )));
                }
                Some(slot) if own.is_some_and(|own| !own.owns(slot)) => {
                    let name = name();
                    return Err(Error::invalid(format!(
                        "the weights of {name} stay in RAM: submit the buffer that take_weights gave"
                    )));
                }
                Some(_) => {}
            }
        }
        self.send(Command::Submit { unit, weights, gradient })
    }

    /// Says that a unit which the step updates, or whose gradient it defers, got none: it is not updated, keeps its
    /// number of updates, and is not written, but for what changed in RAM alone since the last commit, if the step
    /// commits. All chunks of a record are skipped, or none. Weights that stay in RAM are handed over in their own buffer
    /// where the step updates at once; others may be.
    ///
    /// # Errors
    /// `Invalid` when that buffer is missing, or the store has one number of updates for all records; the pipeline's
    /// failure.
    pub fn skip(&self, unit: usize, weights: Option<Slot>) -> Result {
        self.store.check()?;
        self.check_unit(unit)?;
        if !self.store.has_own_updates() {
            let name = self.units.unit_name(unit);
            return Err(self.one_number(&format!("{name} got no gradient")));
        }
        let own = self.pool.residents.weights_of(unit);
        let weights = weights.filter(|weights| own.is_some_and(|own| own.owns(weights)));
        if own.is_some() && weights.is_none() && self.shared.lock().updates.contains(&unit) {
            let name = self.units.unit_name(unit);
            return Err(Error::invalid(format!(
                "the weights of {name} stay in RAM: hand over the buffer that take_weights gave"
            )));
        }
        self.send(Command::Skip { unit, weights })
    }

    fn one_number(&self, what: &str) -> Error {
        Error::invalid(format!(
            "{what}, and this store counts the steps of all its records together, as stores before format 0.4 do: \
             export the model and import it again, and each record has its own count"
        ))
    }

    /// The store's layout by what one buffer holds: records, or chunks.
    #[must_use]
    pub fn units(&self) -> &Arc<Layout> {
        &self.units
    }

    /// What a unit is called by people.
    ///
    /// # Errors
    /// `Invalid` when there is no such unit.
    pub fn describe(&self, unit: usize) -> Result<String> {
        self.check_unit(unit)?;
        Ok(described(&self.store, &self.units, unit))
    }

    fn can_defer(&self, unit: usize) -> bool {
        self.pool.residents.gradient_of(unit).is_some() || self.can_spill
    }

    pub(super) fn check_unit(&self, unit: usize) -> Result {
        let count = self.units.records().len();
        if unit < count {
            return Ok(());
        }
        let name = self.units.unit_name(unit);
        Err(Error::invalid(format!("{name} does not exist; the store has {count}")))
    }

    /// What units are.
    fn kind(&self) -> &'static str {
        match self.units.unit() {
            Unit::Record => "records",
            Unit::Chunk => "chunks",
        }
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

    pub(super) fn send(&self, command: Command) -> Result {
        self.commands.send(command).map_err(|_| match &self.shared.lock().failure {
            Some(failure) => failure.clone(),
            None => Error::invalid("the pipeline has stopped"),
        })
    }
}

impl Drop for Pipeline {
    /// Finished steps are still written and committed; a pending one is dropped.
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
