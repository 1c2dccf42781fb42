//! What the trainer does next.

use std::sync::Arc;

use super::calls::{Call, schedule};
use super::memories::Memories;
use super::process::Process;
use super::run::Run;
use crate::pipeline::After;
use crate::units::Unit;

/// The calls of the next step, or of what comes after the last one.
pub(super) fn plan_calls(run: &Run, process: &mut Process, memories: &mut Memories) {
    let kind = run.unit;
    let layout = Arc::clone(process.store.layout());
    let units = |record: usize| match kind {
        Unit::Chunk => layout.records()[record].clone(),
        Unit::Record => record..record + 1,
    };
    let all = 0..process.store.units(kind).records().len();
    let applied = std::mem::take(&mut process.waiting);
    if process.step == run.steps && applied.is_empty() {
        process.calls.push_back(Call::WaitDurable);
    } else if process.step == run.steps {
        let schedule = schedule(&process.store, kind, &applied, &[], (false, false));
        process.calls.push_back(Call::Begin { schedule, commits: false });
        process.calls.extend(all.map(Call::Pass));
        process.calls.push_back(Call::End { commit: false, after: After::Stands });
    } else {
        process.step += 1;
        let records = layout.records().len();
        let (trained, commits) = (run.trained(records, process.step), run.commits(process.step));
        let scale = run.scale(process.step);
        let skipped = run.skipped(&trained, process.step);
        let has_gradient = |record: &usize| !skipped.contains(record);
        let with_gradient: Vec<_> = trained.iter().copied().filter(has_gradient).collect();
        memories.train(process.step, &with_gradient, scale);
        let (updates, defers) = run.updates_and_defers(process.step);
        let schedule = schedule(&process.store, kind, &applied, &trained, (updates, defers));
        let after = match updates && scale.to_bits() == 1_f32.to_bits() {
            true => After::Stands,
            false => After::Applied(scale),
        };
        process.calls.push_back(Call::Begin { schedule, commits });
        process.calls.extend(all.map(Call::Pass));
        for record in trained.iter().rev() {
            let units = units(*record);
            process.calls.extend(units.clone().map(Call::Fetch));
            if skipped.contains(record) {
                process.calls.extend(units.map(|unit| Call::Skip { unit, updates }));
            } else {
                process.calls.extend(units.map(|unit| Call::Train { unit, updates }));
            }
        }
        process.calls.push_back(Call::Norm);
        process.calls.push_back(Call::End { commit: commits, after });
        if after != After::Stands {
            process.waiting = trained;
        }
    }
}
