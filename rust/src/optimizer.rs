//! The optimizer's step over one chunk, and the sums over a gradient that clipping needs: pure
//! computing over slices, to the bit the same on every CPU and with any number of threads.

pub(crate) mod adamw;
mod kernel;
pub(crate) mod norm;
mod scalar;
pub(crate) mod split;
#[cfg(target_arch = "x86_64")]
mod vector;

pub use adamw::{AdamW, Scalars, Span, update_f32, update_split};
pub use kernel::Kernel;
pub use split::{join, split};
