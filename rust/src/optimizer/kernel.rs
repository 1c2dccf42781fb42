//! Which code runs the loops: the plain one, or the same compiled for the CPU at hand.

use std::fmt;

use crate::optimizer::scalar::{self, Scalars};
#[cfg(target_arch = "x86_64")]
use crate::optimizer::vector::{avx2, avx512};

/// A way to run the update. All give the same bits (of a moment that is NaN, a NaN).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Plain code: the specification. Slow where the compiler may not assume fused multiply-add.
    Scalar,
    /// AVX2 and FMA; runs as `Scalar` on a CPU that lacks them.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 (F, BW, DQ, VL); runs as `Scalar` on a CPU that lacks them.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    /// The kernels that this CPU can run, fastest last.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let all = [
            Self::Scalar,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512,
        ];
        all.into_iter().filter(|kernel| kernel.is_available()).collect()
    }

    /// The fastest kernel that this CPU can run.
    #[must_use]
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Self::Scalar)
    }

    fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::available(),
        }
    }

    /// The loop of the update over the whole vectors of a span.
    #[expect(clippy::too_many_arguments, reason = "one slice a plane")]
    pub(super) fn step_f32(
        self,
        scalars: &Scalars,
        weight: &[f32],
        weight_out: &mut [f32],
        gradient: &[f32],
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
    ) {
        let step = match self {
            Self::Scalar => scalar::step_f32::<false>,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::step_f32,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::step_f32,
        };
        step(scalars, weight, weight_out, gradient, exp_avg, exp_avg_sq);
    }

    /// As [`step_f32`](Self::step_f32), for split weights.
    #[expect(clippy::too_many_arguments, reason = "one slice a plane")]
    pub(super) fn step_split(
        self,
        scalars: &Scalars,
        weight: &[u16],
        weight_out: &mut [u16],
        remainder: &mut [i16],
        gradient: &[f32],
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
    ) {
        let step = match self {
            Self::Scalar => scalar::step_split::<false>,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::step_split,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::step_split,
        };
        step(scalars, weight, weight_out, remainder, gradient, exp_avg, exp_avg_sq);
    }

    /// The sum of the squares of one run.
    pub(super) fn squares(self, run: &[f32]) -> f64 {
        match self {
            Self::Scalar => scalar::squares(run),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::squares(run),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::squares(run),
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2+fma",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
        })
    }
}
