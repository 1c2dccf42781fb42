//! The sum of the squares of a gradient, in an order that no way of cutting it can change.
//!
//! The square of an f32 is exact in f64. A record's gradient is cut every [`PIECE`] parameters from its
//! start, and at the borders of its tensors. A run between two cuts is summed in [`LANES`] lanes, element
//! i in lane i mod [`LANES`], and the lanes are added in pairs, the upper half to the lower, until one is
//! left; the runs of a record are added in order. Chunks end at multiples of [`PIECE`], so they, the
//! threads and the CPU's vectors change no bit. Padding between tensors is not looked at.

use std::ops::Range;

use rayon::prelude::*;

use crate::optimizer::adamw::Kernel;
#[cfg(target_arch = "x86_64")]
use crate::optimizer::vector::{avx2, avx512};

/// Parameters between two cuts.
const PIECE: usize = 4096;
/// Sums that go on side by side.
const LANES: usize = 16;
/// Runs of one task.
const RUNS: usize = 64;

/// The sums of the runs of a record, or of one of its chunks, in order, on the current rayon pool. Each of
/// `tensors` is given by its place in `gradient`. NaN or infinity in a run if any element of it is.
///
/// # Panics
/// When a tensor lies outside the gradient.
#[must_use]
pub fn squares_of_runs(kernel: Kernel, tensors: &[Range<usize>], gradient: &[f32]) -> Vec<f64> {
    let runs: Vec<_> = tensors.iter().cloned().flat_map(runs).collect();
    runs.par_chunks(RUNS)
        .flat_map_iter(|runs| runs.iter().map(|run| squares(kernel, &gradient[run.clone()])))
        .collect()
}

fn runs(tensor: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = tensor.end;
    let pieces = tensor.start / PIECE..end.div_ceil(PIECE);
    pieces.map(move |piece| (piece * PIECE).max(tensor.start)..((piece + 1) * PIECE).min(end))
}

fn squares(kernel: Kernel, run: &[f32]) -> f64 {
    match kernel {
        Kernel::Scalar => squares_of(run),
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 => avx2::squares(run),
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512 => avx512::squares(run),
    }
}

/// The loop over one run. It is compiled once for each kernel.
#[expect(clippy::inline_always, reason = "it must be compiled for its caller's CPU features")]
#[inline(always)]
pub(super) fn squares_of(run: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    let whole = run.chunks_exact(LANES);
    let rest = whole.remainder();
    for part in whole {
        for (lane, value) in lanes.iter_mut().zip(part) {
            let value = f64::from(*value);
            *lane += value * value;
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        let value = f64::from(*value);
        *lane += value * value;
    }
    let mut width = LANES / 2;
    while width > 0 {
        let (low, high) = lanes.split_at_mut(width);
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
