//! Memory that the kernel may read or write behind our back: regions, and slots cut from them.
//!
//! A [`Slot`] is the exclusive right to a run of bytes. It is neither `Clone` nor `Copy`: it moves
//! into an I/O operation and comes back with the completion, also on error, so nothing can touch
//! bytes that are in flight. A slot can be split, and the parts joined again; when the last part is
//! dropped, the bytes return to the free list they were taken from. The region outlives its slots.
#![allow(unsafe_code, reason = "the one place where mapped memory becomes slices")]

use std::ffi::c_void;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::mm;

use crate::error::{Error, Result};
use crate::memory::huge_pages::HugePages;
use crate::memory::ledger::{Entry, Ledger};
use crate::units::{HUGE_PAGE_BYTES, PAGE_BYTES};

/// One anonymous mapping: zeroed, 2 MiB aligned, asked to be huge pages, not inherited by forks.
pub struct Region {
    start: NonNull<u8>,
    bytes: usize,
    locked: bool,
    _entries: Vec<Entry>,
}

// SAFETY: a region is plain memory owned by this value alone (mapped in `new`, unmapped in `drop`);
// nothing about it is tied to a thread.
unsafe impl Send for Region {}
// SAFETY: a shared region gives out no bytes; only slots do, and each byte belongs to one slot.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `bytes` (rounded up to 4 KiB) and enters them under `account`.
    ///
    /// # Errors
    /// `NoMemory` when the system refuses the mapping.
    pub fn new(bytes: usize, ledger: &Ledger, account: &str) -> Result<Arc<Self>> {
        let bytes = bytes.max(1).next_multiple_of(PAGE_BYTES);
        Self::map(bytes, || vec![ledger.enter(account, bytes as u64)])
    }

    /// Maps `bytes`, a multiple of 4 KiB, and enters them in the ledger once they are there.
    fn map(bytes: usize, enter: impl FnOnce() -> Vec<Entry>) -> Result<Arc<Self>> {
        let failed = |source: rustix::io::Errno| Error::NoMemory {
            needed: bytes as u64,
            source: Arc::new(source.into()),
        };
        // Huge pages need a 2 MiB aligned start: map more, then give the surplus back.
        let surplus = if bytes >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 0 };
        // SAFETY: a fresh private anonymous mapping at an address that the kernel chooses.
        let mapped = unsafe {
            mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes + surplus,
                mm::ProtFlags::READ | mm::ProtFlags::WRITE,
                mm::MapFlags::PRIVATE | mm::MapFlags::NORESERVE,
            )
        }
        .map_err(failed)?
        .cast::<u8>();
        let front = if surplus == 0 { 0 } else { mapped.align_offset(HUGE_PAGE_BYTES) };
        let start = mapped.wrapping_add(front);
        unmap(mapped, front);
        unmap(start.wrapping_add(bytes), surplus - front);
        let start = NonNull::new(start).ok_or_else(|| Error::invalid("mmap returned null"))?;
        for advice in
            [mm::Advice::LinuxHugepage, mm::Advice::LinuxDontFork, mm::Advice::LinuxDontDump]
        {
            // SAFETY: the range is the mapping made above, and none of these advices drops content.
            // A kernel without one of them refuses it, which costs speed or a larger core dump only.
            let _ = unsafe { mm::madvise(start.as_ptr().cast(), bytes, advice) };
        }
        // SAFETY: the range is the mapping made above; locking changes residency, not content.
        let locked = unsafe { mm::mlock(start.as_ptr().cast(), bytes) }.is_ok();
        Ok(Arc::new(Self { start, bytes, locked, _entries: enter() }))
    }

    /// Address of the first byte, for registering the region with the kernel.
    #[must_use]
    pub fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Gives every page its memory now, in huge pages where the kernel can make them; content stays.
    /// Done before the region is registered with a ring: pages that are pinned can no longer be moved.
    pub fn populate(&self) -> Option<HugePages> {
        if !self.locked {
            // SAFETY: the range is the region's own mapping; pages that exist are left as they are. A
            // kernel that refuses (before 5.14, or out of memory) leaves it to the first use.
            let _ = unsafe {
                mm::madvise(self.start.as_ptr().cast(), self.bytes, mm::Advice::LinuxPopulateWrite)
            };
        }
        let found = self.huge_pages().filter(|found| !found.is_enough());
        if found.is_some() {
            let whole = self.bytes / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
            // SAFETY: the range lies in the region's own mapping; collapsing copies the content into huge
            // pages behind the same addresses. A kernel before 6.1 refuses it, which costs speed only.
            let _ =
                unsafe { libc::madvise(self.start.as_ptr().cast(), whole, libc::MADV_COLLAPSE) };
        }
        self.huge_pages()
    }

    /// How much of it lies in huge pages now; `None` for less than 2 MiB.
    #[must_use]
    pub fn huge_pages(&self) -> Option<HugePages> {
        let start = self.start.as_ptr().addr();
        HugePages::of(start..start + self.bytes)
    }

    /// Whether the memory is locked (RLIMIT_MEMLOCK allowed it).
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.locked
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("start", &self.start).field("bytes", &self.bytes).finish()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        unmap(self.start.as_ptr(), self.bytes);
    }
}

fn unmap(start: *mut u8, bytes: usize) {
    if bytes > 0 {
        // SAFETY: called by `Region` alone, for parts of its own mapping to which no slot points:
        // the surplus in `new`, and the whole in `drop`, which runs after every slot's `Arc` is gone.
        let _ = unsafe { mm::munmap(start.cast::<c_void>(), bytes) };
    }
}

/// What one account has of a region.
#[derive(Clone, Copy, Debug)]
pub struct Share<'a> {
    /// Its name in the ledger.
    pub account: &'a str,
    /// `(slot bytes, count)` of each of its lists.
    pub sizes: &'a [(usize, usize)],
    /// Whether only the first list starts at a 2 MiB border.
    pub packed: bool,
}

/// A fixed number of equal slots of one region. Taking one never allocates.
#[derive(Clone, Debug)]
pub struct SlotList {
    region: Arc<Region>,
    first: usize,
    slot_bytes: usize,
    count: usize,
    give_back: Sender<usize>,
    free: Receiver<usize>,
}

impl SlotList {
    /// Cuts one region into lists, in order: `(slot bytes, count)` each; slot sizes are multiples of
    /// 4 KiB. Each list starts at a 2 MiB border so that its slots keep their huge pages.
    ///
    /// # Errors
    /// `Io` when the memory cannot be mapped, `Invalid` for a slot size that is no multiple of 4 KiB.
    pub fn cut(
        sizes: &[(usize, usize)],
        ledger: &Ledger,
        account: &str,
    ) -> Result<(Arc<Region>, Vec<Self>)> {
        let (region, mut lists) =
            Self::cut_shares(&[Share { account, sizes, packed: false }], ledger)?;
        Ok((region, lists.pop().unwrap_or_default()))
    }

    /// Cuts one region for several accounts, in order; the lists of each.
    ///
    /// # Errors
    /// As `cut`.
    pub fn cut_shares(
        shares: &[Share<'_>],
        ledger: &Ledger,
    ) -> Result<(Arc<Region>, Vec<Vec<Self>>)> {
        let too_large = || Error::invalid("the pool is larger than the address space");
        let mut total = 0_usize;
        let mut starts = Vec::new();
        let mut ends = Vec::with_capacity(shares.len());
        for share in shares {
            for (index, &(slot_bytes, count)) in share.sizes.iter().enumerate() {
                if !slot_bytes.is_multiple_of(PAGE_BYTES) {
                    return Err(Error::invalid(format!(
                        "slot of {slot_bytes} bytes is no multiple of {PAGE_BYTES}"
                    )));
                }
                if slot_bytes >= HUGE_PAGE_BYTES && !(share.packed && index > 0) {
                    total =
                        total.checked_next_multiple_of(HUGE_PAGE_BYTES).ok_or_else(too_large)?;
                }
                starts.push(total);
                let bytes = slot_bytes.checked_mul(count).ok_or_else(too_large)?;
                total = total.checked_add(bytes).ok_or_else(too_large)?;
            }
            ends.push(total);
        }
        // A share that ends the region takes what rounding adds to it, too.
        let whole = total.max(1).next_multiple_of(PAGE_BYTES);
        if let Some(last) = ends.last_mut() {
            *last = whole;
        }
        let region = Region::map(whole, || {
            let firsts = std::iter::once(0).chain(ends.iter().copied());
            let entry = |((share, end), first): ((&Share<'_>, &usize), usize)| {
                ledger.enter(share.account, (end - first) as u64)
            };
            shares.iter().zip(&ends).zip(firsts).map(entry).collect()
        })?;
        let mut starts = starts.into_iter();
        let lists = shares
            .iter()
            .map(|share| {
                share
                    .sizes
                    .iter()
                    .zip(&mut starts)
                    .map(|(&(bytes, count), first)| Self::over(&region, first, bytes, count))
                    .collect()
            })
            .collect();
        Ok((region, lists))
    }

    fn over(region: &Arc<Region>, first: usize, slot_bytes: usize, count: usize) -> Self {
        let (give_back, free) = bounded(count);
        for index in 0..count {
            // The channel holds `count` and is new.
            let _ = give_back.try_send(index);
        }
        Self { region: Arc::clone(region), first, slot_bytes, count, give_back, free }
    }

    /// A free slot, or `None`.
    #[must_use]
    pub fn try_take(&self) -> Option<Slot> {
        self.free.try_recv().ok().map(|index| self.lease(index))
    }

    /// A free slot, waiting for one up to `timeout`.
    #[must_use]
    pub fn take(&self, timeout: Duration) -> Option<Slot> {
        self.free.recv_timeout(timeout).ok().map(|index| self.lease(index))
    }

    /// Number of free slots now.
    #[must_use]
    pub fn free_count(&self) -> usize {
        self.free.len()
    }

    /// Number of slots.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of each slot.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Whether a slot is of this list.
    #[must_use]
    pub fn owns(&self, slot: &Slot) -> bool {
        let bytes = self.first..self.first + self.count * self.slot_bytes;
        Arc::ptr_eq(&self.region, &slot.lease.region) && bytes.contains(&slot.start)
    }

    /// Becomes readable when a slot is free; for waiting on several things at once. A reader must
    /// not take messages from it: they are slots.
    #[must_use]
    pub fn availability(&self) -> &Receiver<usize> {
        &self.free
    }

    fn lease(&self, index: usize) -> Slot {
        // An index is in the channel exactly while no lease for it exists: it is sent once in `over`
        // and once by each lease's drop, and received only here.
        let home = Some((self.give_back.clone(), index));
        let lease = Arc::new(Lease { region: Arc::clone(&self.region), home });
        Slot { lease, start: self.first + index * self.slot_bytes, bytes: self.slot_bytes }
    }
}

#[derive(Debug)]
struct Lease {
    region: Arc<Region>,
    home: Option<(Sender<usize>, usize)>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some((give_back, index)) = self.home.take() {
            // The channel has room for every index of its list; a dropped list needs none back.
            let _ = give_back.try_send(index);
        }
    }
}

/// The exclusive right to a run of bytes of a region.
#[derive(Debug)]
pub struct Slot {
    lease: Arc<Lease>,
    start: usize,
    bytes: usize,
}

impl Slot {
    /// Memory of its own, `bytes` rounded up to 4 KiB, zeroed, entered under `account`.
    ///
    /// # Errors
    /// `Io` when the system refuses the mapping.
    pub fn standalone(bytes: usize, ledger: &Ledger, account: &str) -> Result<Self> {
        let region = Region::new(bytes, ledger, account)?;
        let bytes = region.bytes;
        // The region is new and nobody else cuts slots from it.
        Ok(Self { lease: Arc::new(Lease { region, home: None }), start: 0, bytes })
    }

    /// Address of the first byte. What the address is used for must end before the slot is dropped
    /// or moved on: the operations that use it own the slot.
    #[must_use]
    pub fn address(&mut self) -> *mut u8 {
        self.lease.region.start.as_ptr().wrapping_add(self.start)
    }

    /// The first `at` bytes, and the rest.
    ///
    /// # Panics
    /// When `at` is beyond the end.
    #[must_use]
    pub fn split_at(mut self, at: usize) -> (Self, Self) {
        let rest = self.split_off(at);
        (self, rest)
    }

    /// Keeps the first `at` bytes and returns the rest.
    ///
    /// # Panics
    /// When `at` is beyond the end.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(at <= self.bytes, "split at {at} of {} bytes", self.bytes);
        let rest =
            Self { lease: Arc::clone(&self.lease), start: self.start + at, bytes: self.bytes - at };
        self.bytes = at;
        rest
    }

    /// This slot and the one right behind it as one.
    ///
    /// # Panics
    /// When `next` is not the neighbour that a split made.
    #[must_use]
    pub fn join(self, next: Self) -> Self {
        assert!(
            Arc::ptr_eq(&self.lease, &next.lease) && self.start + self.bytes == next.start,
            "only neighbours of one split can be joined"
        );
        Self { bytes: self.bytes + next.bytes, ..self }
    }

    /// The region that the bytes lie in, and their offset in it.
    #[must_use]
    pub fn place(&self) -> (&Arc<Region>, usize) {
        (&self.lease.region, self.start)
    }
}

impl Deref for Slot {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let start = self.lease.region.start.as_ptr().wrapping_add(self.start);
        // SAFETY: the run lies inside the region (checked by `cut`, `split_at`), is initialised (the
        // mapping was zeroed) and belongs to this slot alone: lists give an index out once, splits
        // are disjoint, and operations in flight own their slot.
        unsafe { std::slice::from_raw_parts(start, self.bytes) }
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = self.address();
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(start, self.bytes) }
    }
}

#[cfg(test)]
mod tests;
