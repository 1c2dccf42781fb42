//! The loops of the update and of the norm in plain code: the specification, which `vector` compiles
//! once more for wider CPUs.

use crate::optimizer::split::{join, split};

/// Sums that go on side by side.
pub(super) const LANES: usize = 16;

/// The scalars of one step for one tensor, worked out by [`AdamW::scalars`](crate::optimizer::adamw::AdamW::scalars).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scalars {
    pub(super) gradient_scale: f32,
    pub(super) decay: f32,
    pub(super) exp_avg_weight: f32,
    pub(super) beta2: f32,
    pub(super) exp_avg_sq_weight: f32,
    pub(super) step_size: f32,
    pub(super) bias_correction2_sqrt: f32,
    pub(super) eps: f32,
}

impl Scalars {
    /// One parameter: new weight, `exp_avg`, `exp_avg_sq`.
    #[expect(clippy::inline_always, reason = "it must be compiled for its caller's CPU features")]
    #[inline(always)]
    pub(super) fn step<const TAIL: bool>(
        &self,
        weight: f32,
        g: f32,
        m: f32,
        v: f32,
    ) -> (f32, f32, f32) {
        let g = g * self.gradient_scale;
        let w = self.exp_avg_weight;
        let exp_avg = if w < 0.5 {
            w.mul_add(g - m, m)
        } else {
            // The two differ for w == 1, in the sign of zero.
            let w = if TAIL { -(1.0 - w) } else { w - 1.0 };
            w.mul_add(g - m, g)
        };
        let square = self.exp_avg_sq_weight * g;
        let exp_avg_sq = if TAIL {
            v.mul_add(self.beta2, square * g)
        } else {
            square.mul_add(g, v * self.beta2)
        };
        let denominator = exp_avg_sq.sqrt() / self.bias_correction2_sqrt + self.eps;
        let weight = weight * self.decay + self.step_size * exp_avg / denominator;
        (weight, exp_avg, exp_avg_sq)
    }
}

/// The loop over whole slices. It is compiled once for each kernel.
#[expect(clippy::inline_always, reason = "it must be compiled for its caller's CPU features")]
#[inline(always)]
pub(super) fn step_f32<const TAIL: bool>(
    scalars: &Scalars,
    weight: &[f32],
    weight_out: &mut [f32],
    gradient: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    let moments = exp_avg.iter_mut().zip(exp_avg_sq);
    for (((w, out), g), (m, v)) in weight.iter().zip(weight_out).zip(gradient).zip(moments) {
        (*out, *m, *v) = scalars.step::<TAIL>(*w, *g, *m, *v);
    }
}

/// As [`step_f32`], for split weights.
#[expect(clippy::inline_always, reason = "it must be compiled for its caller's CPU features")]
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "one slice a plane")]
pub(super) fn step_split<const TAIL: bool>(
    scalars: &Scalars,
    weight: &[u16],
    weight_out: &mut [u16],
    remainder: &mut [i16],
    gradient: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    let weights = weight.iter().zip(weight_out).zip(remainder);
    let moments = exp_avg.iter_mut().zip(exp_avg_sq);
    for ((((w, out), low), g), (m, v)) in weights.zip(gradient).zip(moments) {
        let master;
        (master, *m, *v) = scalars.step::<TAIL>(join(*w, *low), *g, *m, *v);
        (*out, *low) = split(if master.is_nan() { f32::NAN } else { master });
    }
}

/// The loop over one run. It is compiled once for each kernel.
#[expect(clippy::inline_always, reason = "it must be compiled for its caller's CPU features")]
#[inline(always)]
pub(super) fn squares(run: &[f32]) -> f64 {
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
