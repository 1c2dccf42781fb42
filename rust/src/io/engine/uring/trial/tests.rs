use std::sync::Mutex;

use super::*;
use crate::io::engine::Counters;
use crate::io::engine::threads::Threads;
use crate::memory::slot::Region;

/// Fails in one way, at the operation of one kind; performs the others.
#[derive(Debug)]
struct Broken {
    how: How,
    at: Operation,
    works: Threads,
    kept: Mutex<Vec<Request>>,
}

#[derive(Debug)]
enum How {
    Refuses,
    NeverEnds,
    MovesNothing,
}

impl Engine for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn submit(&self, request: Request) {
        match self.how {
            _ if request.operation != self.at => self.works.submit(request),
            How::Refuses => request.fail(rustix::io::Errno::PERM),
            How::NeverEnds => self.kept.lock().expect("not poisoned").push(request),
            How::MovesNothing => request.complete(Ok(())),
        }
    }

    fn register(&self, _region: &Arc<Region>) -> Result<(), String> {
        Ok(())
    }

    fn unregister(&self) {}

    fn counters(&self) -> &Counters {
        self.works.counters()
    }
}

fn outcome(how: How, at: Operation) -> Failure {
    let works = Threads::start(1).expect("threads");
    let broken = Broken { how, at, works, kept: Mutex::new(Vec::new()) };
    run(&broken, Duration::from_millis(50)).expect_err("it is broken")
}

#[test]
fn an_engine_that_works_passes() {
    run(&Threads::start(1).expect("threads"), PATIENCE).expect("nothing is wrong");
}

#[test]
fn operations_that_are_refused_are_the_reason() {
    for at in [Operation::Write, Operation::Sync, Operation::Read] {
        let failure = outcome(How::Refuses, at);
        assert!(failure.reason.contains("not permitted") && !failure.is_stuck, "{failure:?}");
    }
}

#[test]
fn an_operation_that_never_ends_is_not_waited_for() {
    let failure = outcome(How::NeverEnds, Operation::Read);
    assert!(failure.reason.contains("did not end in") && failure.is_stuck, "{failure:?}");
}

#[test]
fn a_success_that_moved_nothing_is_none() {
    for (at, words) in [(Operation::Write, "wrote other"), (Operation::Read, "read other")] {
        let failure = outcome(How::MovesNothing, at);
        assert!(failure.reason.contains(words), "{failure:?}");
    }
}
