//! The pool: all memory that transfers use, allocated once at the start. Nothing grows later.

use std::sync::Arc;

use crate::error::Result;
use crate::memory::huge_pages::HugePages;
use crate::memory::ledger::Ledger;
use crate::memory::slot::{Region, Share, SlotList};
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
    /// Slots for updating one chunk: its new weights, its update planes, and its gradient where that
    /// waits on the drive.
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
        let [chunks, blocks, outer] = self.transfers();
        let [block_gradients, outer_gradients] = self.gradients();
        [chunks, blocks, outer, block_gradients, outer_gradients]
    }

    fn transfers(&self) -> [Kind; 3] {
        [self.chunk_slots, self.block_buffers, self.outer_buffers]
    }

    fn gradients(&self) -> [Kind; 2] {
        [self.block_gradients, self.outer_gradients]
    }
}

/// Bytes of what stays in RAM from step to step; 0 where it does not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResidentSizes {
    /// The weights of each record.
    pub weights: Vec<usize>,
    /// The update planes of each chunk.
    pub planes: Vec<usize>,
    /// The gradient of each record, where it waits for the norm of all.
    pub gradients: Vec<usize>,
}

/// Slots of what stays in RAM: each has its own list of one, which nobody else takes from, so it keeps
/// its content while nobody holds it.
#[derive(Clone, Debug, Default)]
pub struct ResidentSlots {
    /// By record.
    pub weights: Vec<Option<SlotList>>,
    /// By chunk.
    pub planes: Vec<Option<SlotList>>,
    /// By record.
    pub gradients: Vec<Option<SlotList>>,
}

impl ResidentSlots {
    /// The buffer of a record whose weights stay.
    #[must_use]
    pub fn weights_of(&self, record: usize) -> Option<&SlotList> {
        self.weights.get(record)?.as_ref()
    }

    /// The slot of a chunk whose update planes stay.
    #[must_use]
    pub fn planes_of(&self, chunk: usize) -> Option<&SlotList> {
        self.planes.get(chunk)?.as_ref()
    }

    /// The buffer of a record whose gradient waits in RAM.
    #[must_use]
    pub fn gradient_of(&self, record: usize) -> Option<&SlotList> {
        self.gradients.get(record)?.as_ref()
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
    /// What stays in RAM from step to step.
    pub residents: ResidentSlots,
}

impl Pool {
    /// Allocates and populates the whole pool and enters it in the ledger under `pool`, `gradients`
    /// and `residents`.
    ///
    /// # Errors
    /// `Io` when the system refuses the memory.
    pub fn allocate(sizes: &PoolSizes, residents: &ResidentSizes, ledger: &Ledger) -> Result<Self> {
        let cut = |kind: &Kind| (rounded(kind.bytes), kind.count);
        let transfers = sizes.transfers().each_ref().map(cut);
        let gradients = sizes.gradients().each_ref().map(cut);
        let own = |bytes: &usize| (*bytes > 0).then(|| (rounded(*bytes), 1));
        let stay: Vec<_> =
            residents.weights.iter().chain(&residents.planes).filter_map(own).collect();
        let deferred: Vec<_> = residents.gradients.iter().filter_map(own).collect();
        let shares = [
            Share { account: "pool", sizes: &transfers, packed: false },
            Share { account: "gradients", sizes: &gradients, packed: false },
            Share { account: "gradients", sizes: &deferred, packed: true },
            Share { account: "residents", sizes: &stay, packed: true },
        ];
        let (region, mut lists) = SlotList::cut_shares(&shares, ledger)?;
        let mut stay = lists.pop().unwrap_or_default().into_iter();
        let mut deferred = lists.pop().unwrap_or_default().into_iter();
        let own = |sizes: &[usize], lists: &mut dyn Iterator<Item = SlotList>| {
            sizes.iter().map(|bytes| if *bytes > 0 { lists.next() } else { None }).collect()
        };
        let residents = ResidentSlots {
            weights: own(&residents.weights, &mut stay),
            planes: own(&residents.planes, &mut stay),
            gradients: own(&residents.gradients, &mut deferred),
        };
        let mut lists = lists.into_iter().flatten();
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
            residents,
        })
    }
}

fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE_BYTES)
}

#[cfg(test)]
mod tests;
