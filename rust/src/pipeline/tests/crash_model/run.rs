//! What a run is made of, and how many are checked.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::broken::Breakage;
use crate::units::Unit;

/// What a run is made of.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) seed: u64,
    /// Optimizer steps to train.
    pub(super) steps: u64,
    pub(super) commit_every: u64,
    /// Whether each step trains only some of the records.
    pub(super) partial: bool,
    pub(super) stays: Stays,
    pub(super) policy: UpdatePolicy,
    /// In which units weights and gradients go to and fro.
    pub(super) unit: Unit,
    pub(super) breakage: Breakage,
    pub(super) ignores_flushes: bool,
}

/// What stays in RAM from step to step; of the gradients, where those that are deferred wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stays {
    Nothing,
    /// The weights of every second record, and the update planes of every second chunk.
    Half,
    All,
}

/// When updates are made that need the norm of all gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UpdatePolicy {
    /// At once: they do not.
    Immediate,
    /// By the next step.
    Deferred,
    /// At once, and taken back when the norm is too large; each third step the next one makes them.
    Speculative,
}

impl Run {
    /// Whether a step ends with a commit.
    pub(super) fn commits(&self, step: u64) -> bool {
        step.is_multiple_of(self.commit_every) || step == self.steps
    }

    /// The records that a step trains. A commit has all that changed in RAM alone.
    pub(super) fn trained(&self, records: usize, step: u64) -> Vec<usize> {
        let all = 0..records;
        let must_be_whole = self.stays != Stays::Nothing && self.commits(step);
        if !self.partial || must_be_whole {
            return all.collect();
        }
        let mut rng = fastrand::Rng::with_seed(self.seed ^ (step << 32));
        let forced = rng.usize(all.clone());
        all.filter(|record| *record == forced || rng.bool()).collect()
    }

    /// Those of them that turn out to have no gradient: what a commit needs of them is written all the same.
    pub(super) fn skipped(&self, trained: &[usize], step: u64) -> Vec<usize> {
        let mut rng = fastrand::Rng::with_seed(self.seed ^ (step << 48));
        let is_partial = self.partial;
        trained.iter().copied().filter(|_| is_partial && rng.u8(..3) == 0).collect()
    }

    /// What the gradients of a step are multiplied by.
    pub(super) fn scale(&self, step: u64) -> f32 {
        let mut rng = fastrand::Rng::with_seed(self.seed ^ (step << 16));
        if self.policy == UpdatePolicy::Immediate || rng.bool() { 1.0 } else { 0.5 }
    }

    /// Whether a step updates with its own gradients, and whether it defers them.
    pub(super) fn updates_and_defers(&self, step: u64) -> (bool, bool) {
        match self.policy {
            UpdatePolicy::Immediate => (true, false),
            UpdatePolicy::Deferred => (false, true),
            // Updates can be taken back only beside a committed state.
            UpdatePolicy::Speculative => {
                let is_behind_a_commit = (step - 1).is_multiple_of(self.commit_every);
                (is_behind_a_commit && !step.is_multiple_of(3), true)
            }
        }
    }
}

impl Default for Run {
    fn default() -> Self {
        Self {
            seed: 0,
            steps: 3,
            commit_every: 1,
            partial: false,
            stays: Stays::Nothing,
            policy: UpdatePolicy::Immediate,
            unit: Unit::Record,
            breakage: Breakage::Nothing,
            ignores_flushes: false,
        }
    }
}

/// Checks all numbers below `runs` on all cores, and stops at a failure. Not by rayon: a worker that
/// waits for another pool, as the executor makes it do, would begin the next run on the same stack.
pub(super) fn first_failure(runs: u64, check: impl Fn(u64) -> Verdict + Sync) -> Option<String> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (next, failure) = (AtomicU64::new(0), OnceLock::new());
    let work = || {
        while failure.get().is_none() {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= runs {
                return;
            }
            if let Err(error) = check(number) {
                let _ = failure.set(error);
            }
        }
    };
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    failure.into_inner()
}

/// What a run found: why it failed, in a sentence that names the seed.
pub(super) type Verdict = Result<(), String>;
