use super::*;

#[test]
fn the_pool_is_the_sum_of_its_terms() {
    let kind = |bytes, count| Kind { bytes, count };
    let sizes = PoolSizes {
        chunk_slots: kind(5000, 3),
        block_buffers: kind(8192, 2),
        outer_buffers: kind(100, 1),
        block_gradients: kind(16384, 2),
        outer_gradients: kind(0, 0),
    };
    assert_eq!(sizes.total_bytes(), 3 * 8192 + 2 * 8192 + 4096 + 2 * 16384);
    let ledger = Ledger::new();
    let residents =
        ResidentSizes { weights: vec![0, 5000], planes: vec![100, 0], gradients: vec![0, 5000] };
    let pool = Pool::allocate(&sizes, &residents, &ledger).expect("memory");
    let balance = |account| ledger.balances()[account].current;
    assert_eq!(balance("pool") + balance("gradients"), sizes.total_bytes() as u64 + 8192);
    assert_eq!(balance("residents"), 3 * 4096);
    assert!(pool.residents.weights[0].is_none() && pool.residents.planes[1].is_none());
    let bytes = |list: &Option<SlotList>| list.as_ref().map(SlotList::slot_bytes);
    assert_eq!(bytes(&pool.residents.weights[1]), Some(8192));
    assert_eq!(bytes(&pool.residents.planes[0]), Some(4096));
    assert_eq!(pool.chunk_slots.free_count(), 3);
    assert_eq!(pool.outer_gradients.free_count(), 0);
}
