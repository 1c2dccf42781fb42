use super::*;

#[test]
fn the_pool_is_the_sum_of_its_terms() {
    let kind = |bytes, count| Kind { bytes, count };
    let sizes = PoolSizes {
        chunk_slots: kind(5000, 3),
        weights: vec![BufferKind::of_all(8192, 2), BufferKind::of_all(100, 1)],
        outgoing: kind(4096, 1),
        gradients: vec![BufferKind::of_all(16384, 2), BufferKind::of_all(0, 0)],
    };
    assert_eq!(sizes.total_bytes(), 3 * 8192 + 2 * 8192 + 2 * 4096 + 2 * 16384);
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
    let free = |lists: &[SlotList]| lists.iter().map(SlotList::free_count).collect::<Vec<_>>();
    assert_eq!((free(&pool.weights), free(&pool.gradients)), (vec![2, 1], vec![2, 0]));
    assert_eq!(pool.outgoing.free_count(), 1);
}

#[test]
fn a_record_gets_a_buffer_of_the_first_kind_of_its_format_that_holds_it() {
    let kind = |format, bytes, count| BufferKind { format, slots: Kind { bytes, count } };
    let (bf16, f32) = (Some(StateFormat::Bf16), Some(StateFormat::F32));
    let kinds = [kind(bf16, 100, 2), kind(bf16, 400, 1), kind(f32, 50, 2), kind(f32, 400, 0)];
    let found = |format, bytes| kind_for(&kinds, format, bytes);
    assert_eq!(found(StateFormat::Bf16, 100), Some(0));
    assert_eq!(found(StateFormat::Bf16, 101), Some(1));
    assert_eq!(found(StateFormat::F32, 50), Some(2));
    assert_eq!(found(StateFormat::F32, 51), None, "there is none of that kind");
    assert_eq!(found(StateFormat::Raw16, 1), None);
    assert_eq!(kind_for(&[kind(None, 100, 1)], StateFormat::Raw16, 100), Some(0));
}
