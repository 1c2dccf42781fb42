//! The crash model: the real store and the real executor over a faulty drive in RAM.
//!
//! One thread drives everything, so a run follows from its seed alone: it picks whether the executor
//! turns, the trainer goes on, or the drive performs one of the operations in flight, and where the
//! process is killed or the power goes. After each of these the store is opened again and must hold,
//! to the bit, the last acknowledged state or the one whose commit was under way.
//!
//! `make soak` runs more of the same: `MEGATRAIN_SOAK_RUNS` says how many.

mod base;
mod broken;
mod calls;
mod causes;
mod exhaustive;
mod memories;
mod plan;
mod process;
mod random;
mod refused;
mod run;
mod training;
