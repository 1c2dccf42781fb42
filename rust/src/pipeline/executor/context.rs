//! What every part of the executor works with and none of them changes.

use std::sync::Arc;
use std::time::Instant;

use rayon::ThreadPool;

use crate::error::{Error, Result};
use crate::memory::pool::Pool;
use crate::memory::slot::Slot;
use crate::optimizer::kernel::Kernel;
use crate::optimizer::norm::squares_of_runs;
use crate::pipeline::events::Lane;
use crate::pipeline::events::Recorder;
use crate::pipeline::options::Options;
use crate::pipeline::shared::Shared;
use crate::pipeline::stalls::Timings;
use crate::pipeline::update::Settings;
use crate::store::Store;
use crate::store::checksum::{self, Binding, Mismatch};
use crate::store::layout::Layout;
use crate::units::{Group, to_usize};

pub(super) struct Context {
    pub(super) store: Arc<Store>,
    /// The store's layout by what one buffer holds: records, or chunks.
    pub(super) units: Arc<Layout>,
    pub(super) pool: Pool,
    pub(super) shared: Arc<Shared>,
    pub(super) workers: ThreadPool,
    pub(super) kernel: Kernel,
    pub(super) settings: Settings,
}

impl Context {
    pub(super) fn new(
        store: Arc<Store>,
        pool: Pool,
        options: &Options,
        shared: Arc<Shared>,
    ) -> Result<Self> {
        // Said in full: rayon's own default can be changed from outside.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = if options.threads == 0 { cores } else { options.threads };
        let workers = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("mt-adamw-{index}"))
            .build()
            .map_err(|e| Error::invalid(format!("cannot start the update threads: {e}")))?;
        Ok(Self {
            settings: Settings::new(store.manifest(), store.layout(), &options.tensors)?,
            units: Arc::clone(store.units(options.unit)),
            kernel: options.kernel.unwrap_or_else(Kernel::detect),
            store,
            pool,
            shared,
            workers,
        })
    }

    pub(super) fn events(&self) -> &Recorder {
        &self.shared.events
    }

    /// The unit that a chunk belongs to.
    pub(super) fn unit_of(&self, chunk: usize) -> usize {
        self.units.chunks()[chunk].record
    }

    /// A unit's buffer, cut at its chunks.
    pub(super) fn cut_at_chunks(&self, unit: usize, mut rest: Slot) -> Vec<Option<Slot>> {
        let cut = |chunk: usize| {
            let at = rest.split_off(self.units.chunks()[chunk].extent_bytes(Group::Weight));
            Some(std::mem::replace(&mut rest, at))
        };
        self.units.records()[unit].clone().map(cut).collect()
    }

    /// Verifies what was read.
    pub(super) fn verify(
        &self,
        chunk: usize,
        binding: &Binding,
        sums: &[u32],
        bytes: &[u8],
    ) -> Result<(), Mismatch> {
        let (start, began) = (Instant::now(), self.events().now());
        let outcome = self.workers.install(|| checksum::verify(binding, bytes, sums));
        Timings::add(&self.shared.timings.verify, start);
        self.events().record(Lane::Verify, "verify", Some(chunk), began);
        outcome
    }

    /// Counts a unit's gradient into the norm of step `number`.
    ///
    /// # Errors
    /// `NotFinite`.
    pub(super) fn add_squares(&self, number: u64, unit: usize, gradient: &[u8]) -> Result {
        let layout = self.store.layout();
        let chunks = self.units.records()[unit].clone();
        let tensors = self.settings.tensors(layout, chunks.clone());
        let runs = self.workers.install(|| {
            let parameters = tensors.last().map_or(0, |tensor| tensor.end);
            let values = bytemuck::cast_slice(&gradient[..parameters * size_of::<f32>()]);
            squares_of_runs(self.kernel, &tensors, values)
        });
        if !runs.iter().all(|run| run.is_finite()) {
            let record = layout.chunks()[chunks.start].record;
            let record = self.store.manifest().records[record].name.clone();
            return Err(Error::NotFinite { record });
        }
        let mut state = self.shared.lock();
        // Else nobody has asked for those of that step.
        if state.newest == number {
            state.squares.add(layout, chunks, runs);
        }
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// A unit has no gradient in step `number`.
    pub(super) fn no_squares(&self, number: u64) {
        let mut state = self.shared.lock();
        if state.newest == number {
            state.squares.units += 1;
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Gives a load's weights to the caller who waits for them; if nobody does any more, to the pool.
    pub(super) fn hand_over(&self, number: u64, weights: Slot) {
        let mut state = self.shared.lock();
        let index = number.checked_sub(state.first_load).map(to_usize);
        if let Some(entry) = index.and_then(|index| state.loads.get_mut(index)) {
            entry.weights = Some(weights);
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}
