//! A drive in RAM, for tests that open a store a hundred thousand times. Pages that were never
//! written are zero.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::buffer::Region;
use crate::engine::{Counters, Engine, Operation, Request};
use crate::error::Result;
use crate::units::PAGE_BYTES;

type Pages = HashMap<u64, Arc<[u8; PAGE_BYTES]>>;

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

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn submit(&self, mut request: Request) {
        let (offset, bytes) = (request.offset, request.bytes);
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
