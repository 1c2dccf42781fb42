//! Every fault point of a training of three steps, one after another.

use super::base::Base;
use super::run::{Run, Stays, UpdatePolicy, Verdict, first_failure};
use super::training::{Ending, FAULTS, Machine};
use crate::io::engine::faulty::Fault;
use crate::store::manifest::Durability;
use crate::units::Unit;

/// Ways in which sectors can survive that are tried at each point.
const POWER_CUTS: u64 = 6;

/// Trainings: each step committed; one commit for all; records touched for the first time in the
/// middle of a window; all or half of the state in RAM; updates that wait for the norm, or are taken back;
/// by chunk.
fn trainings() -> Vec<Run> {
    let run = |commit_every, partial, stays| Run {
        commit_every,
        partial,
        stays,
        seed: 3,
        ..Run::default()
    };
    let policy = |policy, run: Run| Run { policy, ..run };
    let of_chunks = |run: Run| Run { unit: Unit::Chunk, ..run };
    vec![
        policy(UpdatePolicy::Deferred, run(1, false, Stays::Nothing)),
        policy(UpdatePolicy::Deferred, run(2, true, Stays::Half)),
        policy(UpdatePolicy::Speculative, run(1, false, Stays::Nothing)),
        policy(UpdatePolicy::Speculative, run(1, true, Stays::All)),
        policy(UpdatePolicy::Speculative, run(2, false, Stays::Half)),
        of_chunks(policy(UpdatePolicy::Deferred, run(2, true, Stays::Half))),
        of_chunks(policy(UpdatePolicy::Speculative, run(1, false, Stays::Nothing))),
        of_chunks(run(2, true, Stays::Half)),
        run(1, false, Stays::Nothing),
        run(3, false, Stays::Nothing),
        run(3, true, Stays::Nothing),
        run(2, true, Stays::Nothing),
        run(1, false, Stays::Half),
        run(2, true, Stays::Half),
        run(3, false, Stays::All),
    ]
}

/// Operations of the undisturbed training, opening included.
fn operations(base: &Base, run: &Run) -> u64 {
    let mut machine = Machine::new(base, run);
    machine.open().expect("opened");
    machine.train(u64::MAX).expect("trained");
    assert!(machine.is_done());
    machine.end(Ending::Close).expect("closed");
    machine.drive.operations()
}

/// Goes on after whatever happened and ends with the bits of the undisturbed training.
fn recover(machine: &mut Machine<'_>) -> Verdict {
    for _ in 0..2 {
        machine.open()?;
        machine.train(u64::MAX)?;
        machine.end(Ending::Close)?;
    }
    if machine.is_done() { Ok(()) } else { Err("the training did not come to its end".into()) }
}

fn each_point(check: impl Fn(&Base, &Run, u64) -> Verdict + Sync) {
    for drives in [1, 2] {
        let base = Base::new(&[128, 4096 + 128, 128], Durability::Step, drives);
        // Gradients that wait know nothing of drives but their number: random runs have two, too.
        for run in trainings()
            .into_iter()
            .filter(|run| drives == 1 || run.policy == UpdatePolicy::Immediate)
        {
            let points = operations(&base, &run);
            assert!(
                points > if run.stays == Stays::All { 20 } else { 60 },
                "{points} operations are too few to be a training"
            );
            let at = |point| {
                check(&base, &run, point)
                    .map_err(|e| format!("operation {point} of {run:?}, {drives} drives: {e}"))
            };
            assert_eq!(first_failure(points, at), None);
        }
    }
}

#[test]
fn a_power_cut_at_any_operation_loses_at_most_the_open_window() {
    each_point(|base, run, point| {
        (0..POWER_CUTS).try_for_each(|salt| {
            let mut machine =
                Machine::new(base, &Run { seed: run.seed + (salt << 20), ..run.clone() });
            machine.drive.plan(point, Fault::PowerCut);
            machine.open()?;
            machine.train(u64::MAX)?;
            machine.end(Ending::PowerCut)?;
            recover(&mut machine)
        })
    });
}

#[test]
fn a_kill_at_any_operation_loses_at_most_the_open_window() {
    each_point(|base, run, point| {
        let mut machine = Machine::new(base, run);
        machine.open()?;
        machine.train(point)?;
        machine.end(Ending::Kill)?;
        recover(&mut machine)
    });
}

#[test]
fn a_fault_at_any_operation_is_retried_or_costs_the_open_window() {
    for (name, fault) in FAULTS {
        each_point(|base, run, point| {
            let mut machine = Machine::new(base, run);
            machine.drive.plan(point, fault);
            // An open that fails leaves the file as it was: the next one succeeds.
            if machine.open().is_ok() {
                machine.train(u64::MAX).map_err(|e| format!("{name}: {e}"))?;
                machine.end(Ending::Kill)?;
            }
            recover(&mut machine).map_err(|e| format!("{name}: {e}"))
        });
    }
}

#[test]
fn an_operation_that_fails_twice_costs_the_open_window() {
    each_point(|base, run, point| {
        let mut machine = Machine::new(base, run);
        for again in 0..4 {
            machine.drive.plan(point + again, Fault::Fail(5));
        }
        if machine.open().is_ok() {
            machine.train(u64::MAX)?;
            machine.end(Ending::Kill)?;
        }
        recover(&mut machine)
    });
}
