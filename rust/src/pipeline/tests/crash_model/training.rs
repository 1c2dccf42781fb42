//! A machine that trains, crashes and starts again, and what its store must hold.

use super::calls::Call;
use super::memories::{Memories, adamw, len};
use super::plan::plan_calls;
use super::process::{NO_WAIT, Process};
use std::sync::Arc;

use super::base::Base;
use super::broken::{Breakage, Broken};
use super::run::{Run, Stays, UpdatePolicy};
use crate::error::Result;
use crate::io::engine::Engine;
use crate::io::engine::faulty::{self, Fault, Faulty};
use crate::memory::ledger::Ledger;
use crate::memory::pool::{self, BufferKind, PoolSizes};
use crate::memory::slot::Slot;
use crate::optimizer::kernel::Kernel;
use crate::pipeline::GradientFiles;
use crate::pipeline::command::Command;
use crate::pipeline::{Options, Pipeline, Residents, TensorSettings, chunk_slot_bytes};
use crate::store::Store;
use crate::units::{Group, StateFormat, Unit};
use std::collections::VecDeque;

/// Turns without any progress after which a run counts as stuck.
const PATIENCE: u32 = 20_000;

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Kill,
    PowerCut,
    /// The store is closed; the step under way is dropped.
    Close,
}

pub(super) struct Machine<'a> {
    pub(super) base: &'a Base,
    pub(super) run: Run,
    pub(super) drive: Arc<Faulty>,
    engine: Arc<Broken>,
    pub(super) rng: fastrand::Rng,
    boot: u8,
    pub(super) memories: Memories,
    pub(super) process: Option<Process>,
    /// The last step that was acknowledged as durable, or found by an open.
    acknowledged: u64,
    /// The last step that was handed over for a commit.
    handed_over: u64,
    /// With durability scratch: the step of the last clean close, that of a close whose end was not
    /// seen, and whether the last process ended by a clean close.
    closed: (u64, Option<u64>, bool),
}

impl<'a> Machine<'a> {
    /// A machine with this store on its drive.
    pub(super) fn new(base: &'a Base, run: &Run) -> Self {
        let plan = faulty::Plan {
            seed: run.seed,
            ignores_flushes: run.ignores_flushes,
            ..Default::default()
        };
        let drive = Arc::new(Faulty::over(Arc::new(base.image.copy()), plan));
        let engine = Broken::over(Arc::clone(&drive), run.breakage, base);
        Self {
            base,
            run: run.clone(),
            drive,
            engine,
            rng: fastrand::Rng::with_seed(run.seed),
            boot: 1,
            memories: Memories::imported(&base.records),
            process: None,
            acknowledged: 0,
            handed_over: 0,
            closed: (0, None, true),
        }
    }

    /// Opens the store and compares all of it with what it must hold. The machine may lose its power
    /// meanwhile: then it starts again. `Ok(false)`: damage was noticed, on a drive that lies.
    pub(super) fn open(&mut self) -> Result<bool, String> {
        for _ in 0..8 {
            self.drive.set_by_hand(false);
            self.engine.set_opening(true);
            let opened = self.open_once();
            self.engine.set_opening(false);
            if self.drive.is_off() {
                self.drive.power_on();
                self.boot += 1;
                continue;
            }
            self.drive.clear_plan();
            let Some(process) = opened? else { return Ok(false) };
            self.process = Some(process);
            self.drive.set_by_hand(true);
            return Ok(true);
        }
        Err("the power went eight times".into())
    }

    fn open_once(&mut self) -> Result<Option<Process>, String> {
        let engine = Arc::clone(&self.engine) as Arc<dyn Engine>;
        let opened = Store::open_on(&self.base.drives, engine, [self.boot; 16], &Ledger::new());
        let store = match opened {
            Err(_) if self.may_lose() => return Ok(None),
            Err(_) if self.base.is_scratch && !self.closed.2 => return Ok(None),
            opened => opened.map_err(|error| format!("the store does not open: {error}"))?,
        };
        let found = match self.compare(&store)? {
            Ok(step) => step,
            Err(_) if self.may_lose() => return Ok(None),
            Err(error) => return Err(format!("the store does not read: {error}")),
        };
        if !self.drive.is_off() {
            let next = self.next_commit(self.acknowledged);
            let is_next = found == next && self.handed_over >= next;
            let is_known_loss = self.may_lose() && found < self.acknowledged;
            let is_right = if self.base.is_scratch {
                found == self.closed.0 || Some(found) == self.closed.1
            } else {
                found == self.acknowledged || is_next || is_known_loss
            };
            if !is_right {
                return Err(format!(
                    "the store is at step {found}; {} was acknowledged and {} handed over",
                    self.acknowledged, self.handed_over
                ));
            }
            self.acknowledged = found;
            self.handed_over = found;
            self.closed.0 = found;
        }
        let options = self.options(&store);
        let (front, executor) =
            Pipeline::assemble(Arc::new(store), &options).map_err(|error| error.to_string())?;
        let store = Arc::clone(front.store());
        let (calls, waiting, away) = (VecDeque::new(), Vec::new(), Vec::new());
        let (from, durable, step) = (found, 0, found);
        Ok(Some(Process { store, front, executor, from, durable, step, calls, waiting, away }))
    }

    /// Whether what the drive acknowledged may be lost, as long as it is noticed: it lies, and its power
    /// has gone.
    fn may_lose(&self) -> bool {
        self.run.ignores_flushes && self.boot > 1
    }

    /// The next step after `step` that is committed.
    fn next_commit(&self, step: u64) -> u64 {
        let every = self.run.commit_every;
        ((step / every + 1) * every).min(self.run.steps.max(step + 1))
    }

    /// Reads everything back: the bytes must be those of training in memory to the step that the blob
    /// names, which is returned; or the error that reading gave.
    fn compare(&self, store: &Store) -> Result<Result<u64>, String> {
        let committed = store.committed();
        let blob = String::from_utf8_lossy(&committed.blob).into_owned();
        let step: u64 = blob
            .strip_prefix("step ")
            .and_then(|number| number.parse().ok())
            .ok_or_else(|| format!("the blob says {blob:?}"))?;
        let state = self
            .memories
            .after
            .get(len(step))
            .ok_or_else(|| format!("step {step} was never made"))?;
        for (index, chunk) in store.layout().chunks().iter().enumerate() {
            let record = &state[chunk.record];
            let updates = committed.table.entry(store.layout(), index, Group::Update).updates;
            if updates != record.updates {
                return Err(format!(
                    "the store says step {step}, and {} was updated {updates} times, not {}",
                    store.describe(index, Group::Update),
                    record.updates
                ));
            }
            let range = len(chunk.start)..len(chunk.start) + chunk.parameters;
            for group in Group::ALL {
                let slot = Slot::standalone(chunk.extent_bytes(group), &Ledger::new(), "test")
                    .expect("memory");
                let bytes = match store.read_group(&committed.table, index, group, slot) {
                    Ok(bytes) => bytes,
                    Err(error) => return Ok(Err(error)),
                };
                let planes: Vec<&[f32]> = match group {
                    Group::Weight => vec![&record.weight[range.clone()]],
                    Group::Update => {
                        vec![&record.exp_avg[range.clone()], &record.exp_avg_sq[range.clone()]]
                    }
                };
                let expected = planes.into_iter().flatten().flat_map(|value| value.to_le_bytes());
                if !expected.eq(bytes[..chunk.plane_ranges(group).last().map_or(0, |r| r.end)]
                    .iter()
                    .copied())
                {
                    return Err(format!(
                        "the store says step {step}, and {} holds other bytes",
                        store.describe(index, group)
                    ));
                }
            }
        }
        Ok(Ok(step))
    }

    fn options(&self, store: &Store) -> Options {
        let kind = |bytes, count| pool::Kind { bytes, count };
        let records = &self.base.records;
        let weights = |n: u64| (len(n) * 4).next_multiple_of(4096);
        let largest = records.iter().copied().max().unwrap_or(0);
        let in_chunk = len(largest.min(4096));
        let slot = chunk_slot_bytes(StateFormat::F32, in_chunk) + weights(in_chunk as u64);
        let kind_of_unit = self.run.unit;
        let of_chunks = kind_of_unit == Unit::Chunk;
        // By chunk as little as there can be, now and then.
        let few = if of_chunks && self.run.seed.is_multiple_of(2) { 1 } else { 2 };
        let bytes = weights(if of_chunks { in_chunk as u64 } else { largest });
        let pool = PoolSizes {
            chunk_slots: kind(slot, if few == 1 { 1 } else { 3 }),
            weights: vec![BufferKind::of_all(bytes, few)],
            outgoing: if of_chunks { kind(bytes, few) } else { pool::Kind::default() },
            gradients: vec![BufferKind::of_all(bytes, few)],
        };
        let tensors = records
            .iter()
            .enumerate()
            .map(|(record, &elements)| TensorSettings {
                record,
                offset: 0,
                elements,
                weight_decay: 0.01,
                lr_scale: 1.0,
            })
            .collect();
        let every = match self.run.stays {
            Stays::Nothing => usize::MAX,
            Stays::Half => 2,
            Stays::All => 1,
        };
        let some = |count: usize| (0..count).filter(|i| (i + 1).is_multiple_of(every)).collect();
        let chunks = records.iter().map(|n| len(n.div_ceil(4096))).sum();
        let gradients = match self.run.policy {
            UpdatePolicy::Immediate => vec![],
            _ => some(records.len()),
        };
        let units = |records: Vec<usize>| match of_chunks {
            true => records.into_iter().flat_map(|r| store.layout().records()[r].clone()).collect(),
            false => records,
        };
        let records = units(some(records.len()));
        let residents = Residents { records, chunks: some(chunks), gradients: units(gradients) };
        let gradient_files = match self.run.policy {
            UpdatePolicy::Immediate => GradientFiles::default(),
            _ => self.base.gradient_files.clone(),
        };
        let kernel = Some(Kernel::Scalar);
        Options { pool, threads: 1, kernel, tensors, residents, gradient_files, unit: kind_of_unit }
    }

    /// Whether the training has come to its end and everything is durable.
    pub(super) fn is_done(&self) -> bool {
        self.acknowledged == self.run.steps
    }

    /// Does one thing, chosen by the seed: the executor turns, the trainer calls, or the drive
    /// performs an operation.
    ///
    /// # Errors
    /// What the trainer was told, if one of its calls failed.
    fn advance(&mut self) -> Result {
        match self.rng.u8(..4) {
            0 => {
                self.turn();
            }
            1 => return self.call(),
            _ => {
                self.drive.deliver();
            }
        }
        Ok(())
    }

    /// The executor does what it can; `false` when it has stopped.
    fn turn(&mut self) -> bool {
        let Some(process) = &mut self.process else { return false };
        let goes_on = process.executor.turn();
        process.executor.receive();
        let durable = process.front.shared.lock().durable;
        // What applies the last gradients counts as one more.
        let done = (process.from + (durable - process.durable)).min(self.run.steps);
        let every = self.run.commit_every;
        let committed = if done == self.run.steps { done } else { done / every * every };
        self.acknowledged = self.acknowledged.max(committed);
        goes_on
    }

    fn call(&mut self) -> Result {
        let Some(process) = &mut self.process else { return Ok(()) };
        if process.calls.is_empty() {
            plan_calls(&self.run, process, &mut self.memories);
        }
        let Some(call) = process.calls.front() else { return Ok(()) };
        let front = &process.front;
        if let Some(failure) = &front.shared.lock().failure {
            return Err(failure.clone());
        }
        let done = match call {
            Call::Begin { schedule, commits } => {
                front.begin(Arc::clone(schedule), adamw(process.step), *commits)?;
                true
            }
            Call::Pass(unit) => front.take_weights(*unit, NO_WAIT)?.is_some(),
            Call::Fetch(unit) => {
                let unit = *unit;
                process.fetch(unit)?
            }
            Call::Train { unit, updates } => {
                let (unit, updates) = (*unit, *updates);
                process.train(unit, updates)?
            }
            Call::Skip { unit, updates } => {
                let (unit, updates) = (*unit, *updates);
                process.skip(unit, updates)?;
                true
            }
            Call::Norm => front.squares(NO_WAIT)?.is_some(),
            Call::End { commit, after } => {
                let blob = format!("step {}", process.step).into_bytes();
                front.end(commit.then_some(blob), *after)?;
                if *commit {
                    self.handed_over = process.step;
                }
                true
            }
            Call::WaitDurable => front.wait_durable(NO_WAIT)?,
        };
        if done {
            process.calls.pop_front();
        }
        Ok(())
    }

    /// Trains until it is done, until `operations` have been submitted, or until the power is off.
    /// After an error the trainer goes back to the last commit, if the store still lets it.
    /// `Ok(false)`: the store is beyond use and must be opened again.
    pub(super) fn train(&mut self, operations: u64) -> Result<bool, String> {
        let (mut seen, mut patience) = (u64::MAX, PATIENCE);
        while !self.is_done() && !self.drive.is_off() && self.drive.operations() < operations {
            let submitted = self.drive.operations();
            if std::mem::replace(&mut seen, submitted) != submitted {
                patience = PATIENCE;
            }
            patience -= 1;
            if patience == 0 {
                return Err(self.describe_stall());
            }
            if self.advance().is_err() && !self.drive.is_off() {
                if !self.abort()? {
                    // Beyond use: all that is left to do is to open the store again.
                    self.process = None;
                    return Ok(false);
                }
                patience = PATIENCE;
            }
        }
        Ok(true)
    }

    fn describe_stall(&self) -> String {
        let Some(process) = &self.process else { return "no process".into() };
        let state = process.front.shared.lock();
        format!(
            "the training is stuck at step {} before {:?}: newest {}, finished {}, durable {}, {} operations wait, failure {:?}",
            process.step,
            process.calls.front(),
            state.newest,
            state.finished,
            state.durable,
            self.drive.waiting(),
            state.failure
        )
    }

    /// Back to the last commit, with the store still open. `Ok(false)` when the store refuses.
    fn abort(&mut self) -> Result<bool, String> {
        let Some(process) = &mut self.process else { return Ok(false) };
        if self.rng.bool() {
            // Else somebody holds on to them.
            process.away.clear();
        }
        let (reply, answer) = crossbeam_channel::bounded(1);
        process.front.send(Command::Abort { reply }).map_err(|error| error.to_string())?;
        for _ in 0..PATIENCE {
            process.executor.turn();
            process.executor.receive();
            self.drive.deliver();
            if self.drive.is_off() {
                return Ok(false);
            }
            let Ok(answer) = answer.try_recv() else { continue };
            if answer.is_err() {
                return Ok(false);
            }
            // The working state is the committed one, which is the last acknowledged or the next.
            let blob = process.store.committed().blob;
            let step = String::from_utf8_lossy(&blob)
                .strip_prefix("step ")
                .and_then(|number| number.parse::<u64>().ok())
                .ok_or("an abort lost the blob")?;
            let durable = process.front.shared.lock().durable;
            process.calls.clear();
            process.away.clear();
            process.waiting.clear();
            (process.from, process.step, process.durable) = (step, step, durable);
            if step < self.acknowledged || step > self.handed_over.max(self.acknowledged) {
                return Err(format!("the abort went to step {step}"));
            }
            (self.acknowledged, self.handed_over) = (step, step);
            return Ok(true);
        }
        Err("the abort is stuck".into())
    }

    /// Ends the process; what it had in flight lands before the lock is free, unless that is broken.
    pub(super) fn end(&mut self, ending: Ending) -> Result<(), String> {
        self.closed = (self.closed.0, None, false);
        match ending {
            Ending::PowerCut => self.drive.cut_power(),
            Ending::Close => self.close(),
            Ending::Kill => self.drive.kill_owner(),
        }
        self.process = None;
        if self.drive.is_off() {
            self.drive.power_on();
            self.boot += 1;
        }
        if self.run.breakage != Breakage::PosixLock {
            while self.drive.deliver() {}
        }
        Ok(())
    }

    /// Finished steps are committed, the pending one is dropped, and the store is marked.
    fn close(&mut self) {
        let Some(process) = &self.process else { return };
        let _ = process.front.send(Command::Stop);
        while self.turn() && !self.drive.is_off() {
            self.drive.deliver();
        }
        self.drive.set_by_hand(false);
        if let Some(process) = &self.process {
            self.closed.1 = Some(self.acknowledged);
            // A store that failed, or a drive without power, is left as it is.
            if process.store.mark_clean().is_ok() {
                self.closed = (self.acknowledged, None, true);
            }
        }
    }
}

/// A fault for `Faulty`, and the ways of saying so in a sentence.
pub(super) const FAULTS: [(&str, Fault); 3] =
    [("EIO", Fault::Fail(5)), ("ENOSPC", Fault::Fail(28)), ("a short transfer", Fault::Short(28))];
