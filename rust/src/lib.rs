//! The engine beneath `megatrain-io`: NVMe is the memory, RAM is a small window onto it.
//!
//! Rooms, lowest floor first (a room uses only rooms on lower floors; `docs/design.md` has the table):
//! 0 `units` `error` | 1 `memory` `optimizer` | 2 `io` | 3 `store` | 4 `measure` `pipeline` `tensors`.
//! A room says in its first lines what others outside the crate may name; its modules are its own.
//! The Python bindings are a crate of their own, `rust/py`; this crate knows nothing of Python.

mod error;
pub mod io;
pub mod measure;
pub mod memory;
pub mod optimizer;
pub mod pipeline;
pub mod store;
pub mod tensors;
mod units;

pub use crate::error::{Error, Result};
pub use crate::units::{
    CopyId, Dtype, FormatSpec, Group, OptimizerFormat, Plane, PlaneSpec, StateFormat, Unit,
    to_usize,
};
