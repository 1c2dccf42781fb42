//! The pool: all memory that transfers use, allocated once at the start. Nothing grows later.

use std::sync::Arc;

use crate::error::Result;
use crate::memory::huge_pages::HugePages;
use crate::memory::ledger::Ledger;
use crate::memory::slot::{Region, Share, SlotList};
use crate::units::{PAGE_BYTES, StateFormat};

/// How many slots of one kind, and how large each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kind {
    /// Bytes of one slot; rounded up to 4 KiB.
    pub bytes: usize,
    /// Number of slots.
    pub count: usize,
}

/// Buffers for weights or gradients, each for a whole record, or a whole chunk by chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferKind {
    /// Format of the records that they are for; `None` is any.
    pub format: Option<StateFormat>,
    /// How many, and how large.
    pub slots: Kind,
}

impl BufferKind {
    /// Buffers for records of any format.
    #[must_use]
    pub fn of_all(bytes: usize, count: usize) -> Self {
        Self { format: None, slots: Kind { bytes, count } }
    }

    /// Whether `bytes` of a record of `format` have room in one.
    fn holds(&self, format: StateFormat, bytes: usize) -> bool {
        let is_for_it = self.format.is_none_or(|own| own == format);
        is_for_it && bytes <= self.slots.bytes && self.slots.count > 0
    }
}

/// The pool as a sum of terms, in the order in which its region is cut.
///
/// What is loaded gets a buffer of the first kind that holds it, and so does its gradient: a large record of
/// one format leaves the buffers of another alone, and a small one takes none that is too large for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolSizes {
    /// Slots for updating one chunk: its new weights, its update planes, and its gradient where that
    /// waits on the drive.
    pub chunk_slots: Kind,
    /// Buffers for weights on their way to compute.
    pub weights: Vec<BufferKind>,
    /// By chunk, buffers for weights that come back for their update.
    pub outgoing: Kind,
    /// Buffers for fp32 gradients.
    pub gradients: Vec<BufferKind>,
}

impl PoolSizes {
    /// Bytes of the whole pool.
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        let kinds = self.transfers().chain(slots_of(&self.gradients));
        kinds.map(|kind| rounded(kind.bytes) * kind.count).sum()
    }

    fn transfers(&self) -> impl Iterator<Item = Kind> {
        [self.chunk_slots].into_iter().chain(slots_of(&self.weights)).chain([self.outgoing])
    }
}

fn slots_of(kinds: &[BufferKind]) -> impl Iterator<Item = Kind> {
    kinds.iter().map(|kind| kind.slots)
}

/// Which of `kinds` has the buffers for `bytes` of a record of `format`: the first that holds them.
#[must_use]
pub(crate) fn kind_for(kinds: &[BufferKind], format: StateFormat, bytes: usize) -> Option<usize> {
    kinds.iter().position(|kind| kind.holds(format, bytes))
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
    /// What it was made from.
    pub sizes: PoolSizes,
    /// For updates.
    pub chunk_slots: SlotList,
    /// For weights on their way to compute, by kind.
    pub weights: Vec<SlotList>,
    /// By chunk, for weights that come back.
    pub outgoing: SlotList,
    /// For gradients, by kind.
    pub gradients: Vec<SlotList>,
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
        let cut = |kind: Kind| (rounded(kind.bytes), kind.count);
        let transfers: Vec<_> = sizes.transfers().map(cut).collect();
        let gradients: Vec<_> = slots_of(&sizes.gradients).map(cut).collect();
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
        let gradients = lists.pop().unwrap_or_default();
        let mut transfers = lists.pop().unwrap_or_default().into_iter();
        let mut next =
            || transfers.next().ok_or_else(|| crate::error::Error::invalid("a kind of slot"));
        let chunk_slots = next()?;
        let weights = sizes.weights.iter().map(|_| next()).collect::<Result<_>>()?;
        let outgoing = next()?;
        let huge_pages = region.populate();
        Ok(Self {
            region,
            huge_pages,
            sizes: sizes.clone(),
            chunk_slots,
            weights,
            outgoing,
            gradients,
            residents,
        })
    }
}

fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE_BYTES)
}

#[cfg(test)]
mod tests;
