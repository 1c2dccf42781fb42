//! What the trainer calls, step by step.

use super::training::Machine;
use super::*;
use crate::pipeline::{After, ChunkOp, Kind, Schedule};

/// One call of the trainer.
#[derive(Clone, Debug)]
pub(super) enum Call {
    Begin {
        schedule: Arc<Schedule>,
        commits: bool,
    },
    /// Take the weights of a piece and drop them: the forward pass.
    Pass(usize),
    /// Take them for the backward pass.
    Fetch(usize),
    /// Submit the gradient of a piece, with its weights if the step updates with them.
    Train {
        piece: usize,
        updates: bool,
    },
    /// Wait for the sum of the squares of all gradients.
    Norm,
    End {
        commit: bool,
        after: After,
    },
    Settle,
}

impl Machine<'_> {
    /// Whether a step ends with a commit.
    fn commits(&self, step: u64) -> bool {
        step.is_multiple_of(self.run.commit_every) || step == self.run.steps
    }

    /// The records that a step trains. A commit has all that changed in RAM alone.
    fn trained(&self, step: u64) -> Vec<usize> {
        let all = 0..self.base.records.len();
        let must_be_whole = self.run.stays != Stays::Nothing && self.commits(step);
        if !self.run.partial || must_be_whole {
            return all.collect();
        }
        let mut rng = fastrand::Rng::with_seed(self.run.seed ^ (step << 32));
        let forced = rng.usize(all.clone());
        all.filter(|record| *record == forced || rng.bool()).collect()
    }

    /// The calls of the next step, or of what comes after the last one.
    pub(super) fn plan_calls(&mut self) {
        let next = self.process.as_ref().map(|p| p.step + 1);
        let next = next.map(|step| (self.trained(step), self.commits(step)));
        let by_chunk = self.run.by_chunk;
        let Some(process) = &mut self.process else { return };
        let layout = Arc::clone(process.store.layout());
        let pieces = |record: usize| match by_chunk {
            true => layout.records()[record].clone(),
            false => record..record + 1,
        };
        let all = 0..process.store.pieces(by_chunk).records().len();
        let applied = std::mem::take(&mut process.waiting);
        if process.step == self.run.steps && applied.is_empty() {
            process.calls.push_back(Call::Settle);
        } else if process.step == self.run.steps {
            let schedule = schedule(&process.store, by_chunk, &applied, &[], (false, false));
            process.calls.push_back(Call::Begin { schedule, commits: false });
            process.calls.extend(all.map(Call::Pass));
            process.calls.push_back(Call::End { commit: false, after: After::Stands });
        } else {
            process.step += 1;
            let (trained, commits) = next.unwrap_or_default();
            let scale = self.run.scale(process.step);
            self.memories.train(process.step, &trained, scale);
            let (updates, keeps) = self.run.updates_and_keeps(process.step);
            let schedule = schedule(&process.store, by_chunk, &applied, &trained, (updates, keeps));
            let after = match updates && scale.to_bits() == 1_f32.to_bits() {
                true => After::Stands,
                false => After::Applied(scale),
            };
            process.calls.push_back(Call::Begin { schedule, commits });
            process.calls.extend(all.map(Call::Pass));
            for record in trained.iter().rev() {
                let pieces = pieces(*record);
                process.calls.extend(pieces.clone().map(Call::Fetch));
                process.calls.extend(pieces.map(|piece| Call::Train { piece, updates }));
            }
            process.calls.push_back(Call::Norm);
            process.calls.push_back(Call::End { commit: commits, after });
            if after != After::Stands {
                process.waiting = trained;
            }
        }
    }
}

/// Forward over all records, with the updates that wait, then backward over those that are trained, which
/// updates them, keeps their gradients, or both.
pub(super) fn schedule(
    store: &Store,
    by_chunk: bool,
    applied: &[usize],
    trained: &[usize],
    (updates, keeps): (bool, bool),
) -> Arc<Schedule> {
    let chunks = |record: usize, kind| {
        store.layout().records()[record].clone().map(move |chunk| ChunkOp { kind, chunk })
    };
    let mut operations = Vec::new();
    for record in 0..store.layout().records().len() {
        let kind = if applied.contains(&record) { Kind::Apply } else { Kind::Load };
        operations.extend(chunks(record, kind));
    }
    for &record in trained.iter().rev() {
        operations.extend(chunks(record, Kind::Load));
        if updates {
            operations.extend(chunks(record, Kind::Update));
        }
        if keeps {
            operations.extend(chunks(record, Kind::Keep));
        }
    }
    Arc::new(Schedule::new(store.pieces(by_chunk), operations).expect("valid"))
}
