//! The update compiled for CPUs with AVX2 and FMA, and for those with AVX-512.
#![allow(unsafe_code, reason = "calling code that the CPU may not have")]

/// One kernel: the scalar source, compiled with more of the CPU's features.
macro_rules! kernel {
    ($name:ident, $features:literal, $($detected:tt),+) => {
        pub(super) mod $name {
            use crate::optimizer::scalar::{self, Scalars};

            /// Whether this CPU can run this module's code. The answer is cached by the standard
            /// library.
            pub(in crate::optimizer) fn available() -> bool {
                $(is_x86_feature_detected!($detected))&&+
            }

            /// [`scalar::step_f32`] of a span's body.
            pub(in crate::optimizer) fn step_f32(
                scalars: &Scalars,
                weight: &[f32],
                weight_out: &mut [f32],
                gradient: &[f32],
                exp_avg: &mut [f32],
                exp_avg_sq: &mut [f32],
            ) {
                if available() {
                    // SAFETY: the CPU has the features, `available` on the line above has just
                    // said so.
                    unsafe { vector_f32(scalars, weight, weight_out, gradient, exp_avg, exp_avg_sq) }
                } else {
                    scalar::step_f32::<false>(
                        scalars, weight, weight_out, gradient, exp_avg, exp_avg_sq,
                    );
                }
            }

            /// [`scalar::step_split`] of a span's body.
            #[expect(clippy::too_many_arguments, reason = "one slice a plane")]
            pub(in crate::optimizer) fn step_split(
                scalars: &Scalars,
                weight: &[u16],
                weight_out: &mut [u16],
                remainder: &mut [i16],
                gradient: &[f32],
                exp_avg: &mut [f32],
                exp_avg_sq: &mut [f32],
            ) {
                if available() {
                    // SAFETY: the CPU has the features, `available` on the line above has just
                    // said so.
                    unsafe {
                        vector_split(
                            scalars, weight, weight_out, remainder, gradient, exp_avg, exp_avg_sq,
                        );
                    }
                } else {
                    scalar::step_split::<false>(
                        scalars, weight, weight_out, remainder, gradient, exp_avg, exp_avg_sq,
                    );
                }
            }

            /// [`scalar::squares`] one run.
            pub(in crate::optimizer) fn squares(run: &[f32]) -> f64 {
                if available() {
                    // SAFETY: the CPU has the features, `available` on the line above has just
                    // said so.
                    unsafe { vector_squares(run) }
                } else {
                    scalar::squares(run)
                }
            }

            #[inline(never)]
            #[target_feature(enable = $features)]
            fn vector_squares(run: &[f32]) -> f64 {
                scalar::squares(run)
            }

            // Never inlined: the compiler learns from the arguments that the slices do not
            // overlap, and without that it makes no vectors of the loop.
            #[inline(never)]
            #[target_feature(enable = $features)]
            fn vector_f32(
                scalars: &Scalars,
                weight: &[f32],
                weight_out: &mut [f32],
                gradient: &[f32],
                exp_avg: &mut [f32],
                exp_avg_sq: &mut [f32],
            ) {
                scalar::step_f32::<false>(
                    scalars, weight, weight_out, gradient, exp_avg, exp_avg_sq,
                );
            }

            #[inline(never)]
            #[target_feature(enable = $features)]
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
                scalar::step_split::<false>(
                    scalars, weight, weight_out, remainder, gradient, exp_avg, exp_avg_sq,
                );
            }
        }
    };
}

kernel!(avx2, "avx2,fma", "avx2", "fma");
kernel!(
    avx512,
    "avx512f,avx512bw,avx512dq,avx512vl,fma",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "fma"
);
