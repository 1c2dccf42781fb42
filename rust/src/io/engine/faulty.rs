//! An engine that goes wrong on purpose, over any other: for the crash model and for tests that want
//! to see what a user sees when a drive fails.
//!
//! It numbers operations, lets the n-th fail or stop half-way, and keeps apart what the drive shows
//! (live bytes, in the engine beneath) and what would be left after a power cut (durable bytes):
//! pages written and not flushed are remembered with every version since the last flush, and
//! [`Faulty::cut_power`] lets any mixture of them survive, torn at sectors. All choices come from a
//! seed.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Result;
use crate::io::engine::{self, Counters, Engine, Operation, Request};
use crate::io::file::DirectFile;
use crate::memory::ledger::Ledger;
use crate::memory::slot::{Region, Slot};
use crate::units::PAGE_BYTES;

/// What a drive writes as a whole or not at all, in bytes.
pub(crate) const SECTOR_BYTES: usize = 512;

/// How an operation goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this error number; nothing is transferred.
    Fail(i32),
    /// Half of its pages are transferred, then it fails with this error number.
    Short(i32),
    /// The power goes while it is in flight.
    PowerCut,
}

/// An operation, by its number in the order of submission, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Point {
    /// Among all operations.
    Any(u64),
    /// Among those of one kind.
    Of(Operation, u64),
}

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    /// Of all random choices.
    pub seed: u64,
    /// Where, and how.
    pub faults: Vec<(Point, Fault)>,
    /// The drive says that it flushed, and did not.
    pub ignores_flushes: bool,
}

/// An engine over another one, and the drive that it stands for. It outlives the stores that are
/// opened on it one after another, as a drive does.
#[derive(Debug)]
pub(crate) struct Faulty {
    inner: Arc<dyn Engine>,
    drive: Mutex<Drive>,
}

#[derive(Debug)]
struct Drive {
    rng: fastrand::Rng,
    faults: HashMap<Point, Fault>,
    ignores_flushes: bool,
    /// Operations wait for [`Faulty::deliver`] instead of being performed when they are submitted.
    by_hand: bool,
    operations: u64,
    of_kind: HashMap<Operation, u64>,
    queue: Vec<Queued>,
    /// Completed transfers so far.
    clock: u64,
    /// By drive and offset.
    unflushed: HashMap<(usize, u64), Versions>,
    /// By drive.
    files: HashMap<usize, Arc<DirectFile>>,
    is_off: bool,
    scratch: Option<Slot>,
}

#[derive(Debug)]
struct Queued {
    request: Request,
    points: [Point; 2],
    /// Transfers completed when it was submitted: a flush covers these and no others.
    submitted: u64,
}

type Page = Box<[u8; PAGE_BYTES]>;

/// A page that was written since the last flush: what is durable, and what came after it.
#[derive(Debug)]
struct Versions {
    durable: Page,
    newer: Vec<(u64, Page)>,
}

impl Faulty {
    /// An engine with these faults over `inner`; operations are performed when they are submitted.
    #[must_use]
    pub(crate) fn over(inner: Arc<dyn Engine>, plan: Plan) -> Self {
        let drive = Drive {
            rng: fastrand::Rng::with_seed(plan.seed),
            faults: plan.faults.into_iter().collect(),
            ignores_flushes: plan.ignores_flushes,
            by_hand: false,
            operations: 0,
            of_kind: HashMap::new(),
            queue: Vec::new(),
            clock: 0,
            unflushed: HashMap::new(),
            files: HashMap::new(),
            is_off: false,
            scratch: None,
        };
        Self { inner, drive: Mutex::new(drive) }
    }
}

/// What tests steer the drive by.
#[cfg(test)]
impl Faulty {
    /// From now on operations wait until they are delivered, or no longer.
    pub(crate) fn set_by_hand(&self, by_hand: bool) {
        self.lock().by_hand = by_hand;
    }

    /// Adds a fault at the operation that is `ahead` operations away; 0 is the next one.
    pub(crate) fn plan(&self, ahead: u64, fault: Fault) {
        let mut drive = self.lock();
        let point = Point::Any(drive.operations + ahead);
        drive.faults.insert(point, fault);
    }

    /// Forgets the faults that have not come about yet.
    pub(crate) fn clear_plan(&self) {
        self.lock().faults.clear();
    }

    /// Operations submitted so far.
    #[must_use]
    pub(crate) fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Operations that wait for their delivery.
    #[must_use]
    pub(crate) fn waiting(&self) -> usize {
        self.lock().queue.len()
    }

    /// Performs one of the waiting operations, any of them; `false` when there is none.
    pub(crate) fn deliver(&self) -> bool {
        let mut drive = self.lock();
        if drive.queue.is_empty() {
            return false;
        }
        let waiting = drive.queue.len();
        let index = drive.rng.usize(..waiting);
        let queued = drive.queue.swap_remove(index);
        self.perform(&mut drive, queued);
        true
    }

    /// The process that submitted them is killed: its writes in flight still land when they are
    /// delivered, but a flush, or the flush behind a durable write, may not happen any more.
    pub(crate) fn kill_owner(&self) {
        let mut drive = self.lock();
        let Drive { queue, rng, .. } = &mut *drive;
        queue.retain_mut(|queued| {
            let cut_short = rng.bool();
            if cut_short && queued.request.operation == Operation::Write {
                // Engines cut a transfer into pieces: some may never have been handed over.
                let pages = queued.request.bytes / PAGE_BYTES;
                queued.request.bytes = rng.usize(1..=pages) * PAGE_BYTES;
            }
            if cut_short && queued.request.operation == Operation::WriteDurable {
                queued.request.operation = Operation::Write;
            }
            !(cut_short && queued.request.operation == Operation::Sync)
        });
    }

    /// The power goes: of every sector that was written since the last flush, or is being written,
    /// any version may be the one that stays. Operations fail until [`Faulty::power_on`].
    pub(crate) fn cut_power(&self) {
        self.cut(&mut self.lock());
    }

    /// The machine starts again.
    pub(crate) fn power_on(&self) {
        self.lock().is_off = false;
    }

    /// Whether the power is off.
    #[must_use]
    pub(crate) fn is_off(&self) -> bool {
        self.lock().is_off
    }
}

impl Faulty {
    fn lock(&self) -> MutexGuard<'_, Drive> {
        self.drive.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn perform(&self, drive: &mut Drive, queued: Queued) {
        let Queued { mut request, points, submitted } = queued;
        if drive.is_off {
            return request.fail(no_power());
        }
        let fault = points.iter().find_map(|point| drive.faults.remove(point));
        let (limit, error) = match fault {
            None => (request.bytes, None),
            Some(Fault::Fail(code)) => (0, Some(code)),
            Some(Fault::Short(code)) => (request.bytes / PAGE_BYTES / 2 * PAGE_BYTES, Some(code)),
            Some(Fault::PowerCut) => {
                drive.queue.push(Queued { request, points, submitted });
                return self.cut(drive);
            }
        };
        let mut result = Ok(());
        if request.operation == Operation::Sync {
            if error.is_none() && !drive.ignores_flushes {
                drive.flush(request.file.drive(), submitted);
            }
        } else if limit > 0 {
            result = self.transfer(drive, &mut request, limit);
        }
        match error {
            Some(code) => request.fail(io::Error::from_raw_os_error(code)),
            None => request.complete(result),
        }
    }

    /// Transfers the first `bytes` of a request and takes note of what is not durable yet.
    fn transfer(&self, drive: &mut Drive, request: &mut Request, bytes: usize) -> Result {
        let writes = request.operation != Operation::Read;
        if writes {
            let slot = request.slot.as_deref().unwrap_or_default();
            self.remember(drive, &request.file, request.offset, &slot[..bytes])?;
            if request.operation == Operation::WriteDurable && !drive.ignores_flushes {
                for page in pages(request.offset, bytes) {
                    drive.unflushed.remove(&(request.file.drive(), page));
                }
            }
        }
        drive.clock += 1;
        // What is durable is our matter; the engine beneath only moves bytes.
        let operation = if writes { Operation::Write } else { Operation::Read };
        let (slot, result) = engine::perform_once(
            &*self.inner,
            operation,
            &request.file,
            request.offset,
            request.slot.take(),
            bytes,
        );
        request.slot = slot;
        result
    }

    /// Keeps the durable bytes of pages that are about to be written, and the new ones.
    fn remember(
        &self,
        drive: &mut Drive,
        file: &Arc<DirectFile>,
        offset: u64,
        bytes: &[u8],
    ) -> Result {
        let number = file.drive();
        drive.files.insert(number, Arc::clone(file));
        let clock = drive.clock + 1;
        for (page, new) in pages(offset, bytes.len()).zip(bytes.chunks_exact(PAGE_BYTES)) {
            if !drive.unflushed.contains_key(&(number, page)) {
                let durable = self.read_page(drive, file, page)?;
                drive.unflushed.insert((number, page), Versions { durable, newer: Vec::new() });
            }
            if let Some(versions) = drive.unflushed.get_mut(&(number, page)) {
                versions.newer.push((clock, boxed(new)));
            }
        }
        Ok(())
    }

    fn cut(&self, drive: &mut Drive) {
        for queued in std::mem::take(&mut drive.queue) {
            let Queued { mut request, .. } = queued;
            if matches!(request.operation, Operation::Write | Operation::WriteDurable) {
                let slot = request.slot.as_deref_mut().unwrap_or_default();
                // A page that cannot be read beneath cannot be torn either.
                let _ = self.remember(drive, &request.file, request.offset, &slot[..request.bytes]);
            }
            request.fail(no_power());
        }
        drive.is_off = true;
        let mut unflushed: Vec<_> = std::mem::take(&mut drive.unflushed).into_iter().collect();
        // A map has no order of its own, and the choices must follow from the seed alone.
        unflushed.sort_by_key(|(place, _)| *place);
        for (place, Versions { durable, newer }) in unflushed {
            let mut survived = durable;
            // As often as not the page is whole: the newest, the oldest or one in between.
            let whole = drive.rng.bool().then(|| drive.rng.usize(..=newer.len()));
            for sector in 0..PAGE_BYTES / SECTOR_BYTES {
                let version = whole.unwrap_or_else(|| drive.rng.usize(..=newer.len()));
                if version > 0 {
                    let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
                    survived[range.clone()].copy_from_slice(&newer[version - 1].1[range]);
                }
            }
            self.write_page(drive, place, &survived);
        }
    }

    fn read_page(&self, drive: &mut Drive, file: &Arc<DirectFile>, offset: u64) -> Result<Page> {
        let slot = drive.scratch()?;
        let (slot, result) = engine::perform_once(
            &*self.inner,
            Operation::Read,
            file,
            offset,
            Some(slot),
            PAGE_BYTES,
        );
        let page = slot.as_deref().map(boxed);
        drive.scratch = slot;
        result?;
        page.ok_or_else(|| crate::error::Error::invalid("the engine kept a slot"))
    }

    fn write_page(&self, drive: &mut Drive, (number, offset): (usize, u64), page: &Page) {
        let Some(file) = drive.files.get(&number).cloned() else { return };
        let Ok(mut slot) = drive.scratch() else { return };
        slot.copy_from_slice(&page[..]);
        let slot = Some(slot);
        drive.scratch =
            engine::perform_once(&*self.inner, Operation::Write, &file, offset, slot, PAGE_BYTES).0;
    }
}

impl Drive {
    /// Transfers to one of the drives that had completed by `until` are durable.
    fn flush(&mut self, number: usize, until: u64) {
        self.unflushed.retain(|(drive, _), versions| {
            if *drive != number {
                return true;
            }
            let flushed = versions.newer.iter().take_while(|(clock, _)| *clock <= until).count();
            if let Some((_, page)) = versions.newer.drain(..flushed).next_back() {
                versions.durable = page;
            }
            !versions.newer.is_empty()
        });
    }

    fn scratch(&mut self) -> Result<Slot> {
        match self.scratch.take() {
            Some(slot) => Ok(slot),
            None => Slot::standalone(PAGE_BYTES, &Ledger::new(), "faulty"),
        }
    }
}

impl Engine for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn submit(&self, request: Request) {
        if let Err(error) = request.validate() {
            return request.complete(Err(error));
        }
        let mut drive = self.lock();
        let of_kind = drive.of_kind.entry(request.operation).or_default();
        let kind = Point::Of(request.operation, *of_kind);
        *of_kind += 1;
        let points = [Point::Any(drive.operations), kind];
        let queued = Queued { request, points, submitted: drive.clock };
        drive.operations += 1;
        if drive.by_hand && !drive.is_off {
            drive.queue.push(queued);
        } else {
            self.perform(&mut drive, queued);
        }
    }

    fn register(&self, region: &Arc<Region>) -> Result<(), String> {
        self.inner.register(region)
    }

    fn unregister(&self) {
        self.inner.unregister();
    }

    fn counters(&self) -> &Counters {
        self.inner.counters()
    }
}

fn pages(offset: u64, bytes: usize) -> impl Iterator<Item = u64> {
    (0..bytes / PAGE_BYTES).map(move |page| offset + (page * PAGE_BYTES) as u64)
}

fn boxed(bytes: &[u8]) -> Page {
    let mut page = Box::new([0; PAGE_BYTES]);
    page.copy_from_slice(&bytes[..PAGE_BYTES]);
    page
}

fn no_power() -> io::Error {
    io::Error::other("the power is off")
}

#[cfg(test)]
mod tests;
