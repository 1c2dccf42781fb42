//! Files, drives and the engines that move bytes between them and memory.

pub(crate) mod drives;
pub(crate) mod engine;
pub(crate) mod file;
pub(crate) mod fork;

pub use drives::Drives;
pub use engine::choice::{Choice, start};
pub use engine::faulty::{Fault, Point};
pub use engine::threads;
#[cfg(all(feature = "uring", target_os = "linux"))]
pub use engine::uring;
pub use engine::{Counters, Engine, Operation};
pub use file::{DioAlignment, DirectFile, LOCK_NOTICE, Owner};
