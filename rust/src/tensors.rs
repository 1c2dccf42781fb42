//! Checked tensors on a drive: put, get and commit, without training. For stores whose manifest says
//! content `tensors`; the file, its checksums, the copy rule and the commit are those of `store`.
//!
//! One thread owns all transfers ([`mover`]). A tensor in the store's own memory ([`arena`]) is read
//! without a copy: its slot goes into the transfer and comes back, while tensors may look into it all
//! the same. Whoever looks then sees old, new or mixed bytes, but never memory of another. What is put from
//! there is copied by that thread, and compared with the copy at the end: bytes that their owner changed
//! meanwhile fail the put, and no checksum is ever of other bytes than the drive was given. Who keeps all
//! tensors in the store's memory ([`RecordTensors::start_without_copies`]) changes none under way.

use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, unbounded};

use crate::error::{Error, Result};
use crate::io::engine::Operation;
use crate::memory::huge_pages::HugePages;
use crate::memory::slot::{Slot, SlotList};
use crate::store::Store;
use crate::store::layout::Content;
use crate::tensors::mover::{Command, Flight, Home, Mover};
use crate::tensors::ticket::Outcome;
use crate::units::{Group, HUGE_PAGE_BYTES, PAGE_BYTES};

mod arena;
mod mover;
#[cfg(test)]
mod tests;
mod ticket;

pub use arena::{Allocation, Arena};
pub use ticket::Transfer;

/// Slots through which tensors are copied, at most: half of them those that lie elsewhere, half what is put
/// from the store's own memory.
const STAGING_SLOTS: usize = 8;
/// At least so many: one of each.
const STAGING_SLOTS_MIN: usize = 2;

/// A put of a tensor that is copied chunk by chunk.
#[derive(Debug)]
pub struct Copied {
    done: Sender<Outcome>,
}

/// The front: tensors of one store.
#[derive(Debug)]
pub struct RecordTensors {
    store: Arc<Store>,
    arena: Arc<Arena>,
    staging: SlotList,
    commands: Sender<Command>,
    mover: Option<JoinHandle<()>>,
    registration: Option<String>,
    huge_pages: Option<HugePages>,
    process: u32,
}

impl RecordTensors {
    /// Maps the memory and starts the thread. Of `memory_bytes` up to a quarter is for copying
    /// tensors that lie elsewhere.
    ///
    /// # Errors
    /// `Format` for a store that holds something else, `Invalid` for too little memory, `Io`.
    pub fn start(store: Arc<Store>, memory_bytes: usize) -> Result<Self> {
        Self::spawn(Self::assemble(store, memory_bytes)?)
    }

    /// The same for who keeps all tensors in the store's memory: none of it is for copying, and it
    /// stands under `account`.
    ///
    /// # Errors
    /// As `start`.
    pub fn start_without_copies(
        store: Arc<Store>,
        memory_bytes: usize,
        account: &str,
    ) -> Result<Self> {
        store.check()?;
        let bytes = memory_bytes / PAGE_BYTES * PAGE_BYTES;
        if bytes == 0 {
            return Err(Error::invalid(format!(
                "memory of {memory_bytes} bytes: less than a page"
            )));
        }
        Self::spawn(Self::over(store, &[(PAGE_BYTES, 0), (PAGE_BYTES, 0), (bytes, 1)], account)?)
    }

    fn spawn((mut tensors, mover): (Self, Mover)) -> Result<Self> {
        let thread = std::thread::Builder::new()
            .name("mt-tensors".into())
            .spawn(move || mover.run())
            .map_err(|e| Error::io("start a thread of", "this process", 0, 0, e))?;
        tensors.mover = Some(thread);
        Ok(tensors)
    }

    /// Front and mover, without a thread.
    fn assemble(store: Arc<Store>, memory_bytes: usize) -> Result<(Self, Mover)> {
        store.check()?;
        let extents = store.layout().chunks().iter().map(|chunk| chunk.extent_bytes(Group::Weight));
        let chunk = extents.max().unwrap_or(PAGE_BYTES);
        let slots = (memory_bytes / 4 / chunk).clamp(STAGING_SLOTS_MIN, STAGING_SLOTS);
        let staging = (slots * chunk).next_multiple_of(HUGE_PAGE_BYTES);
        let rest = memory_bytes.saturating_sub(staging) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        if rest == 0 {
            let least =
                (STAGING_SLOTS_MIN * chunk).next_multiple_of(HUGE_PAGE_BYTES) + HUGE_PAGE_BYTES;
            return Err(Error::invalid(format!(
                "memory of {memory_bytes} bytes: this store needs {least} at least, two chunks of {chunk} and 2 MiB"
            )));
        }
        let for_puts = slots / 2;
        let sizes = [(chunk, slots - for_puts), (chunk, for_puts), (rest, 1)];
        Self::over(store, &sizes, "tensors")
    }

    /// Over memory of these sizes: slots to copy through what lies elsewhere, and what is put from here; the
    /// one run of all tensors.
    fn over(
        store: Arc<Store>,
        sizes: &[(usize, usize); 3],
        account: &str,
    ) -> Result<(Self, Mover)> {
        if store.manifest().content != Content::Tensors {
            return Err(Error::format(
                store.drives().path(),
                "this store holds a model in training, not tensors: use it through its run",
            ));
        }
        let (region, mut lists) = SlotList::cut(sizes, store.ledger(), account)?;
        let whole = lists.pop().and_then(|list| list.try_take());
        let (Some(whole), Some(copies), Some(staging)) = (whole, lists.pop(), lists.pop()) else {
            return Err(Error::invalid("the memory was cut into other parts"));
        };
        let huge_pages = region.populate();
        let registration = store.engine().0.register(&region).err();
        let (commands, inbox) = unbounded();
        let mover = Mover::new(Arc::clone(&store), inbox, copies);
        let (arena, process) = (Arena::over(whole), std::process::id());
        let front = Self {
            store,
            arena,
            staging,
            commands,
            mover: None,
            registration,
            huge_pages,
            process,
        };
        Ok((front, mover))
    }

    /// Memory for `bytes`, arbitrary content; `None` when no free run is as long.
    ///
    /// # Errors
    /// `Failed`, `UsedAfterFork`.
    pub fn allocate(&self, bytes: usize) -> Result<Option<Arc<Allocation>>> {
        self.store.check()?;
        Ok(self.arena.allocate(bytes))
    }

    /// The memory that begins at this address, if it is this store's.
    #[must_use]
    pub fn allocation_at(&self, address: usize) -> Option<Arc<Allocation>> {
        self.arena.at(address)
    }

    /// The memory beneath.
    #[must_use]
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Writes a whole tensor from memory of the store, in the background. Bytes of its last page behind
    /// the tensor are zeroed. From memory made for fewer bytes, of whole chunks, only the front of the
    /// tensor is written; the rest stays as it was.
    ///
    /// # Errors
    /// `BufferInUse` while another transfer has the memory; `Invalid`, `Failed`.
    pub fn put(&self, record: usize, memory: &Arc<Allocation>) -> Result<Transfer> {
        self.transfer(Operation::Write, record, memory)
    }

    /// Reads a whole tensor, or its front as in `put`, into memory of the store, and verifies it.
    ///
    /// # Errors
    /// As `put`.
    pub fn fill(&self, record: usize, memory: &Arc<Allocation>) -> Result<Transfer> {
        self.transfer(Operation::Read, record, memory)
    }

    fn transfer(
        &self,
        operation: Operation,
        record: usize,
        memory: &Arc<Allocation>,
    ) -> Result<Transfer> {
        let chunks = self.chunks(record)?;
        let layout = self.store.layout();
        let given = memory.asked();
        // What follows in its pages is zeroed, or overwritten.
        let Some((count, needed)) = self.front(record, given) else {
            let bytes = self.bytes(record);
            return Err(Error::invalid(format!(
                "record {record} takes memory made for {bytes} bytes or its first whole chunks, not {given}"
            )));
        };
        let chunks = chunks.start..chunks.start + count;
        let Some(slot) = memory.take() else {
            let what = format!("memory for tensor {}", self.store.manifest().records[record].name);
            return Err(Error::BufferInUse { what, exports: 1 });
        };
        let (mut left, rest) = slot.split_at(needed);
        if operation == Operation::Write {
            left[given..].fill(0);
        }
        let mut parts = Vec::with_capacity(chunks.len());
        for chunk in chunks.clone() {
            let part;
            (part, left) = left.split_at(layout.chunks()[chunk].extent_bytes(Group::Weight));
            parts.push(Some(part));
        }
        let home = Home::Allocation(Arc::clone(memory), left.join(rest));
        let (done, ticket) = Transfer::new(1);
        self.send(Command::Transfer(Flight::new(operation, chunks.start, parts, home, done)))?;
        Ok(ticket)
    }

    /// How many chunks hold the first `bytes` of a tensor, and the length of their extents; `None` unless
    /// that is all of it, or ends with a chunk.
    fn front(&self, record: usize, bytes: usize) -> Option<(usize, usize)> {
        let layout = self.store.layout();
        let chunks = layout.records().get(record)?.clone();
        if bytes == self.bytes(record) {
            return Some((chunks.len(), layout.record_weight_bytes(record)));
        }
        let mut end = 0;
        for (index, chunk) in layout.chunks()[chunks].iter().enumerate() {
            end += chunk.extent_bytes(Group::Weight);
            // The last chunk may be padded: only all of the tensor has it.
            if end == bytes && bytes <= self.bytes(record) {
                return Some((index + 1, end));
            }
        }
        None
    }

    /// Bytes of a tensor, without padding.
    #[must_use]
    pub fn bytes(&self, record: usize) -> usize {
        let tensor = self.store.manifest().tensors.get(record);
        tensor.and_then(|tensor| tensor.elements()).map_or(0, crate::units::to_usize)
    }

    /// Chunks of a tensor.
    ///
    /// # Errors
    /// `Invalid` when there is no such record; `Failed`, `UsedAfterFork`.
    pub fn chunks(&self, record: usize) -> Result<Range<usize>> {
        self.store.check()?;
        let records = self.store.layout().records();
        let count = records.len();
        records.get(record).cloned().ok_or_else(|| {
            Error::invalid(format!("record {record} does not exist; the store has {count}"))
        })
    }

    /// Slots to copy through, each for one chunk.
    #[must_use]
    pub fn staging(&self) -> &SlotList {
        &self.staging
    }

    /// Begins a put of chunks that are handed over one by one; its ticket ends with the last of them.
    #[must_use]
    pub fn start_copied(&self, chunks: &Range<usize>) -> (Copied, Transfer) {
        let (done, ticket) = Transfer::new(chunks.len());
        (Copied { done }, ticket)
    }

    /// Writes one chunk of it from a slot of [`staging`](Self::staging).
    ///
    /// # Errors
    /// `Failed`, `UsedAfterFork`.
    pub fn put_chunk(&self, put: &Copied, chunk: usize, slot: Slot) -> Result {
        self.transfer_chunk(Operation::Write, chunk, slot, Home::List, put.done.clone())
    }

    /// Says that these chunks of it will not be handed over.
    ///
    /// # Errors
    /// `Failed`, `UsedAfterFork`.
    pub fn give_up(&self, chunks: Range<usize>) -> Result {
        self.send(Command::Tear(chunks))
    }

    /// Reads one chunk; its ticket has the slot.
    ///
    /// # Errors
    /// `Failed`, `UsedAfterFork`.
    pub fn read_chunk(&self, chunk: usize, slot: Slot) -> Result<Transfer> {
        let (done, ticket) = Transfer::new(1);
        self.transfer_chunk(Operation::Read, chunk, slot, Home::Caller, done)?;
        Ok(ticket)
    }

    fn transfer_chunk(
        &self,
        operation: Operation,
        chunk: usize,
        slot: Slot,
        home: Home,
        done: Sender<Outcome>,
    ) -> Result {
        let bytes = self.store.layout().chunks()[chunk].extent_bytes(Group::Weight);
        let parts = vec![Some(slot.split_at(bytes).0)];
        self.send(Command::Transfer(Flight::new(operation, chunk, parts, home, done)))
    }

    /// Makes everything that was put before durable, all at once.
    ///
    /// # Errors
    /// `Failed`, `UsedAfterFork`.
    pub fn commit(&self) -> Result<Transfer> {
        let (done, ticket) = Transfer::new(1);
        self.send(Command::Commit(done)).map(|()| ticket)
    }

    /// Ends when everything that was asked for before has ended.
    ///
    /// # Errors
    /// `Failed`, `UsedAfterFork`.
    pub fn drain(&self) -> Result<Transfer> {
        let (done, ticket) = Transfer::new(1);
        self.send(Command::Drain(done)).map(|()| ticket)
    }

    /// The store beneath.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// How much of the memory lay in huge pages when it was made; `None` where the kernel does not say.
    #[must_use]
    pub fn huge_pages(&self) -> Option<HugePages> {
        self.huge_pages
    }

    /// Why the memory could not be registered with the kernel, if so; it costs CPU time only.
    #[must_use]
    pub fn registration_refused(&self) -> Option<&str> {
        self.registration.as_deref()
    }

    fn send(&self, command: Command) -> Result {
        self.store.check()?;
        let stopped = |_| Error::invalid("the thread of the store has stopped");
        self.commands.send(command).map_err(stopped)
    }
}

impl Drop for RecordTensors {
    /// What was asked for still ends; what was not committed is dropped, but for scratch stores.
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // A fork has no thread to wait for.
            std::mem::forget(self.mover.take());
            return;
        }
        let _ = self.commands.send(Command::Stop);
        if let Some(mover) = self.mover.take() {
            let _ = mover.join();
        }
        self.store.engine().0.unregister();
    }
}
