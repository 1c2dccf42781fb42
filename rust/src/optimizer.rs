//! The optimizer's step over one chunk, and the sums over a gradient that clipping needs: pure
//! computing over slices, to the bit the same on every CPU and with any number of threads.

pub mod adamw;
mod kernel;
pub mod norm;
mod scalar;
pub mod split;
#[cfg(target_arch = "x86_64")]
mod vector;
