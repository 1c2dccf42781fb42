//! The pipeline against the same training in memory, and against crashes.

mod by_chunk;
mod crash_model;
mod kept;
mod residents;
mod support;
mod training;
