use super::*;

fn list(count: usize) -> SlotList {
    SlotList::cut(&[(2 * PAGE_BYTES, count)], &Ledger::new(), "pool").expect("memory").1.remove(0)
}

#[test]
fn a_slot_returns_when_its_last_part_is_dropped() {
    let list = list(1);
    let slot = list.try_take().expect("one is free");
    assert!(list.try_take().is_none());
    let (front, back) = slot.split_at(PAGE_BYTES);
    drop(front);
    assert_eq!(list.free_count(), 0, "a part is still out");
    drop(back);
    assert_eq!(list.free_count(), 1);
}

#[test]
fn parts_are_disjoint_and_join_to_the_whole() {
    let (mut front, mut back) = list(1).try_take().expect("free").split_at(PAGE_BYTES);
    front.fill(1);
    back.fill(2);
    let whole = front.join(back);
    assert_eq!(whole.len(), 2 * PAGE_BYTES);
    assert!(
        whole[..PAGE_BYTES].iter().all(|b| *b == 1) && whole[PAGE_BYTES..].iter().all(|b| *b == 2)
    );
}

#[test]
#[should_panic(expected = "only neighbours")]
fn strangers_cannot_be_joined() {
    let list = list(2);
    let (a, b) = (list.try_take().expect("free"), list.try_take().expect("free"));
    let _ = a.join(b);
}

#[test]
fn populating_keeps_the_bytes_and_gives_huge_pages_where_the_kernel_has_them() {
    let bytes = 4 * HUGE_PAGE_BYTES;
    let (region, mut lists) = SlotList::cut(&[(bytes, 1)], &Ledger::new(), "pool").expect("memory");
    let mut slot = lists.remove(0).try_take().expect("free");
    slot.fill(7);
    let found = region.populate().expect("the kernel says");
    assert_eq!(found.bytes, bytes as u64);
    assert_eq!(region.huge_pages(), Some(found));
    let allowed = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    if allowed.is_ok_and(|choices| !choices.contains("[never]")) {
        assert!(found.is_enough(), "{found:?}");
    }
    assert!(slot.iter().all(|byte| *byte == 7));
}

#[test]
fn slots_keep_the_region_alive_and_the_ledger_knows() {
    let ledger = Ledger::new();
    let (region, mut lists) =
        SlotList::cut(&[(HUGE_PAGE_BYTES, 2)], &ledger, "pool").expect("memory");
    let slot = lists.remove(0).try_take().expect("free");
    assert!(region.address().align_offset(HUGE_PAGE_BYTES) == 0);
    drop((region, lists));
    assert_eq!(ledger.total().current, 2 * HUGE_PAGE_BYTES as u64);
    drop(slot);
    assert_eq!(ledger.total().current, 0);
}
