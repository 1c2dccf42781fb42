//! The memory of a store of tensors: one region, handed out in runs of any length.
//!
//! A run is held by its [`Allocation`], which the tensors over it keep alive. Its slot moves into a
//! transfer and comes back; when the last tensor is gone the run is free again.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::memory::slot::{Region, Slot};
use crate::units::{HUGE_PAGE_BYTES, PAGE_BYTES};

/// Runs of one region.
#[derive(Debug)]
pub struct Arena {
    region: Arc<Region>,
    runs: Mutex<Runs>,
    process: u32,
}

#[derive(Debug)]
struct Runs {
    /// By place in the region; neighbours are joined, so no two touch.
    free: BTreeMap<usize, Slot>,
    lent: HashMap<usize, Weak<Allocation>>,
}

/// A run that tensors may look into.
#[derive(Debug)]
pub struct Allocation {
    arena: Arc<Arena>,
    place: usize,
    /// Bytes of the tensor that it was made for: those behind belong to nobody else.
    asked: usize,
    /// Away while a transfer has it.
    slot: Mutex<Option<Slot>>,
}

impl Arena {
    /// All of `whole`.
    pub(super) fn over(whole: Slot) -> Arc<Self> {
        let (region, place) = whole.place();
        let (region, free) = (Arc::clone(region), BTreeMap::from([(place, whole)]));
        let runs = Mutex::new(Runs { free, lent: HashMap::new() });
        Arc::new(Self { region, runs, process: std::process::id() })
    }

    /// A run of at least `bytes`, arbitrary content; `None` when no free run is as long.
    ///
    /// Large runs are cut from the front and small ones from the back, so that large ones begin at a
    /// huge page as long as the memory is not in pieces.
    pub(super) fn allocate(self: &Arc<Self>, asked: usize) -> Option<Arc<Allocation>> {
        let is_large = asked >= HUGE_PAGE_BYTES;
        let unit = if is_large { HUGE_PAGE_BYTES } else { PAGE_BYTES };
        let bytes = asked.max(1).checked_next_multiple_of(unit)?;
        let mut runs = self.lock();
        let mut fitting = runs.free.iter().filter(|(_, run)| run.len() >= bytes).map(|(at, _)| *at);
        let at = if is_large { fitting.next() } else { fitting.next_back() }?;
        let run = runs.free.remove(&at)?;
        let (slot, rest) = if is_large {
            run.split_at(bytes)
        } else {
            let kept = run.len() - bytes;
            let (rest, slot) = run.split_at(kept);
            (slot, rest)
        };
        if !rest.is_empty() {
            runs.free.insert(rest.place().1, rest);
        }
        let place = slot.place().1;
        let arena = Arc::clone(self);
        let made = Arc::new(Allocation { arena, place, asked, slot: Mutex::new(Some(slot)) });
        runs.lent.insert(place, Arc::downgrade(&made));
        Some(made)
    }

    /// The run that begins at this address, if a tensor lives there.
    pub(super) fn at(&self, address: usize) -> Option<Arc<Allocation>> {
        let place = address.checked_sub(self.region.address().addr())?;
        self.lock().lent.get(&place)?.upgrade()
    }

    /// Bytes that are free, and of the longest run among them.
    #[must_use]
    pub fn free_bytes(&self) -> (usize, usize) {
        let runs = self.lock();
        let lengths = || runs.free.values().map(|run| run.len());
        (lengths().sum(), lengths().max().unwrap_or(0))
    }

    fn take_back(&self, place: usize, slot: Option<Slot>) {
        if std::process::id() != self.process {
            // The memory is not mapped in a fork, and the lock may have been held when it was made.
            return std::mem::forget(slot);
        }
        let mut runs = self.lock();
        runs.lent.remove(&place);
        // A slot that a failed engine kept never comes back: its run is given up.
        let Some(mut run) = slot else { return };
        if let Some((before, bytes)) =
            runs.free.range(..place).next_back().map(|(at, run)| (*at, run.len()))
            && before + bytes == place
            && let Some(front) = runs.free.remove(&before)
        {
            run = front.join(run);
        }
        let place = run.place().1;
        if let Some(next) = runs.free.remove(&(place + run.len())) {
            run = run.join(next);
        }
        runs.free.insert(place, run);
    }

    fn lock(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Allocation {
    /// Bytes of the tensor that it was made for.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.asked
    }

    /// Address of the first byte, valid while this lives; `None` while a transfer has the memory.
    #[must_use]
    pub fn address(&self) -> Option<*mut u8> {
        self.lock().as_mut().map(Slot::address)
    }

    /// The memory, for a transfer; `None` while another one has it.
    pub(super) fn take(&self) -> Option<Slot> {
        self.lock().take()
    }

    /// The memory is back.
    pub(super) fn put_back(&self, slot: Slot) {
        *self.lock() = Some(slot);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Slot>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let slot = self.slot.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        self.arena.take_back(self.place, slot);
    }
}

#[cfg(test)]
mod tests;
