//! The sum of the squares of a gradient, in an order that no way of cutting it can change.
//!
//! The square of an f32 is exact in f64. A record's gradient is cut every [`PIECE`] parameters from its
//! start, and at the borders of its tensors. A run between two cuts is summed in 16 lanes, element
//! i in lane i mod 16, and the lanes are added in pairs, the upper half to the lower, until one is
//! left; the runs of a record are added in order. Chunks end at multiples of [`PIECE`], so they, the
//! threads and the CPU's vectors change no bit. Padding between tensors is not looked at.

use std::ops::Range;

use rayon::prelude::*;

use crate::optimizer::kernel::Kernel;

/// Parameters between two cuts.
const PIECE: usize = 4096;
/// Runs of one task.
const RUNS: usize = 64;

/// The sums of the runs of a record, or of one of its chunks, in order, on the current rayon pool. Each of
/// `tensors` is given by its place in `gradient`. NaN or infinity in a run if any element of it is.
///
/// # Panics
/// When a tensor lies outside the gradient.
#[must_use]
pub(crate) fn squares_of_runs(
    kernel: Kernel,
    tensors: &[Range<usize>],
    gradient: &[f32],
) -> Vec<f64> {
    let runs: Vec<_> = tensors.iter().cloned().flat_map(runs).collect();
    runs.par_chunks(RUNS)
        .flat_map_iter(|runs| runs.iter().map(|run| kernel.squares(&gradient[run.clone()])))
        .collect()
}

fn runs(tensor: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = tensor.end;
    let pieces = tensor.start / PIECE..end.div_ceil(PIECE);
    pieces.map(move |piece| (piece * PIECE).max(tensor.start)..((piece + 1) * PIECE).min(end))
}

#[cfg(test)]
mod tests;
