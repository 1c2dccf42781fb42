//! The rules that the store relies on; the same body runs over every engine of this build.

use crate::io::engine::*;
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::units::PAGE_BYTES;

fn slot(bytes: usize) -> Slot {
    Slot::standalone(bytes, &Ledger::new(), "test").expect("memory")
}

fn file(bytes: u64) -> (tempfile::TempDir, Arc<DirectFile>) {
    let directory = tempfile::tempdir().expect("a folder");
    let file = DirectFile::create(&directory.path().join("data"), bytes).expect("a file");
    (directory, Arc::new(file))
}

pub(in crate::io::engine) fn run(engine: &dyn Engine) {
    writes_come_back_as_they_went(engine);
    many_in_flight_keep_their_tags(engine);
    a_read_past_the_end_is_an_error_with_the_slot(engine);
    a_large_request_ends_once_and_where_the_file_does(engine);
    a_bad_request_is_refused_with_the_slot(engine);
    a_caller_that_left_loses_nothing(engine);
    registered_memory_holds_the_same_bytes(engine);
}

fn pattern(slot: &mut Slot, seed: usize) {
    for (index, byte) in slot.iter_mut().enumerate() {
        *byte = u8::try_from((index / 7 + seed * 31) % 251).expect("below 251");
    }
}

fn writes_come_back_as_they_went(engine: &dyn Engine) {
    // Larger than one request of any engine, and not a multiple of it.
    let bytes = 5 * (1 << 20) + 3 * PAGE_BYTES;
    let (_directory, file) = file(16 << 20);
    let mut out = slot(bytes);
    pattern(&mut out, 1);
    let (out, result) = perform(engine, Operation::Write, &file, 8192, Some(out));
    result.expect("written");
    perform(engine, Operation::Sync, &file, 0, None).1.expect("flushed");
    let (back, result) = perform(engine, Operation::Read, &file, 8192, Some(slot(bytes)));
    result.expect("read");
    assert!(out.expect("the slot")[..] == back.expect("the slot")[..]);
    let (_, result) = perform(engine, Operation::WriteDurable, &file, 0, Some(slot(PAGE_BYTES)));
    result.expect("written through");
    let (read, written) = engine.counters().totals();
    assert!(read >= bytes as u64 && written >= (bytes + PAGE_BYTES) as u64);
}

fn many_in_flight_keep_their_tags(engine: &dyn Engine) {
    let (_directory, file) = file(4 << 20);
    let (reply, completions) = unbounded();
    let count = 300;
    for tag in 0..count {
        let mut out = slot(2 * PAGE_BYTES);
        pattern(&mut out, tag);
        engine.submit(Request {
            operation: Operation::Write,
            file: Arc::clone(&file),
            offset: (tag * 2 * PAGE_BYTES) as u64,
            bytes: out.len(),
            slot: Some(out),
            tag: tag as u64,
            reply: reply.clone(),
        });
    }
    let mut seen = vec![false; count];
    for completion in completions.iter().take(count) {
        completion.result.expect("written");
        let tag = crate::units::to_usize(completion.tag);
        let mut expected = slot(2 * PAGE_BYTES);
        pattern(&mut expected, tag);
        assert!(
            completion.slot.expect("the slot")[..] == expected[..],
            "the slot of another request"
        );
        assert!(!std::mem::replace(&mut seen[tag], true), "completed twice");
    }
    assert!(seen.into_iter().all(|s| s));
}

fn a_read_past_the_end_is_an_error_with_the_slot(engine: &dyn Engine) {
    let (_directory, file) = file(2 * PAGE_BYTES as u64);
    let (back, result) =
        perform(engine, Operation::Read, &file, PAGE_BYTES as u64, Some(slot(4 * PAGE_BYTES)));
    assert!(
        matches!(result, Err(Error::Truncated { end, .. }) if end == 2 * PAGE_BYTES as u64),
        "{result:?}"
    );
    assert!(back.is_some());
}

fn a_large_request_ends_once_and_where_the_file_does(engine: &dyn Engine) {
    // More pieces than any engine has in flight, of which the last ones lie behind the end.
    let (end, bytes) = (5 * (1 << 20) + 2 * PAGE_BYTES, 48 << 20);
    let (_directory, file) = file(end as u64);
    let (reply, completions) = unbounded();
    for tag in 0..3 {
        engine.submit(Request {
            operation: Operation::Read,
            file: Arc::clone(&file),
            offset: 0,
            // Longer than the transfer: the whole slot must come back.
            slot: Some(slot(bytes + PAGE_BYTES)),
            bytes,
            tag,
            reply: reply.clone(),
        });
    }
    drop(reply);
    let mut tags = Vec::new();
    // Until no request holds the channel any more.
    for completion in completions {
        let at = end as u64;
        let result = completion.result;
        assert!(matches!(result, Err(Error::Truncated { end, .. }) if end == at), "{result:?}");
        assert_eq!(completion.slot.map(|slot| slot.len()), Some(bytes + PAGE_BYTES));
        tags.push(completion.tag);
    }
    tags.sort_unstable();
    assert_eq!(tags, [0, 1, 2]);
}

fn a_bad_request_is_refused_with_the_slot(engine: &dyn Engine) {
    let (_directory, file) = file(2 * PAGE_BYTES as u64);
    let (back, result) = perform(engine, Operation::Read, &file, 17, Some(slot(PAGE_BYTES)));
    assert!(matches!(result, Err(Error::Invalid { .. })));
    assert!(back.is_some());
}

fn a_caller_that_left_loses_nothing(engine: &dyn Engine) {
    let (_directory, file) = file(1 << 20);
    let (_, lists) = crate::memory::slot::SlotList::cut(&[(PAGE_BYTES, 1)], &Ledger::new(), "test")
        .map_or_else(|error| panic!("{error}"), |(region, mut lists)| (region, lists.remove(0)));
    let (reply, completions) = unbounded();
    drop(completions);
    engine.submit(Request {
        operation: Operation::Read,
        file,
        offset: 0,
        slot: lists.try_take(),
        bytes: PAGE_BYTES,
        tag: 0,
        reply,
    });
    let again = lists.take(std::time::Duration::from_secs(20));
    assert!(again.is_some(), "the slot returned to its list");
}

fn registered_memory_holds_the_same_bytes(engine: &dyn Engine) {
    let (_directory, file) = file(4 << 20);
    let (region, mut lists) =
        crate::memory::slot::SlotList::cut(&[(1 << 20, 2)], &Ledger::new(), "test")
            .expect("memory");
    // A refusal (RLIMIT_MEMLOCK) is allowed: the operations must work all the same.
    let _ = engine.register(&region);
    let list = lists.remove(0);
    let mut out = list.try_take().expect("free");
    pattern(&mut out, 5);
    let (out, result) = perform(engine, Operation::Write, &file, 0, Some(out));
    result.expect("written");
    let (back, result) = perform(engine, Operation::Read, &file, 0, list.try_take());
    result.expect("read");
    assert!(out.expect("the slot")[..] == back.expect("the slot")[..]);
}
