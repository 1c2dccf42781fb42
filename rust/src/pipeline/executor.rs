//! The one thread that decides: what to read next, what to update, when a step is whole.
//!
//! Four parts do the work, each with its own state: [`Loads`], [`Updates`], [`DeferredGradients`],
//! [`Commits`]. The executor orders them, gives what has completed to the part that asked for it, and
//! decides how steps begin, end, and are dropped. Loads and updates each keep the schedule's order among
//! themselves, but do not wait for one another: an update that waits for its gradient must not hold up the
//! next block's weights.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Select, Sender};

use crate::error::{Error, Result};
use crate::io::engine::Completion;
use crate::memory::pool::Pool;
use crate::memory::slot::Slot;
use crate::optimizer::hyperparameters::Hyperparameters;
use crate::pipeline::command::{After, Command};
use crate::pipeline::executor::commits::Commits;
use crate::pipeline::executor::context::Context;
use crate::pipeline::executor::deferred_gradients::DeferredGradients;
use crate::pipeline::executor::loads::{LoadWait, Loaded, Loads};
use crate::pipeline::executor::requests::{Request, Requests, Work};
use crate::pipeline::executor::stalls::StallMeter;
use crate::pipeline::executor::steps::Steps;
use crate::pipeline::executor::updates::Updates;
use crate::pipeline::executor::working_state::WorkingState;
use crate::pipeline::options::Options;
use crate::pipeline::schedule::{CheckedSchedule, Kind};
use crate::pipeline::shared::Shared;
use crate::pipeline::stalls::{Cause, Causes};
use crate::store::Store;
use crate::store::checksum::{self, Mismatch};
use crate::units::Group;

mod commits;
mod context;
mod deferred_gradients;
mod loads;
mod requests;
mod residents;
mod stalls;
mod steps;
mod updates;
mod working_state;

pub(super) struct Executor {
    cx: Context,
    inbox: Receiver<Command>,
    requests: Requests,
    working: WorkingState,
    steps: Steps,
    loads: Loads,
    updates: Updates,
    deferred: DeferredGradients,
    commits: Commits,
    stalls: StallMeter,
    failed: bool,
    /// Whether the pending step has a gradient that is not finite.
    is_refused: bool,
    aborting: Option<Sender<Result>>,
    stopping: bool,
}

impl Executor {
    pub(super) fn new(
        store: Arc<Store>,
        pool: Pool,
        options: &Options,
        shared: Arc<Shared>,
        inbox: Receiver<Command>,
    ) -> Result<Self> {
        let cx = Context::new(store, pool, options, shared)?;
        let own_gradients = &options.residents.gradients;
        Ok(Self {
            inbox,
            requests: Requests::new(),
            working: WorkingState::new(&cx.store, &cx.units),
            steps: Steps::default(),
            loads: Loads::new(options.pool.weights.len()),
            updates: Updates::new(cx.units.records().len()),
            deferred: DeferredGradients::new(&cx, &options.gradient_files, own_gradients),
            commits: Commits::default(),
            stalls: StallMeter::default(),
            failed: false,
            is_refused: false,
            aborting: None,
            stopping: false,
            cx,
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
                // What was finished cannot be written: back to the last commit.
                self.steps.clear();
            }
        }
        if !self.is_active() && !self.requests.are_in_flight() {
            self.finish_abort();
            return !self.stopping;
        }
        true
    }

    /// Whether there is work to go on with: nothing failed, and if the pending step is to be dropped
    /// (abort, stop), a finished step before it is still to be written.
    fn is_active(&self) -> bool {
        let halting = self.aborting.is_some() || self.stopping || self.is_refused;
        !self.failed && (!halting || self.steps.must_go_on())
    }

    /// Does all that can be done now.
    fn advance(&mut self) {
        let Self { cx, requests, working, steps, loads, updates, deferred, .. } = self;
        loads.begin_round();
        updates.begin_round();
        if steps.take_back(&cx.units) {
            // The gradients will be applied to the state before the step, which is the committed one.
            working.back_to_the_last_commit(&cx.store);
        }
        let written = deferred.start_writes(cx, requests);
        self.fail_on(written);
        self.start_loads();
        let Self { cx, requests, working, steps, updates, deferred, .. } = self;
        let read = updates.start_reads(cx, requests, working, steps, deferred);
        self.fail_on(read);
        if self.updates.are_ready(&self.cx, &self.steps) {
            self.publish_causes();
            // One chunk at a time: completions are looked at in between.
            let updated = self.update();
            self.fail_on(updated);
        }
        let Self { cx, requests, working, steps, commits, .. } = self;
        let durable = commits.make_durable(cx, requests, working, steps);
        self.fail_on(durable);
    }

    fn start_loads(&mut self) {
        if self.steps.is_taking_back() {
            return;
        }
        let Self { cx, requests, working, loads, .. } = self;
        for loaded in loads.start(cx, requests, working) {
            self.deliver(loaded);
        }
    }

    /// Computes an update, once the store may be written to.
    fn update(&mut self) -> Result {
        let Self { cx, requests, working, steps, updates, deferred, commits, .. } = self;
        match cx.store.is_writable() {
            true => updates.update(cx, requests, working, steps, deferred),
            false if commits.are_running() => Ok(()),
            false => commits.start_writing(cx, requests),
        }
    }

    /// Weights of a load: to the caller, or first to the update with the gradient that was deferred.
    fn deliver(&mut self, loaded: Loaded) {
        let Some(step) = loaded.applies else {
            return self.cx.hand_over(loaded.number, loaded.weights);
        };
        if self.steps.skips(step, loaded.unit) {
            return self.updates.apply(&self.cx, loaded, None, true);
        }
        match self.deferred.take(&self.cx, loaded.unit) {
            Ok(gradient) => self.updates.apply(&self.cx, loaded, gradient, false),
            Err(error) => self.fail(error),
        }
    }

    /// Tells the callers what they wait for.
    fn publish_causes(&mut self) {
        let Self { cx, working, steps, loads, updates, .. } = self;
        let gradient = updates.wait(cx, working, steps);
        // Weights that are updated on their way to the caller come before all that are only read.
        let weights = match loads.wait(working) {
            _ if updates.hold_weights() => gradient,
            LoadWait::Update(chunk) if updates.is_being_written(chunk) => Cause::Write,
            LoadWait::Update(_) => gradient,
            LoadWait::Read => Cause::Read,
            LoadWait::Buffer => Cause::Pool,
        };
        self.stalls.publish(&cx.shared, Causes { weights, gradient });
    }

    /// Whether a finished step cannot be written, because the caller did not give all buffers back
    /// and has dropped the step after it.
    fn is_stuck(&self) -> bool {
        let is_starved = self.loads.is_starved() || self.updates.is_starved();
        let can_go_on = self.updates.has_moved_on()
            || self.commits.are_running()
            || self.requests.are_in_flight();
        (self.aborting.is_some() || self.stopping)
            && self.steps.is_being_applied()
            && is_starved
            && !can_go_on
            && !self.updates.are_ready(&self.cx, &self.steps)
    }

    fn wait(&self) {
        let can_write = self.cx.store.is_writable() || !self.commits.are_running();
        let goes_on = self.updates.has_moved_on()
            || (can_write && self.updates.are_ready(&self.cx, &self.steps));
        if self.is_active() && goes_on {
            return;
        }
        let mut select = Select::new();
        select.recv(&self.inbox);
        select.recv(self.requests.completions());
        if self.is_active() {
            self.loads.watch(&self.cx.pool, &mut select);
            self.updates.watch(&self.cx.pool, &mut select);
        }
        select.ready();
    }

    pub(super) fn receive(&mut self) {
        while let Ok(completion) = self.requests.completions().try_recv() {
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

    fn complete(&mut self, completion: Completion) {
        let Some(request) = self.requests.landed(&self.cx, completion.tag) else { return };
        if matches!(request.work, Work::Sequence) {
            // Also when the executor has failed: a commit under way is seen to its end.
            let Self { cx, requests, working, steps, commits, .. } = self;
            let landed = commits.landed(cx, requests, working, steps, completion);
            return self.fail_on(landed);
        }
        if !self.is_active() {
            return;
        }
        let used = match (completion.result, completion.slot) {
            (Ok(()), Some(slot)) => self.landed(request, slot),
            (Err(error), Some(slot)) if error.is_worth_a_retry() && !request.again => {
                self.requests.start(&self.cx, Request { again: true, ..request }, Some(slot));
                Ok(())
            }
            (Ok(()), None) => Err(Error::invalid("the engine kept a slot")),
            (Err(error), _) => Err(error),
        };
        self.fail_on(used);
    }

    /// Gives what was read, once it is verified, and what was written to the part that asked for it.
    fn landed(&mut self, request: Request, slot: Slot) -> Result {
        let Self { cx, requests, working, steps, updates, deferred, .. } = self;
        let verified = match &request.work {
            Work::Load { chunk, plan, .. } | Work::Planes { chunk, plan, .. } => {
                cx.verify(*chunk, &plan.binding, &plan.sums, &slot[..plan.bytes])
            }
            Work::ReadGradient { chunk, step } => deferred.verify(cx, *chunk, *step, &slot),
            Work::Write { .. } | Work::WriteGradient { .. } | Work::Sequence => Ok(()),
        };
        match verified {
            Ok(()) => {}
            // A flip on the bus or in RAM is gone at the second reading.
            Err(_) if !request.again => {
                requests.start(cx, Request { again: true, ..request }, Some(slot));
                return Ok(());
            }
            Err(mismatch) => return Err(corrupt(cx, &request, mismatch)),
        }
        match request.work {
            Work::Load { number, chunk, plan } => {
                if let Some(loaded) = self.loads.landed(cx, number, chunk, &plan, slot) {
                    working.residents.read_weights(loaded.unit, &cx.pool);
                    self.deliver(loaded);
                }
            }
            Work::Planes { chunk, rest, .. } => {
                updates.planes_landed(cx, working, chunk, slot, rest)
            }
            Work::ReadGradient { chunk, .. } => updates.gradient_landed(chunk, slot),
            Work::Write { chunk, .. } => {
                drop(slot);
                updates.wrote(cx, working, steps, chunk);
            }
            Work::WriteGradient { chunk } => {
                drop(slot);
                deferred.wrote(chunk);
            }
            Work::Sequence => {}
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Stop => {
                self.stopping = true;
                self.drop_pending_step();
            }
            Command::Abort { reply } => {
                self.aborting = Some(reply);
                self.drop_pending_step();
            }
            // After a failure callers get its error; what they still send is dropped here.
            _ if self.failed || self.is_refused => {}
            Command::Begin { schedule, hyperparameters, commits, first_load, number } => {
                let begun = self.begin(schedule, hyperparameters, commits, first_load, number);
                self.fail_on(begun);
            }
            Command::Submit { unit, weights, gradient } => {
                match self.submitted(unit, weights, gradient) {
                    Err(error @ Error::NotFinite { .. }) => self.refuse_step(error),
                    submitted => self.fail_on(submitted),
                }
            }
            Command::Skip { unit, weights } => {
                let skipped = self.skipped(unit, weights);
                self.fail_on(skipped);
            }
            Command::End { commit, after } => {
                let finished = self.end(commit, after);
                self.fail_on(finished);
            }
        }
    }

    fn begin(
        &mut self,
        schedule: Arc<CheckedSchedule>,
        hyperparameters: Hyperparameters,
        commits: bool,
        first_load: u64,
        number: u64,
    ) -> Result {
        let Self { cx, working, steps, loads, updates, .. } = self;
        let before = steps.last();
        let mut expect =
            |updated, commits| working.residents.schedule(updated, &cx.units, &cx.pool, commits);
        if !schedule.applied().is_empty() {
            expect(schedule.applied(), steps.apply_deferred()?.commits())?;
        }
        if schedule.deferred().is_empty() || !schedule.updated().is_empty() {
            expect(schedule.updated(), commits)?;
        }
        let mut load = first_load;
        for operation in schedule.operations() {
            let (kind, chunk) = (operation.kind, operation.chunk);
            let unit = cx.unit_of(chunk);
            let applies = kind == Kind::Apply;
            let is_first = chunk == cx.units.records()[unit].start;
            if is_first && matches!(kind, Kind::Load | Kind::Apply) {
                loads.plan(cx, working, load, unit, applies.then_some(before))?;
                load += 1;
            }
            if matches!(kind, Kind::Apply | Kind::Update) {
                updates.plan(working, if applies { before } else { number }, chunk, applies);
            }
        }
        steps.begin(number, schedule, hyperparameters, commits);
        Ok(())
    }

    /// Takes a unit's gradient: it is counted into the norm, and then updates, or is deferred, or both.
    fn submitted(&mut self, unit: usize, weights: Option<Slot>, gradient: Slot) -> Result {
        let Self { cx, steps, updates, deferred, .. } = self;
        let Some(expected) = steps.submitted(unit) else {
            let name = cx.units.unit_name(unit);
            return Err(Error::invalid(format!(
                "the gradient of {name} was submitted and the step does not (or no longer) expect it"
            )));
        };
        cx.add_squares(expected.step, unit, &gradient)?;
        let chunks = cx.units.records()[unit].clone();
        let on_drive = expected.defers && deferred.is_unit_on_drive(&chunks);
        if on_drive {
            deferred.expect(chunks);
        }
        if expected.updates {
            let missing = || Error::invalid("an update without its weights");
            let deferred_by = on_drive.then_some(expected.step);
            updates.submit(cx, unit, weights.ok_or_else(missing)?, gradient, deferred_by);
        } else if on_drive {
            deferred.defer(expected.step, unit, gradient);
        }
        Ok(())
    }

    /// Takes note that a unit got no gradient: it counts for nothing in the norm, and its update changes nothing.
    fn skipped(&mut self, unit: usize, weights: Option<Slot>) -> Result {
        let Self { cx, steps, updates, .. } = self;
        let Some(expected) = steps.skipped(unit) else {
            let name = cx.units.unit_name(unit);
            return Err(Error::invalid(format!(
                "{name} was skipped and the step does not (or no longer) expect its gradient"
            )));
        };
        cx.no_squares(expected.step);
        if expected.updates {
            updates.skip(cx, unit, weights);
        }
        Ok(())
    }

    fn end(&mut self, commit: Option<Vec<u8>>, after: After) -> Result {
        if self.steps.end(&self.cx.units, commit, after)? {
            self.working.residents.forget_what_is_unwritten();
        }
        Ok(())
    }

    fn fail_on(&mut self, outcome: Result) {
        if let Err(error) = outcome {
            self.fail(error);
        }
    }

    fn fail(&mut self, error: Error) {
        self.failed = true;
        // What the next call would be told is told to the one that waits now, too.
        let error = self.cx.store.check().err().unwrap_or(error);
        self.cx.shared.lock().failure.get_or_insert(error);
        self.cx.shared.changed.notify_all();
    }

    /// The pending step cannot go on; those before it are finished, until the caller aborts.
    fn refuse_step(&mut self, error: Error) {
        self.is_refused = true;
        self.drop_pending_step();
        self.cx.shared.lock().failure.get_or_insert(error);
        self.cx.shared.changed.notify_all();
    }

    /// Forgets what was planned for a step that is dropped; what is applied on its way stays planned. Nobody
    /// takes weights any more: their buffers are free for that.
    fn drop_pending_step(&mut self) {
        let Some(number) = self.steps.pending() else { return };
        self.updates.drop_step(number);
        self.loads.drop_what_nobody_takes();
        self.cx.shared.lock().forget_loads();
    }

    /// Back to the last commit, once nothing is in flight any more.
    fn finish_abort(&mut self) {
        let store = &self.cx.store;
        let is_ending = self.stopping || self.aborting.is_some();
        if self.working.is_touched() && store.is_scratch() && is_ending {
            let _ = store.give_up();
        }
        let Some(reply) = self.aborting.take() else { return };
        self.loads.clear();
        self.updates.clear();
        self.deferred.clear();
        self.steps.clear();
        self.working.start_anew(store);
        self.is_refused = false;
        let outcome = store.check();
        self.failed = outcome.is_err();
        let mut state = self.cx.shared.lock();
        state.forget_loads();
        state.finished = state.newest;
        state.durable = state.newest;
        state.waiting = None;
        state.is_uncommitted = false;
        state.failure = outcome.clone().err();
        drop(state);
        self.cx.shared.changed.notify_all();
        let _ = reply.send(outcome);
    }
}

/// What was read twice and does not hold.
fn corrupt(cx: &Context, request: &Request, mismatch: Mismatch) -> Error {
    match &request.work {
        Work::Load { chunk, plan, .. } => {
            cx.store.corrupt(*chunk, Group::Weight, plan.offset, mismatch)
        }
        Work::Planes { chunk, plan, .. } => {
            cx.store.corrupt(*chunk, Group::Update, plan.offset, mismatch)
        }
        work => {
            let record = cx.store.layout().chunks()[work.chunk().unwrap_or(0)].record;
            let unit = (mismatch.unit * checksum::UNIT_BYTES) as u64;
            Error::CorruptGradient {
                path: request.file.path().into(),
                record: cx.store.manifest().records[record].name.clone(),
                offset: request.offset + unit,
                expected: mismatch.expected,
                found: mismatch.found,
            }
        }
    }
}
