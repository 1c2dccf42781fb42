use super::*;
use crate::store::layout::tests::manifest;
use crate::units::StateFormat;

#[test]
fn broken_orders_are_refused_by_operation() {
    let formats = [(StateFormat::F32, 8192), (StateFormat::Raw16, 4096)];
    let layout = Arc::new(Layout::new(&manifest(4096, &formats)).expect("valid"));
    let op = |kind, chunk| ChunkOp { kind, chunk };
    use Kind::{Apply, Defer, Load, Update};
    let good = vec![
        op(Load, 0),
        op(Load, 1),
        op(Load, 2),
        op(Load, 0),
        op(Load, 1),
        op(Update, 0),
        op(Update, 1),
    ];
    let schedule = CheckedSchedule::new(&layout, good).expect("valid");
    assert_eq!((schedule.loads(), schedule.updates()), (&[0, 1, 0][..], 2));
    let whole = |kind| [op(kind, 0), op(kind, 1)];
    let order = |kinds: &[Kind]| kinds.iter().copied().flat_map(whole).collect::<Vec<_>>();
    let schedule =
        CheckedSchedule::new(&layout, order(&[Apply, Load, Update, Defer])).expect("valid");
    assert_eq!((schedule.loads(), schedule.updates()), (&[0, 0][..], 2));
    assert_eq!((schedule.applied().len(), schedule.deferred().len()), (1, 1));
    for kinds in [[Load, Apply], [Apply, Apply], [Defer, Update], [Defer, Load], [Defer, Defer]] {
        assert!(CheckedSchedule::new(&layout, order(&kinds)).is_err(), "{kinds:?}");
    }
    let bad = [
        vec![op(Load, 0)],
        vec![op(Load, 1), op(Load, 0)],
        vec![op(Load, 7)],
        vec![op(Update, 2)],
        vec![op(Load, 0), op(Update, 1)],
        vec![op(Update, 0), op(Update, 1), op(Load, 0), op(Load, 1)],
    ];
    for operations in bad {
        assert!(CheckedSchedule::new(&layout, operations.clone()).is_err(), "{operations:?}");
    }
}
