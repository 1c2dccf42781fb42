//! AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"), to the bit what
//! `torch.optim.AdamW(fused=True)` computes on an x86-64 CPU.
//!
//! Source of the formula: PyTorch 2.13, `aten/src/ATen/native/cpu/FusedAdamKernel.cpp` in its AVX2
//! build (PyTorch has no AVX-512 build of it), with the multiplications and additions fused where
//! its compiler fused them. `f32(..)` is a scalar worked out in f64 and rounded once;
//! `t` is the step, `g` the gradient; every operation rounds to f32:
//!
//! ```text
//! g = g * f32(gradient_scale)   1 but for a gradient that is clipped
//! p = p * f32(fma(-lr, weight_decay, 1))
//! m = fma(w, g - m, m)          when w < 0.5, else fma(w - 1, g - m, g);    w = f32(1 - beta1)
//! v = fma(f32(1 - beta2) * g, g, v * f32(beta2))
//! p = p + (f32(-lr / (1 - beta1^t)) * m) / (sqrt(v) / f32(sqrt(1 - beta2^t)) + f32(eps))
//! ```
//!
//! PyTorch runs whole vectors of eight. What is left over, the last `numel % 8` elements of a
//! tensor, went through the compiler on its own and rounds differently there:
//!
//! ```text
//! v = fma(v, f32(beta2), (f32(1 - beta2) * g) * g)
//! ```
//!
//! Weights are f32, or the bf16 and int16 halves of an f32 master ([`split`]). Moments and
//! gradients are f32. All slices of one call are the same parameters of one chunk, in order, one
//! element a parameter; they may be of any alignment.
//!
//! The scalar code is the specification. The other kernels are the same code compiled for more of
//! the CPU: the compiler turns the loops `step_f32` and `step_split` into vectors, and since it
//! neither fuses nor reorders floating point by itself, the bits cannot differ.

#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;

use rayon::prelude::*;

pub(crate) use crate::optimizer::kernel::Kernel;
pub use crate::optimizer::scalar::Scalars;
use crate::optimizer::scalar::{step_f32, step_split};

/// Parameters that one task updates: few enough to keep all cores busy to the end of a chunk, so
/// many (0.7 MB) that handing a task out costs nothing beside it.
const TILE: usize = 32 << 10;
/// Parameters whose old weights are kept aside at once when they are updated in place: they stay in the
/// first-level cache.
const COPIED: usize = 1024;
/// Elements of PyTorch's vector: what of a tensor does not fill one is its tail.
const LANES: usize = 8;

/// The step's hyperparameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate, as the schedule has it for this step.
    pub learning_rate: f64,
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// AdamW's `t`, counted from 1.
    pub step: u64,
    /// What the gradient is multiplied by before anything else: 1, or less when it is clipped.
    pub gradient_scale: f32,
}

impl AdamW {
    /// What the kernels need for tensors with this factor on the learning rate (1 for most) and
    /// this weight decay (0 for norms and biases, as a rule).
    #[must_use]
    pub fn scalars(&self, lr_scale: f64, weight_decay: f64) -> Scalars {
        // PyTorch counts steps in f32, which stands still at 2^24.
        let step = f64::from(u32::try_from(self.step).unwrap_or(u32::MAX).min(1 << 24));
        let learning_rate = self.learning_rate * lr_scale;
        Scalars {
            gradient_scale: self.gradient_scale,
            decay: round((-learning_rate).mul_add(weight_decay, 1.0)),
            exp_avg_weight: round(1.0 - self.beta1),
            beta2: round(self.beta2),
            exp_avg_sq_weight: round(1.0 - self.beta2),
            step_size: round(-learning_rate / (1.0 - self.beta1.powf(step))),
            bias_correction2_sqrt: round((1.0 - self.beta2.powf(step)).sqrt()),
            eps: round(self.eps),
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what it is for")]
fn round(value: f64) -> f32 {
    value as f32
}

/// Consecutive parameters of one tensor that lie in one chunk, and what they share.
///
/// A tensor may be cut into spans at multiples of 8 parameters from its start only (chunk borders
/// are): a span that is no multiple of 8 long is taken to end where its tensor ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// First parameter, counted from the start of the chunk.
    pub start: usize,
    /// Number of parameters.
    pub len: usize,
    /// The tensor's scalars.
    pub scalars: Scalars,
}

impl Span {
    fn end(&self) -> usize {
        self.start + self.len
    }

    fn tail_start(&self) -> usize {
        self.end() - self.len % LANES
    }
}

/// One step of a chunk whose weights are f32, on the current rayon pool.
///
/// `weight` is read and `weight_out` written; without the first, the second is updated in place, which
/// saves memory traffic and gives the same bits. Outside every span `weight_out` becomes `weight`, the
/// moments stay, and the gradient is not looked at. The result does not depend on the number of threads.
///
/// # Panics
/// If the slices differ in length, or the spans overlap, are out of order or out of bounds.
#[expect(clippy::too_many_arguments, reason = "one slice a plane")]
pub fn update_f32(
    kernel: Kernel,
    spans: &[Span],
    weight: Option<&[f32]>,
    weight_out: &mut [f32],
    gradient: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    let len = weight_out.len();
    let old = weight.map_or(len, <[f32]>::len);
    check(len, spans, [old, gradient.len(), exp_avg.len(), exp_avg_sq.len()]);
    (
        weight_out.par_chunks_mut(TILE),
        gradient.par_chunks(TILE),
        exp_avg.par_chunks_mut(TILE),
        exp_avg_sq.par_chunks_mut(TILE),
    )
        .into_par_iter()
        .enumerate()
        .for_each(|(tile, (weight_out, gradient, exp_avg, exp_avg_sq))| {
            let start = tile * TILE;
            let weight = weight.map(|weight| &weight[start..start + weight_out.len()]);
            tile_f32(kernel, spans, start, weight, weight_out, gradient, exp_avg, exp_avg_sq);
        });
}

/// The part of a chunk that starts at its parameter `start`, on this thread; what [`update_f32`] checks
/// was checked.
#[expect(clippy::too_many_arguments, reason = "one slice a plane")]
pub(crate) fn tile_f32(
    kernel: Kernel,
    spans: &[Span],
    start: usize,
    weight: Option<&[f32]>,
    weight_out: &mut [f32],
    gradient: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    let mut old = [0.0; COPIED];
    for (range, part) in pieces(spans, start, weight_out.len(), weight.is_none()) {
        let out = &mut weight_out[range.clone()];
        let weight = match weight {
            Some(weight) => &weight[range.clone()],
            None => {
                old[..out.len()].copy_from_slice(out);
                &old[..out.len()]
            }
        };
        let (g, m) = (&gradient[range.clone()], &mut exp_avg[range.clone()]);
        let v = &mut exp_avg_sq[range];
        match part {
            Part::Gap => out.copy_from_slice(weight),
            Part::Body(scalars) => kernel.step_f32(scalars, weight, out, g, m, v),
            Part::Tail(scalars) => step_f32::<true>(scalars, weight, out, g, m, v),
        }
    }
}

/// One step of a chunk whose weights are split (see [`split`]): as [`update_f32`], and outside
/// every span the remainder stays too.
///
/// A weight that becomes NaN is stored as the one NaN `0x7FC0_0000`: [`split`] would round the
/// NaN of a GPU, `0x7FFF_FFFF`, to a bf16 of -0, and the forward pass would not see it.
///
/// # Panics
/// As [`update_f32`].
#[expect(clippy::too_many_arguments, reason = "one slice a plane")]
pub fn update_split(
    kernel: Kernel,
    spans: &[Span],
    weight: Option<&[u16]>,
    weight_out: &mut [u16],
    remainder: &mut [i16],
    gradient: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    let len = weight_out.len();
    let old = weight.map_or(len, <[u16]>::len);
    check(len, spans, [old, remainder.len(), gradient.len(), exp_avg.len(), exp_avg_sq.len()]);
    (
        weight_out.par_chunks_mut(TILE),
        remainder.par_chunks_mut(TILE),
        gradient.par_chunks(TILE),
        exp_avg.par_chunks_mut(TILE),
        exp_avg_sq.par_chunks_mut(TILE),
    )
        .into_par_iter()
        .enumerate()
        .for_each(|(tile, (weight_out, remainder, gradient, exp_avg, exp_avg_sq))| {
            let start = tile * TILE;
            tile_split(
                kernel,
                spans,
                start,
                weight.map(|weight| &weight[start..start + weight_out.len()]),
                weight_out,
                remainder,
                gradient,
                exp_avg,
                exp_avg_sq,
            );
        });
}

/// As [`tile_f32`], for split weights.
#[expect(clippy::too_many_arguments, reason = "one slice a plane")]
pub(crate) fn tile_split(
    kernel: Kernel,
    spans: &[Span],
    start: usize,
    weight: Option<&[u16]>,
    weight_out: &mut [u16],
    remainder: &mut [i16],
    gradient: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    let mut old = [0; COPIED];
    for (range, part) in pieces(spans, start, weight_out.len(), weight.is_none()) {
        let out = &mut weight_out[range.clone()];
        let weight = match weight {
            Some(weight) => &weight[range.clone()],
            None => {
                old[..out.len()].copy_from_slice(out);
                &old[..out.len()]
            }
        };
        let (low, g) = (&mut remainder[range.clone()], &gradient[range.clone()]);
        let (m, v) = (&mut exp_avg[range.clone()], &mut exp_avg_sq[range]);
        match part {
            Part::Gap => out.copy_from_slice(weight),
            Part::Body(scalars) => kernel.step_split(scalars, weight, out, low, g, m, v),
            Part::Tail(scalars) => step_split::<true>(scalars, weight, out, low, g, m, v),
        }
    }
}

/// The checks of the safe entrances.
pub(crate) fn check<const N: usize>(len: usize, spans: &[Span], lens: [usize; N]) {
    assert!(lens.iter().all(|other| *other == len), "lengths differ: {lens:?}, weight {len}");
    let mut free = 0;
    for span in spans {
        assert!(span.start >= free, "spans overlap or are out of order at {}", span.start);
        assert!(span.start <= len && span.len <= len - span.start, "a span ends behind the chunk");
        free = span.end();
    }
}

/// What is to be done with a run of parameters.
#[derive(Clone, Copy)]
enum Part<'a> {
    /// They belong to no tensor.
    Gap,
    Body(&'a Scalars),
    /// The end of a tensor, behind PyTorch's last whole vector.
    Tail(&'a Scalars),
}

/// The parts of the `len` parameters from `start` on, as ranges that count from `start`. They
/// cover everything; some are empty.
fn parts(
    spans: &[Span],
    start: usize,
    len: usize,
) -> impl Iterator<Item = (Range<usize>, Part<'_>)> {
    let first = spans.partition_point(|span| span.end() <= start);
    let mut done = 0;
    spans
        .iter()
        .skip(first)
        .take_while(move |span| span.start < start + len)
        .flat_map(|span| {
            let (body, tail) = (Part::Body(&span.scalars), Part::Tail(&span.scalars));
            [(span.start, Part::Gap), (span.tail_start(), body), (span.end(), tail)]
        })
        .chain([(start + len, Part::Gap)])
        .map(move |(until, part)| {
            let from = done;
            done = until.saturating_sub(start).clamp(from, len);
            (from..done, part)
        })
}

/// As [`parts`], and no range longer than [`COPIED`] where the old weights are copied.
fn pieces(
    spans: &[Span],
    start: usize,
    len: usize,
    is_in_place: bool,
) -> impl Iterator<Item = (Range<usize>, Part<'_>)> {
    let longest = if is_in_place { COPIED } else { len.max(1) };
    parts(spans, start, len).flat_map(move |(range, part)| {
        let end = range.end;
        range.step_by(longest).map(move |from| (from..(from + longest).min(end), part))
    })
}
