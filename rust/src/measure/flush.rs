//! How long it takes until writes are on stable storage.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::io::engine::{Engine, Operation, perform_once};
use crate::measure::scratch::ScratchFile;
use crate::measure::transfers::{Form, Limit, Traffic, Transfers};
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::units::PAGE_BYTES;

/// Time of each flush, in the order they were made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlushLatency {
    /// `fdatasync` after 4 MiB were written.
    pub sync: Vec<Duration>,
    /// A durable write of 4 KiB.
    pub durable_write: Vec<Duration>,
}

impl ScratchFile {
    /// How long it takes until writes are on stable storage: `fdatasync` after 4 MiB were written,
    /// and a 4 KiB write that is durable by itself, as a commit makes one. At most `count` of each,
    /// and no more after `time`.
    ///
    /// # Errors
    /// `Io`, `Invalid` for a file smaller than 8 MiB.
    pub fn flush_latency(
        &self,
        engine: &Arc<dyn Engine>,
        count: usize,
        time: Duration,
    ) -> Result<FlushLatency> {
        const DIRTY_BYTES: usize = 4 << 20;
        let form = Form { bytes: DIRTY_BYTES, depth: 1 };
        let transfers = Transfers::new(engine, form)?;
        let mut page = Some(Slot::standalone(PAGE_BYTES, &Ledger::new(), "bench")?);
        if let Some(page) = &mut page {
            page.copy_from_slice(&self.contents[..PAGE_BYTES]);
        }
        let (start, mut found) = (Instant::now(), FlushLatency::default());
        for number in 0..count {
            if start.elapsed() >= time {
                break;
            }
            let offset = (number * DIRTY_BYTES) as u64;
            transfers.run(self, Traffic::Write, offset, Limit::bytes(DIRTY_BYTES as u64))?;
            let begin = Instant::now();
            perform_once(&**engine, Operation::Sync, &self.file, 0, None, 0).1?;
            found.sync.push(begin.elapsed());
            // Always the start of a period, so that the contents stay what they are.
            let place = offset % self.bytes;
            let begin = Instant::now();
            let durable = Operation::WriteDurable;
            let (back, result) =
                perform_once(&**engine, durable, &self.file, place, page, PAGE_BYTES);
            result?;
            found.durable_write.push(begin.elapsed());
            page = back;
        }
        Ok(found)
    }
}
