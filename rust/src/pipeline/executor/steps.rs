//! The steps that are not durable yet, oldest first: what each still lacks, and what becomes of the
//! gradients that it deferred.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::optimizer::hyperparameters::Hyperparameters;
use crate::pipeline::command::After;
use crate::pipeline::schedule::{self, CheckedSchedule};
use crate::store::layout::Layout;

pub(super) struct Step {
    number: u64,
    hyperparameters: Hyperparameters,
    /// What its gradients are multiplied by before anything else: 1, or less where they were clipped.
    gradient_scale: f32,
    updates_left: usize,
    /// Units whose gradient has not been submitted.
    expected: BTreeSet<usize>,
    /// Units that turned out to have none: their updates change nothing.
    skipped: BTreeSet<usize>,
    schedule: Arc<CheckedSchedule>,
    finished: bool,
    /// Whether it is to be committed: then what stays in RAM is written, too.
    commits: bool,
    commit: Option<Vec<u8>>,
    deferred: Deferred,
}

/// What becomes of the gradients that a step defers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deferred {
    /// There are none, or they are not needed.
    Nothing,
    /// They wait for a step that applies them.
    Waiting,
    /// They are being applied.
    Applied,
}

impl Step {
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn hyperparameters(&self) -> &Hyperparameters {
        &self.hyperparameters
    }

    pub(super) fn gradient_scale(&self) -> f32 {
        self.gradient_scale
    }

    pub(super) fn commits(&self) -> bool {
        self.commits
    }
}

/// What a step does with a gradient that it gets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected {
    pub(super) step: u64,
    pub(super) updates: bool,
    pub(super) defers: bool,
}

#[derive(Default)]
pub(super) struct Steps {
    queue: VecDeque<Step>,
    /// The step whose updates are to be taken back, once all are written: they were speculative, and the norm was too
    /// large.
    taken_back: Option<u64>,
}

impl Steps {
    pub(super) fn begin(
        &mut self,
        number: u64,
        schedule: Arc<CheckedSchedule>,
        hyperparameters: Hyperparameters,
        commits: bool,
    ) {
        self.queue.push_back(Step {
            number,
            hyperparameters,
            gradient_scale: 1.0,
            updates_left: schedule.updates(),
            expected: schedule.updated().union(schedule.deferred()).copied().collect(),
            skipped: BTreeSet::new(),
            schedule,
            finished: false,
            commits,
            commit: None,
            deferred: Deferred::Nothing,
        });
    }

    /// The next step applies what the last one has deferred; that one is returned.
    pub(super) fn apply_deferred(&mut self) -> Result<&Step> {
        // Only the last step can have deferred gradients: what is applied now is its update.
        let waiting = self.queue.back_mut().filter(|step| step.deferred == Deferred::Waiting);
        let step = waiting.ok_or_else(|| Error::invalid("no gradients were deferred"))?;
        step.deferred = Deferred::Applied;
        Ok(step)
    }

    /// Takes note of a unit's gradient; `None` where the pending step does not, or no longer, expect it.
    pub(super) fn submitted(&mut self, unit: usize) -> Option<Expected> {
        let step = self.queue.back_mut().filter(|step| !step.finished)?;
        step.expected.remove(&unit).then(|| Expected {
            step: step.number,
            updates: step.schedule.updated().contains(&unit),
            defers: step.schedule.deferred().contains(&unit),
        })
    }

    /// Takes note that a unit got no gradient; `None` likewise.
    pub(super) fn skipped(&mut self, unit: usize) -> Option<Expected> {
        let expected = self.submitted(unit)?;
        if let Some(step) = self.queue.back_mut() {
            step.skipped.insert(unit);
        }
        Some(expected)
    }

    /// Whether the update of a unit by a step changes nothing, as it got no gradient.
    pub(super) fn skips(&self, number: u64, unit: usize) -> bool {
        self.queue.iter().any(|step| step.number == number && step.skipped.contains(&unit))
    }

    /// Ends the pending step; `true` when the updates that it has made are to be taken back.
    pub(super) fn end(
        &mut self,
        units: &Layout,
        commit: Option<Vec<u8>>,
        after: After,
    ) -> Result<bool> {
        let Some(step) = self.queue.back_mut() else { return Ok(false) };
        if let Some(unit) = step.expected.iter().min() {
            let name = units.unit_name(*unit);
            let error = format!("the step ended without the gradient of {name}");
            return Err(Error::invalid(error));
        }
        step.finished = true;
        step.commit = commit;
        let After::Applied(scale) = after else { return Ok(false) };
        step.gradient_scale = scale;
        step.deferred = Deferred::Waiting;
        if step.schedule.updated().is_empty() {
            step.updates_left = schedule::chunks(units, step.schedule.deferred());
            return Ok(false);
        }
        // The caller may go on at once: what it begins waits for `take_back`.
        self.taken_back = Some(step.number);
        Ok(true)
    }

    /// Whether a step's updates are still to be taken back: what comes after must not read yet.
    pub(super) fn is_taking_back(&self) -> bool {
        self.taken_back.is_some()
    }

    /// Whether an update may get its memory: while updates are taken back only those that are.
    pub(super) fn may_update(&self, step: u64, applies: bool) -> bool {
        self.taken_back.is_none_or(|back| !applies && back == step)
    }

    /// Lets a step whose updates are all written go back to the state before; `false` while there is none.
    pub(super) fn take_back(&mut self, units: &Layout) -> bool {
        let Some(number) = self.taken_back else { return false };
        let front = self.queue.front_mut().filter(|step| step.number == number);
        let Some(step) = front.filter(|step| step.updates_left == 0) else { return false };
        step.updates_left = schedule::chunks(units, step.schedule.deferred());
        self.taken_back = None;
        true
    }

    /// The oldest step that is not durable: the only one whose updates may be written.
    pub(super) fn open(&self) -> Option<&Step> {
        self.queue.front()
    }

    /// The newest step; 0 where none is.
    pub(super) fn last(&self) -> u64 {
        self.queue.back().map_or(0, |step| step.number)
    }

    /// The step that was begun and is not finished.
    pub(super) fn pending(&self) -> Option<u64> {
        Some(self.queue.back().filter(|step| !step.finished)?.number)
    }

    /// Whether a step is to be committed.
    pub(super) fn commits(&self, number: u64) -> bool {
        self.queue.iter().any(|step| step.number == number && step.commits)
    }

    /// Whether the oldest step is finished and is to be written whatever comes after it: one whose gradients
    /// wait for a step that applies them is not waited for.
    pub(super) fn must_go_on(&self) -> bool {
        self.open().is_some_and(|step| step.finished && step.deferred != Deferred::Waiting)
    }

    /// Whether the oldest step's deferred gradients are being applied.
    pub(super) fn is_being_applied(&self) -> bool {
        self.open().is_some_and(|step| step.deferred == Deferred::Applied)
    }

    /// An update of a step has been written, or is in RAM to stay.
    pub(super) fn updated(&mut self, number: u64) {
        if let Some(step) = self.queue.iter_mut().find(|step| step.number == number) {
            step.updates_left -= 1;
        }
    }

    /// The oldest step's blob, if it has one, once it is finished and all its updates are written.
    pub(super) fn take_written(&mut self) -> Option<Option<Vec<u8>>> {
        let taken_back = self.taken_back;
        let is_written = |step: &&mut Step| {
            step.finished && step.updates_left == 0 && taken_back != Some(step.number)
        };
        Some(self.queue.front_mut().filter(is_written)?.commit.take())
    }

    /// The oldest step is durable, or as far as it will be.
    pub(super) fn pop(&mut self) {
        self.queue.pop_front();
    }

    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.taken_back = None;
    }
}
