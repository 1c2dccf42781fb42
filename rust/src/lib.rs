//! The engine beneath `megatrain-io`: NVMe is the memory, RAM is a small window onto it.
//!
//! Floors, lowest first (a file uses only floors below its own; `docs/design.md` has the table):
//! 0 `units` `error` `checksum` `ledger` `buffer` `fork` | 1 `file` `drives` `pool` `engine` |
//! 2 `engine::{uring, threads, faulty}` `adamw` `manifest` `layout` | 3 `store` `measure` | 4 `pipeline` `tensors`.
//! The Python bindings are a crate of their own, `rust/py`; this crate knows nothing of Python.

pub mod adamw;
pub mod buffer;
pub mod checksum;
pub mod drives;
pub mod engine;
pub mod error;
pub mod file;
pub mod fork;
pub mod layout;
pub mod ledger;
pub mod manifest;
pub mod measure;
pub mod pipeline;
pub mod pool;
pub mod store;
pub mod tensors;
pub mod units;
