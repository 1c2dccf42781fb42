use super::*;

#[test]
fn events_beyond_the_limit_are_counted_and_dropped() {
    let recorder = Recorder::with_limit(2);
    assert_eq!(recorder.now(), None, "off unless asked for");
    recorder.begin();
    for chunk in 0..5 {
        recorder.record(Lane::Update, "update", Some(chunk), recorder.now());
    }
    let taken = recorder.take();
    assert_eq!(taken.events.iter().map(|e| e.chunk).collect::<Vec<_>>(), [Some(0), Some(1)]);
    assert_eq!(taken.dropped, 3);
    recorder.record(Lane::Update, "update", None, recorder.now());
    let taken = recorder.take();
    assert_eq!((taken.events.len(), taken.dropped), (1, 0), "there is room again");
}
