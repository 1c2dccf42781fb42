//! The pipeline against the same training in memory, and against crashes.

mod chunk_unit;
mod crash_model;
mod deferred;
mod residents;
mod stops;
mod support;
mod training;
