//! The optimizer's step over one chunk, and the sums over a gradient that clipping needs: pure
//! computing over slices, to the bit the same on every CPU and with any number of threads.
//!
//! Another optimizer is a module beside `adamw`, with a row of [`StateFormat`](crate::StateFormat)'s table for each
//! format of weights that it updates, and a variant of [`Hyperparameters`].

pub(crate) mod adamw;
pub(crate) mod hyperparameters;
pub(crate) mod kernel;
pub(crate) mod norm;
mod scalar;
pub(crate) mod split;
pub(crate) mod update;
#[cfg(target_arch = "x86_64")]
mod vector;

pub use adamw::AdamW;
pub use hyperparameters::Hyperparameters;
pub use kernel::Kernel;
pub use split::{join, split};
pub use update::{Span, State, Update, update};
