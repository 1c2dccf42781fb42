//! The update compiled for AVX2 and FMA.
#![allow(unsafe_code, reason = "calling code that the CPU may not have")]

use super::Scalars;

/// Whether this CPU can run this module's code. The answer is cached by the standard library.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// [`super::step_f32`] of a span's body.
pub(super) fn step_f32(
    scalars: &Scalars,
    weight: &[f32],
    weight_out: &mut [f32],
    gradient: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    if available() {
        // SAFETY: the CPU has both features, `available` on the line above has just said so.
        unsafe { vector_f32(scalars, weight, weight_out, gradient, exp_avg, exp_avg_sq) }
    } else {
        super::step_f32::<false>(scalars, weight, weight_out, gradient, exp_avg, exp_avg_sq);
    }
}

/// [`super::step_split`] of a span's body.
#[expect(clippy::too_many_arguments, reason = "one slice a plane")]
pub(super) fn step_split(
    scalars: &Scalars,
    weight: &[u16],
    weight_out: &mut [u16],
    remainder: &mut [i16],
    gradient: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    if available() {
        // SAFETY: the CPU has both features, `available` on the line above has just said so.
        unsafe {
            vector_split(scalars, weight, weight_out, remainder, gradient, exp_avg, exp_avg_sq);
        }
    } else {
        super::step_split::<false>(
            scalars, weight, weight_out, remainder, gradient, exp_avg, exp_avg_sq,
        );
    }
}

// Never inlined: the compiler learns from the arguments that the slices do not overlap, and
// without that it makes no vectors of the loop.
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
fn vector_f32(
    scalars: &Scalars,
    weight: &[f32],
    weight_out: &mut [f32],
    gradient: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    super::step_f32::<false>(scalars, weight, weight_out, gradient, exp_avg, exp_avg_sq);
}

#[inline(never)]
#[target_feature(enable = "avx2,fma")]
#[expect(clippy::too_many_arguments, reason = "one slice a plane")]
fn vector_split(
    scalars: &Scalars,
    weight: &[u16],
    weight_out: &mut [u16],
    remainder: &mut [i16],
    gradient: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    super::step_split::<false>(
        scalars, weight, weight_out, remainder, gradient, exp_avg, exp_avg_sq,
    );
}
