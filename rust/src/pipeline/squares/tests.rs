use super::*;
use crate::store::layout::tests::manifest;
use crate::units::StateFormat;

/// Numbers whose sum shows any other order.
fn runs(chunk: usize) -> Vec<f64> {
    let mut rng = fastrand::Rng::with_seed(chunk as u64);
    (0..5).map(|_| rng.f64() * 10f64.powi(rng.i32(-8..8))).collect()
}

#[test]
fn whatever_order_gradients_come_in_their_squares_are_added_in_one() {
    // Chunks 0 to 2, 3, 4 and 5.
    let formats = [3 * 4096, 4096, 2 * 4096].map(|n| (StateFormat::F32, n));
    let layout = Layout::new(&manifest(4096, &formats)).expect("valid");
    let of = |chunks: Range<usize>| chunks.flat_map(runs).sum::<f64>();
    for last in [4..6, 4..5] {
        let expected = of(0..3) + of(3..4) + of(last.clone());
        for order in [[0, 1, 2, 3, 4, 5], [5, 2, 4, 0, 3, 1]] {
            let mut squares = Squares::default();
            for chunk in order.into_iter().filter(|chunk| *chunk < last.end) {
                squares.add(&layout, chunk..chunk + 1, runs(chunk));
            }
            assert_eq!(squares.units, last.end);
            assert_eq!(squares.sum().to_bits(), expected.to_bits(), "{order:?}");
        }
        let mut whole = Squares::default();
        for chunks in [last.clone(), 0..3, 3..4] {
            whole.add(&layout, chunks.clone(), chunks.flat_map(runs).collect());
        }
        assert_eq!((whole.units, whole.sum().to_bits()), (3, expected.to_bits()));
    }
}
