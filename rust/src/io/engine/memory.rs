//! Drives in RAM, for tests that open a store a hundred thousand times. Pages that were never
//! written are zero.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Result;
use crate::io::engine::{Counters, Engine, Operation, Request};
use crate::memory::slot::Region;
use crate::units::{PAGE_BYTES, to_usize};

/// Where a drive's bytes begin among those of all drives.
const DRIVE_BYTES: u64 = 1 << 48;

type Page = Arc<[u8; PAGE_BYTES]>;
type Pages = HashMap<u64, Page>;

#[derive(Debug, Default)]
pub(crate) struct Memory {
    pages: Mutex<Pages>,
    counters: Counters,
}

impl Memory {
    /// A drive with the same bytes; cheap, because pages are shared until they are written.
    pub(crate) fn copy(&self) -> Self {
        Self { pages: Mutex::new(self.pages().clone()), counters: Counters::default() }
    }

    /// The bytes at a place, whatever its alignment.
    pub(crate) fn bytes(&self, place: Range<u64>) -> Vec<u8> {
        let pages = self.pages();
        let mut bytes = Vec::new();
        for (page, part) in parts(place) {
            match pages.get(&page) {
                Some(page) => bytes.extend_from_slice(&page[part]),
                None => bytes.resize(bytes.len() + part.len(), 0),
            }
        }
        bytes
    }

    /// Changes bytes behind the store's back.
    pub(crate) fn overwrite(&self, offset: u64, mut bytes: &[u8]) {
        let mut pages = self.pages();
        for (page, part) in parts(offset..offset + bytes.len() as u64) {
            let (front, rest) = bytes.split_at(part.len());
            let page = pages.entry(page).or_insert_with(|| Arc::new([0; PAGE_BYTES]));
            Arc::make_mut(page)[part].copy_from_slice(front);
            bytes = rest;
        }
    }

    /// Whether both drives hold the same bytes there; quick where they still share their pages.
    pub(crate) fn agrees(&self, other: &Self, place: Range<u64>) -> bool {
        parts(place).all(|(page, part)| {
            let (here, there) = (self.page(page), other.page(page));
            match (&here, &there) {
                (Some(here), Some(there)) if Arc::ptr_eq(here, there) => true,
                (None, None) => true,
                _ => {
                    let zeros = [0; PAGE_BYTES];
                    let of = |page: &Option<Page>| page.as_deref().copied().unwrap_or(zeros);
                    of(&here)[part.clone()] == of(&there)[part]
                }
            }
        })
    }

    fn page(&self, offset: u64) -> Option<Page> {
        self.pages().get(&offset).cloned()
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn submit(&self, mut request: Request) {
        let drive = request.file.drive() as u64;
        let (offset, bytes) = (drive * DRIVE_BYTES + request.offset, request.bytes);
        let mut pages = self.pages();
        if let Some(slot) = &mut request.slot {
            for (index, bytes) in slot[..bytes].chunks_exact_mut(PAGE_BYTES).enumerate() {
                let place = offset + (index * PAGE_BYTES) as u64;
                if request.operation != Operation::Read {
                    let mut page = [0; PAGE_BYTES];
                    page.copy_from_slice(bytes);
                    pages.insert(place, Arc::new(page));
                } else if let Some(page) = pages.get(&place) {
                    bytes.copy_from_slice(&page[..]);
                } else {
                    bytes.fill(0);
                }
            }
        }
        drop(pages);
        self.counters.add(request.operation, bytes as u64);
        request.complete(Ok(()));
    }

    fn register(&self, _region: &Arc<Region>) -> Result<(), String> {
        Ok(())
    }

    fn unregister(&self) {}

    fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// The pages that a place touches, each with the part of it that belongs to the place.
fn parts(place: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let page_bytes = PAGE_BYTES as u64;
    (place.start / page_bytes..place.end.div_ceil(page_bytes)).map(move |index| {
        let page = index * page_bytes;
        let start = to_usize(place.start.saturating_sub(page));
        (page, start..to_usize((place.end - page).min(page_bytes)))
    })
}
