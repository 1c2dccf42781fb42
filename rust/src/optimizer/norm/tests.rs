use super::*;
use crate::optimizer::scalar::LANES;

fn sum_of_squares(kernel: Kernel, tensors: &[Range<usize>], gradient: &[f32]) -> f64 {
    squares_of_runs(kernel, tensors, gradient).iter().sum()
}

fn values(count: usize) -> Vec<f32> {
    let mut rng = fastrand::Rng::with_seed(7);
    (0..count).map(|_| (rng.f32() - 0.5) * 10f32.powi(rng.i32(-6..6))).collect()
}

#[test]
fn the_order_is_the_written_one_on_every_kernel_and_any_number_of_threads() {
    let gradient = values(5 * PIECE + 300);
    let tensors = [0..PIECE + 5, PIECE + 128..3 * PIECE, 3 * PIECE..5 * PIECE + 300];
    // The rule, once more, as plainly as it can be said.
    let mut expected = 0.0;
    for tensor in &tensors {
        let mut start = tensor.start;
        while start < tensor.end {
            let stop = ((start / PIECE + 1) * PIECE).min(tensor.end);
            let mut lanes = vec![0.0_f64; LANES];
            for index in start..stop {
                lanes[(index - start) % LANES] += f64::from(gradient[index]).powi(2);
            }
            while lanes.len() > 1 {
                let upper = lanes.split_off(lanes.len() / 2);
                for (lane, other) in lanes.iter_mut().zip(upper) {
                    *lane += other;
                }
            }
            expected += lanes[0];
            start = stop;
        }
    }
    for kernel in Kernel::available() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let pool = pool.expect("threads");
            let sum = pool.install(|| sum_of_squares(kernel, &tensors, &gradient));
            assert_eq!(sum.to_bits(), expected.to_bits(), "{kernel}, {threads} threads");
        }
    }
}

#[test]
fn padding_is_not_looked_at_and_what_is_not_finite_shows() {
    let mut gradient = vec![1.0; 300];
    gradient[200..256].fill(f32::NAN);
    let tensors = [0..200, 256..300];
    assert!((sum_of_squares(Kernel::detect(), &tensors, &gradient) - 244.0).abs() < 1e-12);
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        gradient[299] = value;
        assert!(!sum_of_squares(Kernel::detect(), &tensors, &gradient).is_finite());
    }
    // The square of the largest f32 is far from the end of f64.
    gradient[299] = f32::MAX;
    assert!(sum_of_squares(Kernel::detect(), &tensors, &gradient).is_finite());
}
