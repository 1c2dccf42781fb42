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
//! Weights are f32, or the bf16 and int16 halves of an f32 master ([`split`]): the two formats that it updates,
//! [`OnF32`] and [`OnSplit`]. Moments and gradients are f32.
//!
//! A weight that becomes NaN is stored as the one NaN `0x7FC0_0000` where it is split: [`split`] would round the
//! NaN of a GPU, `0x7FFF_FFFF`, to a bf16 of -0, and the forward pass would not see it.
//!
//! The scalar code is the specification. The other kernels are the same code compiled for more of
//! the CPU: the compiler turns the loops `step_f32` and `step_split` into vectors, and since it
//! neither fuses nor reorders floating point by itself, the bits cannot differ.

#[cfg(test)]
pub(crate) mod tests;

use bytemuck::cast_slice_mut;

use crate::optimizer::kernel::Kernel;
use crate::optimizer::scalar::{Scalars, step_f32, step_split};
#[cfg(doc)]
use crate::optimizer::split::split;
use crate::optimizer::update::{self, ChunkUpdate, Optimizer, Span, State, Update};
use crate::units::StateFormat;

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
    /// AdamW's `t`, counted from 1; in a store whose records have their own, that one counts.
    pub step: u64,
}

impl AdamW {
    /// What the kernels need for tensors with the span's factor on the learning rate (1 for most) and its weight
    /// decay (0 for norms and biases, as a rule), whose gradients are multiplied by `gradient_scale`.
    fn scalars(&self, gradient_scale: f32, span: &Span) -> Scalars {
        // PyTorch counts steps in f32, which stands still at 2^24.
        let step = f64::from(u32::try_from(self.step).unwrap_or(u32::MAX).min(1 << 24));
        let learning_rate = self.learning_rate * span.lr_scale;
        Scalars {
            gradient_scale,
            decay: round((-learning_rate).mul_add(span.weight_decay, 1.0)),
            exp_avg_weight: round(1.0 - self.beta1),
            beta2: round(self.beta2),
            exp_avg_sq_weight: round(1.0 - self.beta2),
            step_size: round(-learning_rate / (1.0 - self.beta1.powf(step))),
            bias_correction2_sqrt: round((1.0 - self.beta2.powf(step)).sqrt()),
            eps: round(self.eps),
        }
    }

    /// The update of a chunk in one of its formats; `None` for another.
    pub(super) fn over(
        &self,
        format: StateFormat,
        parameters: usize,
        gradient_scale: f32,
        spans: &[Span],
    ) -> Option<Box<dyn Update>> {
        let scalars = |span: &Span| self.scalars(gradient_scale, span);
        match format {
            OnF32::FORMAT => {
                Some(Box::new(ChunkUpdate::<OnF32, 2>::new(spans, parameters, scalars)))
            }
            OnSplit::FORMAT => {
                Some(Box::new(ChunkUpdate::<OnSplit, 3>::new(spans, parameters, scalars)))
            }
            _ => None,
        }
    }

    /// One step of one tensor in memory, on the current rayon pool: the bits that training gives it, for who
    /// compares. `planes` are its f32 weights, `exp_avg` and `exp_avg_sq`.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn update_tensor(
        &self,
        kernel: Kernel,
        gradient_scale: f32,
        weight_decay: f64,
        gradient: &[f32],
        planes: [&mut [f32]; 3],
    ) {
        let span = Span { start: 0, len: gradient.len(), lr_scale: 1.0, weight_decay };
        let scalars = |span: &Span| self.scalars(gradient_scale, span);
        let update = ChunkUpdate::<OnF32, 2>::new(&[span], gradient.len(), scalars);
        let [weight, exp_avg, exp_avg_sq] = planes.map(cast_slice_mut);
        let state = State::new(StateFormat::F32, None, weight, gradient, vec![exp_avg, exp_avg_sq]);
        update::update(kernel, &update, state);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what it is for")]
fn round(value: f64) -> f32 {
    value as f32
}

/// AdamW over weights that are f32.
struct OnF32;

impl Optimizer<2> for OnF32 {
    const FORMAT: StateFormat = StateFormat::F32;
    type Weight = f32;
    type Scalars = Scalars;

    fn step(
        kernel: Option<Kernel>,
        scalars: &Scalars,
        weight: &[f32],
        weight_out: &mut [f32],
        gradient: &[f32],
        [exp_avg, exp_avg_sq]: [&mut [u8]; 2],
    ) {
        let (m, v) = (cast_slice_mut(exp_avg), cast_slice_mut(exp_avg_sq));
        match kernel {
            Some(kernel) => kernel.step_f32(scalars, weight, weight_out, gradient, m, v),
            None => step_f32::<true>(scalars, weight, weight_out, gradient, m, v),
        }
    }
}

/// AdamW over split weights.
struct OnSplit;

impl Optimizer<3> for OnSplit {
    const FORMAT: StateFormat = StateFormat::Bf16;
    type Weight = u16;
    type Scalars = Scalars;

    fn step(
        kernel: Option<Kernel>,
        scalars: &Scalars,
        weight: &[u16],
        weight_out: &mut [u16],
        gradient: &[f32],
        [remainder, exp_avg, exp_avg_sq]: [&mut [u8]; 3],
    ) {
        let low = cast_slice_mut(remainder);
        let (m, v) = (cast_slice_mut(exp_avg), cast_slice_mut(exp_avg_sq));
        match kernel {
            Some(kernel) => kernel.step_split(scalars, weight, weight_out, low, gradient, m, v),
            None => step_split::<true>(scalars, weight, weight_out, low, gradient, m, v),
        }
    }
}
