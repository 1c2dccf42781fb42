//! The pool: all memory that transfers use, allocated once at the start. Nothing grows later.

use std::sync::Arc;

use crate::buffer::{HugePages, Region, SlotList};
use crate::error::Result;
use crate::ledger::Ledger;
use crate::units::PAGE_BYTES;

/// How many slots of one kind, and how large each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kind {
    /// Bytes of one slot; rounded up to 4 KiB.
    pub bytes: usize,
    /// Number of slots.
    pub count: usize,
}

/// The pool as a sum of named terms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolSizes {
    /// Slots for updating one chunk: its new weights and its update planes.
    pub chunk_slots: Kind,
    /// Buffers for the weights of one decoder block.
    pub block_buffers: Kind,
    /// Buffers for the weights of a record larger than a block (embeddings, head).
    pub outer_buffers: Kind,
    /// Buffers for the fp32 gradients of one decoder block.
    pub block_gradients: Kind,
    /// Buffers for the fp32 gradients of a record larger than a block.
    pub outer_gradients: Kind,
}

impl PoolSizes {
    /// Bytes of the whole pool.
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        self.kinds().iter().map(|kind| rounded(kind.bytes) * kind.count).sum()
    }

    fn kinds(&self) -> [Kind; 5] {
        [
            self.chunk_slots,
            self.block_buffers,
            self.outer_buffers,
            self.block_gradients,
            self.outer_gradients,
        ]
    }
}

/// The slots of each kind.
#[derive(Clone, Debug)]
pub struct Pool {
    /// One mapping beneath all slots.
    pub region: Arc<Region>,
    /// How much of it lay in huge pages when it was made.
    pub huge_pages: Option<HugePages>,
    /// For updates.
    pub chunk_slots: SlotList,
    /// For the weights of decoder blocks.
    pub block_buffers: SlotList,
    /// For the weights of larger records.
    pub outer_buffers: SlotList,
    /// For the gradients of decoder blocks.
    pub block_gradients: SlotList,
    /// For the gradients of larger records.
    pub outer_gradients: SlotList,
}

impl Pool {
    /// Allocates and populates the whole pool and enters it in the ledger under `pool`.
    ///
    /// # Errors
    /// `Io` when the system refuses the memory.
    pub fn allocate(sizes: &PoolSizes, ledger: &Ledger) -> Result<Self> {
        let cuts: Vec<(usize, usize)> =
            sizes.kinds().iter().map(|kind| (rounded(kind.bytes), kind.count)).collect();
        let (region, lists) = SlotList::cut(&cuts, ledger, "pool")?;
        let mut lists = lists.into_iter();
        let mut next =
            || lists.next().ok_or_else(|| crate::error::Error::invalid("five kinds of slot"));
        let huge_pages = region.populate();
        Ok(Self {
            region,
            huge_pages,
            chunk_slots: next()?,
            block_buffers: next()?,
            outer_buffers: next()?,
            block_gradients: next()?,
            outer_gradients: next()?,
        })
    }
}

fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_is_the_sum_of_its_terms() {
        let kind = |bytes, count| Kind { bytes, count };
        let sizes = PoolSizes {
            chunk_slots: kind(5000, 3),
            block_buffers: kind(8192, 2),
            outer_buffers: kind(100, 1),
            block_gradients: kind(16384, 2),
            outer_gradients: kind(0, 0),
        };
        assert_eq!(sizes.total_bytes(), 3 * 8192 + 2 * 8192 + 4096 + 2 * 16384);
        let ledger = Ledger::new();
        let pool = Pool::allocate(&sizes, &ledger).expect("memory");
        assert_eq!(ledger.total().current, sizes.total_bytes() as u64);
        assert_eq!(pool.chunk_slots.free_count(), 3);
        assert_eq!(pool.outer_gradients.free_count(), 0);
    }
}
