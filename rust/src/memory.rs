//! Pinned-down memory: regions and the slots cut from them, the pool of buffers, and the ledger of
//! what was allocated for what.

pub mod huge_pages;
pub mod ledger;
pub mod pool;
pub mod slot;
