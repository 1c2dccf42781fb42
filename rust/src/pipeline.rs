//! The pipeline executes a schedule: it reads ahead, updates, and writes behind, while the caller
//! computes. One executor thread owns all decisions; callers only wait and hand buffers over.
//!
//! What one buffer holds is a *unit*: a whole record, or with [`Unit::Chunk`](crate::units::Unit) a chunk, so
//! that who computes elsewhere needs few chunks of memory here.
//!
//! A caller's step: [`Pipeline::begin`], then for each load of the schedule, in its order,
//! [`Pipeline::take_weights`]; for each unit to update [`Pipeline::take_gradient`] and
//! [`Pipeline::submit`]; then [`Pipeline::end`]. The next step may begin at once: its loads wait,
//! chunk by chunk, for the writes that they depend on, and its updates wait until the last step is
//! durable.

mod command;
mod events;
mod executor;
mod front;
mod gradient_files;
mod memory;
mod options;
mod schedule;
mod shared;
mod squares;
mod stalls;
mod unit_name;
mod update;
mod waits;

pub use command::After;
pub use events::{Event, Events, Lane};
pub use front::Pipeline;
pub use gradient_files::GradientFiles;
pub use memory::{Residents, chunk_slot_bytes};
pub use options::Options;
pub use schedule::{CheckedSchedule, ChunkOp, Kind};
pub use stalls::{Cause, Timings};
pub use update::TensorSettings;

#[cfg(test)]
mod tests;
