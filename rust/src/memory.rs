//! Pinned-down memory: regions and the slots cut from them, the pool of buffers, and the ledger of
//! what was allocated for what.

pub(crate) mod huge_pages;
pub(crate) mod ledger;
pub(crate) mod pool;
pub(crate) mod slot;

pub use huge_pages::HugePages;
pub use ledger::{Balance, Ledger};
pub use pool::{BufferKind, Kind, PoolSizes};
pub use slot::{Region, Slot, SlotList};
