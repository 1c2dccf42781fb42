use super::*;

#[test]
fn each_slice_of_a_wait_is_recorded_for_its_cause() {
    let shared = Shared::default();
    shared.events.begin();
    let mut wait = Wait::new(&shared);
    for cause in [Cause::Read, Cause::Read, Cause::Update] {
        wait.for_cause(cause);
    }
    drop(wait);
    drop(Wait::new(&shared));
    let events = shared.events.take().events;
    let names: Vec<_> = events.iter().map(|event| event.name).collect();
    assert_eq!(names, ["read", "update"]);
    assert!(events[0].start <= events[0].end && events[0].end <= events[1].start);
    let counted = Cause::ALL.map(|cause| shared.timings.stalled(cause) > 0);
    assert_eq!(counted, [true, false, false, true, false]);
}
