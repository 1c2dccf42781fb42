use super::*;

#[test]
fn an_entry_counts_until_it_is_dropped_and_the_peak_is_of_the_sum() {
    let ledger = Ledger::new();
    let first = ledger.enter("pool", 10);
    drop(ledger.enter("tables", 5));
    drop(first);
    ledger.set("activations", 12);
    assert_eq!(ledger.balances()["pool"], Balance { current: 0, peak: 10 });
    assert_eq!(ledger.total(), Balance { current: 12, peak: 15 });
}
