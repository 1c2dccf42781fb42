//! Random runs, by the hundred thousand, and the protocols that they must catch.

use super::base::Base;
use super::broken::Breakage;
use super::run::{Run, Stays, UpdatePolicy, Verdict, first_failure};
use super::training::{Ending, FAULTS, Machine};
use crate::io::engine::faulty::Fault;
use crate::store::manifest::Durability;
use crate::units::Unit;

/// Runs of `cargo test`; `make soak` asks for more.
const RUNS: u64 = 2_000;
/// A broken protocol must be caught within so many runs.
const RUNS_TO_CATCH: u64 = 10_000;

fn runs() -> u64 {
    let asked = std::env::var("MEGATRAIN_SOAK_RUNS").ok();
    asked.map_or(RUNS, |text| text.parse().expect("MEGATRAIN_SOAK_RUNS is a number of runs"))
}

/// One small, one with a record of two chunks, one on two drives.
fn bases(durability: Durability) -> [Base; 3] {
    let shapes: [(&[u64], usize); 3] =
        [(&[128, 256, 128], 1), (&[128, 4096 + 128, 128], 1), (&[128, 256, 128], 2)];
    shapes.map(|(records, drives)| Base::new(records, durability, drives))
}

/// Nothing can be taken back there.
fn base_is_scratch(bases: &[Base; 3]) -> bool {
    bases[0].is_scratch
}

/// A run that follows from its seed: up to three processes, each with its end, then one that trains to
/// the last step.
fn random_run(bases: &[Base; 3], seed: u64, breakage: Breakage, lies: bool) -> Verdict {
    let mut rng = fastrand::Rng::with_seed(seed ^ 0x5eed);
    let mut run = Run {
        seed,
        steps: rng.u64(2..=6),
        commit_every: [1, 1, 2, 3][rng.usize(..4)],
        partial: rng.bool(),
        stays: [Stays::Nothing, Stays::Half, Stays::All][rng.usize(..3)],
        policy: [UpdatePolicy::Immediate, UpdatePolicy::Deferred, UpdatePolicy::Speculative]
            [rng.usize(..3)],
        unit: Unit::Record,
        breakage,
        ignores_flushes: lies,
    };
    if base_is_scratch(bases) && run.policy == UpdatePolicy::Speculative {
        run.policy = UpdatePolicy::Deferred;
    }
    // Two chunks take longer.
    let base = &bases[[1, 2, 2, 2, 0, 0, 0, 0][rng.usize(..8)]];
    if rng.u8(..3) == 0 {
        run.unit = Unit::Chunk;
    }
    let mut machine = Machine::new(base, &run);
    let mut live = || -> Verdict {
        for _ in 0..rng.u8(1..=3) {
            // A crash while opening, now and then.
            if rng.u8(..4) == 0 {
                machine.drive.plan(rng.u64(..30), Fault::PowerCut);
            }
            if !machine.open()? {
                return Ok(());
            }
            if rng.u8(..4) == 0 {
                let fault = FAULTS[rng.usize(..FAULTS.len())].1;
                machine.drive.plan(rng.u64(..120), fault);
            }
            let until = machine.drive.operations() + rng.u64(..150);
            machine.train(until)?;
            machine.drive.clear_plan();
            let endings = [Ending::Kill, Ending::PowerCut, Ending::PowerCut, Ending::Close];
            machine.end(endings[rng.usize(..endings.len())])?;
        }
        if !machine.open()? {
            return Ok(());
        }
        machine.train(u64::MAX)?;
        machine.end(Ending::PowerCut)?;
        if machine.open()? && !machine.is_done() && !lies {
            return Err("the last step is not there".into());
        }
        Ok(())
    };
    live().map_err(|error| format!("{error} (seed {seed}, {run:?})"))
}

#[test]
fn reopening_gives_the_last_acknowledged_state_or_the_next() {
    let bases = bases(Durability::Step);
    let run = |seed| random_run(&bases, seed, Breakage::Nothing, false);
    assert_eq!(first_failure(runs(), run), None);
}

#[test]
fn a_scratch_store_opens_as_it_was_closed_or_not_at_all() {
    let bases = bases(Durability::Scratch);
    let run = |seed| random_run(&bases, seed, Breakage::Nothing, false);
    assert_eq!(first_failure(runs() / 4, run), None);
}

/// A drive that says it flushed and did not: nothing can save the state, but a wrong one never passes.
#[test]
fn a_drive_that_ignores_flushes_is_found_out() {
    let bases = bases(Durability::Step);
    let run = |seed| random_run(&bases, seed, Breakage::Nothing, true);
    assert_eq!(first_failure(runs() / 4, run), None);
}

#[test]
fn every_broken_protocol_is_caught() {
    let bases = bases(Durability::Step);
    for breakage in Breakage::ALL {
        let run = |seed| random_run(&bases, seed, breakage, false);
        let caught = first_failure(RUNS_TO_CATCH, run);
        assert!(caught.is_some(), "{breakage:?} was not caught in {RUNS_TO_CATCH} runs");
    }
}
