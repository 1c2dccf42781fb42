use super::*;
use crate::io::engine::Operation;
use crate::io::file::DirectFile;
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;

fn start() -> Option<Uring> {
    match Uring::start(1) {
        Ok(engine) => Some(engine),
        Err(Error::Unsupported { reason, .. }) => {
            // In a container without io_uring there is nothing to test here.
            assert!(!reason.is_empty());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn keeps_the_rules_of_an_engine() {
    if let Some(engine) = start() {
        crate::io::engine::tests::conformance::run(&engine);
    }
}

#[test]
fn dropping_the_engine_waits_for_what_is_in_flight() {
    let Some(engine) = start() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = 32 << 20;
    let file = DirectFile::create(&folder.path().join("data"), bytes as u64).expect("a file");
    let slot = Slot::standalone(bytes, &Ledger::new(), "test").expect("memory");
    let (reply, completions) = unbounded();
    engine.submit(Request {
        operation: Operation::Write,
        file: Arc::new(file),
        offset: 0,
        slot: Some(slot),
        bytes,
        tag: 1,
        reply,
    });
    drop(engine);
    let completion = completions.try_recv().expect("completed before the drop returned");
    completion.result.expect("written in full");
}
