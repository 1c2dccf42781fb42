//! The store: a file (one on each drive) in which a whole training state changes from one step to the next at once.
//!
//! A chunk's first write since the last commit goes to the copy that the committed table does not
//! name; a commit makes the working table the committed one. `docs/design.md` draws the bytes and
//! has the state table; `commit.rs` and `recovery.rs` are the two halves of the promise.

pub(crate) mod checksum;
mod commit;
mod create;
mod fields;
mod header;
pub(crate) mod layout;
pub(crate) mod manifest;
mod plans;
mod recovery;
mod state;
mod superblock;
mod table;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod tests;
mod values;
mod verify;

pub use commit::{Next, Sequence, Sequenced};
pub use create::StoreCreator;
pub use layout::{Chunk, Content, Durability, Layout, Manifest, Record, Tensor};
pub use plans::{ReadPlan, WritePlan};
pub use recovery::{OlderState, OpenOptions, StoreInfo};
pub use state::{BLOB_BYTES_MAX, Committed, Store};
pub use table::{Entry, Table};
pub use values::ValueType;
pub use verify::{DamagedExtent, Report};
