//! Files, drives and the engines that move bytes between them and memory.

pub mod drives;
pub mod engine;
pub mod file;
pub mod fork;
