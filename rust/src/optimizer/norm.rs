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
mod tests;
