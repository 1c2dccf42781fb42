use super::*;
use crate::memory::ledger::Ledger;

const BYTES: usize = 4 * HUGE_PAGE_BYTES;

fn bytes_of(run: &Allocation) -> usize {
    run.lock().as_ref().map_or(0, |slot| slot.len())
}

fn arena() -> Arc<Arena> {
    Arena::over(Slot::standalone(BYTES, &Ledger::new(), "tensors").expect("memory"))
}

#[test]
fn runs_do_not_overlap_and_join_again_in_any_order() {
    let mut rng = fastrand::Rng::with_seed(7);
    let arena = arena();
    let mut lent: Vec<Arc<Allocation>> = Vec::new();
    for _ in 0..500 {
        if rng.bool() {
            lent.extend(arena.allocate(rng.usize(1..HUGE_PAGE_BYTES + 100_000)));
        } else if !lent.is_empty() {
            drop(lent.swap_remove(rng.usize(..lent.len())));
        }
        let mut places: Vec<_> = lent.iter().map(|run| (run.place, bytes_of(run))).collect();
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        let sum: usize = places.iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(arena.free_bytes().0 + sum, BYTES);
    }
    drop(lent);
    assert_eq!(arena.free_bytes(), (BYTES, BYTES));
}

#[test]
fn what_does_not_fit_is_refused_and_what_fits_is_found_by_its_address() {
    let arena = arena();
    assert!(arena.allocate(BYTES + 1).is_none() && arena.allocate(usize::MAX).is_none());
    let whole = arena.allocate(BYTES).expect("all of it");
    assert!(arena.allocate(1).is_none());
    let address = whole.address().expect("at rest").addr();
    assert!(Arc::ptr_eq(&arena.at(address).expect("found"), &whole));
    assert!(arena.at(address + 1).is_none() && arena.at(16).is_none());
    drop(whole);
    assert!(arena.at(address).is_none());
}

#[test]
fn memory_outlives_the_arena_and_a_slot_that_is_away_is_not_lent_again() {
    let ledger = Ledger::new();
    let arena = Arena::over(Slot::standalone(PAGE_BYTES, &ledger, "tensors").expect("memory"));
    let run = arena.allocate(1).expect("free");
    let slot = run.take().expect("at rest");
    assert!(run.address().is_none() && run.take().is_none());
    drop(run);
    assert!(arena.allocate(1).is_none(), "the engine still has it");
    drop(arena);
    assert_eq!(ledger.total().current, PAGE_BYTES as u64);
    drop(slot);
    assert_eq!(ledger.total().current, 0);
}
