//! The engine beneath `megatrain-io`: NVMe is the memory, RAM is a small window onto it.
//!
//! Rooms, lowest floor first (a room uses only rooms on lower floors; `docs/design.md` has the table):
//! 0 `units` `error` | 1 `memory` `optimizer` | 2 `io` | 3 `store` | 4 `measure` `pipeline` `tensors`.
//! The Python bindings are a crate of their own, `rust/py`; this crate knows nothing of Python.

pub mod error;
pub mod io;
pub mod measure;
pub mod memory;
pub mod optimizer;
pub mod pipeline;
pub mod store;
pub mod tensors;
pub mod units;
