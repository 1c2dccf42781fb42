//! A small model, its training in memory, and a store that is trained through the pipeline.

use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::io::engine::choice::Choice;
use crate::memory::ledger::Ledger;
use crate::memory::pool::{self, BufferKind, PoolSizes};
use crate::memory::slot::Slot;
use crate::optimizer::adamw::AdamW;
use crate::optimizer::kernel::Kernel;
use crate::optimizer::split;
use crate::pipeline::{
    After, CheckedSchedule, ChunkOp, GradientFiles, Kind, Options, Pipeline, Residents,
    TensorSettings, chunk_slot_bytes,
};
use crate::store::layout::tests::manifest;
use crate::store::{OpenOptions, Store, StoreCreator};
use crate::units::{Group, PAGE_BYTES, StateFormat, Unit};

pub(super) const LONG: Duration = Duration::from_secs(60);

pub(super) fn adamw(step: u64) -> AdamW {
    AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, step }
}

/// Records of a small model: block, larger record, block with a short last chunk.
pub(super) const RECORDS: [u64; 3] = [3 * 4096, 5 * 4096 + 256, 2 * 4096 + 128];

pub(super) fn weight(record: usize, index: usize) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let value = ((index * 7 + record * 13) % 1009) as f32;
    value / 505.0 - 1.0
}

pub(super) fn gradient(step: u64, record: usize, index: usize) -> f32 {
    weight(record + 1, index + usize::try_from(step).expect("small") * 31) * 0.1
}

/// The same training in memory: weight, exp_avg, exp_avg_sq by record.
pub(super) struct InMemory {
    weight: Vec<Vec<f32>>,
    exp_avg: Vec<Vec<f32>>,
    exp_avg_sq: Vec<Vec<f32>>,
}

impl InMemory {
    pub(super) fn new() -> Self {
        let zeros = || RECORDS.iter().map(|n| vec![0.0; len(*n)]).collect();
        let weight = (0..3).map(|r| (0..len(RECORDS[r])).map(|i| weight(r, i)).collect()).collect();
        Self { weight, exp_avg: zeros(), exp_avg_sq: zeros() }
    }

    pub(super) fn step(&mut self, step: u64, gradient_scale: f32) {
        for (record, &parameters) in RECORDS.iter().enumerate() {
            let gradient: Vec<f32> =
                (0..len(parameters)).map(|i| gradient(step, record, i)).collect();
            let Self { weight, exp_avg, exp_avg_sq } = self;
            let planes = [weight, exp_avg, exp_avg_sq].map(|plane| &mut *plane[record]);
            adamw(step).update_tensor(Kernel::Scalar, gradient_scale, 0.01, &gradient, planes);
        }
    }
}

pub(super) fn len(parameters: u64) -> usize {
    usize::try_from(parameters).expect("small")
}

pub(super) struct Setup {
    pub(super) chunk_parameters: u64,
    pub(super) format: StateFormat,
    pub(super) engine: Choice,
    pub(super) threads: usize,
    pub(super) slots: usize,
    pub(super) drives: usize,
    /// By record; each stands for its chunks where units are chunks.
    pub(super) residents: Residents,
    pub(super) commit_every: u64,
    pub(super) unit: Unit,
    /// Where gradients wait that have no buffer of their own.
    pub(super) gradients_beside: Option<std::path::PathBuf>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            chunk_parameters: 4096,
            format: StateFormat::F32,
            engine: Choice::Auto,
            threads: 2,
            slots: 3,
            drives: 1,
            residents: Residents::default(),
            commit_every: 1,
            unit: Unit::Record,
            gradients_beside: None,
        }
    }
}

impl Setup {
    /// The files of a store, one for each drive.
    pub(super) fn files(&self, path: &std::path::Path) -> Vec<std::path::PathBuf> {
        (0..self.drives).map(|drive| path.with_extension(drive.to_string())).collect()
    }

    pub(super) fn create(&self, path: &std::path::Path) {
        let records: Vec<_> = RECORDS.iter().map(|n| (self.format, *n)).collect();
        let manifest = manifest(self.chunk_parameters, &records);
        let ledger = Ledger::new();
        let mut creator =
            StoreCreator::new(&self.files(path), manifest, self.engine, &ledger).expect("created");
        let chunks = creator.layout().expect("a layout").chunks().to_vec();
        for (index, chunk) in chunks.iter().enumerate() {
            let mut slot =
                Slot::standalone(chunk_slot_bytes(self.format, chunk.parameters), &ledger, "test")
                    .expect("memory");
            let values = (0..chunk.parameters).map(|i| weight(chunk.record, len(chunk.start) + i));
            if self.format == StateFormat::F32 {
                for (bytes, value) in slot.chunks_mut(4).zip(values) {
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
                creator.write_group(index, Group::Weight, 1, slot).expect("written");
            } else {
                let (mut weights, mut remainders) = (Vec::new(), Vec::new());
                for value in values {
                    let (weight, remainder) = split::split(value);
                    weights.extend(weight.to_le_bytes());
                    remainders.extend(remainder.to_le_bytes());
                }
                slot[..weights.len()].copy_from_slice(&weights);
                let mut slot = creator.write_group(index, Group::Weight, 1, slot).expect("written");
                slot.fill(0);
                slot[..remainders.len()].copy_from_slice(&remainders);
                creator.write_group(index, Group::Update, 1, slot).expect("written");
            }
        }
        creator.finish(b"step 0").expect("finished");
    }

    pub(super) fn open(&self, path: &std::path::Path) -> Arc<Store> {
        let options = OpenOptions { engine: self.engine, ..OpenOptions::default() };
        let store = Store::open(&self.files(path), options, &Ledger::new()).expect("opened");
        assert!(store.verify(&mut |_, _| true).expect("read").damaged.is_empty());
        Arc::new(store)
    }

    pub(super) fn pipeline(&self, store: &Arc<Store>) -> Pipeline {
        Pipeline::start(Arc::clone(store), &self.options(store)).expect("started")
    }

    pub(super) fn options(&self, store: &Store) -> Options {
        let (layout, units) = (store.layout(), store.units(self.unit));
        let kind = |bytes, count| pool::Kind { bytes, count };
        let bytes = |record: usize| layout.record_weight_bytes(record);
        let chunk = len(self.chunk_parameters.min(RECORDS[1]));
        let deferred = if self.gradients_beside.is_some() { chunk * 4 } else { 0 };
        let slots = kind(chunk_slot_bytes(self.format, chunk) + deferred, self.slots);
        let pool = if self.unit == Unit::Chunk {
            let weights = (0..units.records().len()).map(|p| units.record_weight_bytes(p)).max();
            PoolSizes {
                chunk_slots: slots,
                weights: vec![BufferKind::of_all(weights.expect("chunks"), self.slots.min(2))],
                outgoing: kind(weights.expect("chunks"), self.slots.min(2)),
                gradients: vec![BufferKind::of_all(chunk * 4, 1)],
            }
        } else {
            PoolSizes {
                chunk_slots: slots,
                weights: vec![
                    BufferKind::of_all(bytes(0), self.slots.min(2)),
                    BufferKind::of_all(bytes(1), 1),
                ],
                outgoing: kind(0, 0),
                gradients: vec![
                    BufferKind::of_all(len(RECORDS[0]) * 4, 1),
                    BufferKind::of_all(len(RECORDS[1]) * 4, 1),
                ],
            }
        };
        let settings = |tensor: &crate::store::layout::Tensor| TensorSettings {
            record: tensor.record,
            offset: tensor.offset,
            elements: tensor.elements().expect("few"),
            weight_decay: 0.01,
            lr_scale: 1.0,
        };
        let residents = Residents {
            records: self.units_of(store, &self.residents.records),
            chunks: self.residents.chunks.clone(),
            gradients: self.units_of(store, &self.residents.gradients),
        };
        let files = self.gradients_beside.as_ref().map(|path| {
            GradientFiles::create(&self.files(path), units, &residents.gradients).expect("created")
        });
        Options {
            pool,
            threads: self.threads,
            kernel: None,
            tensors: store.manifest().tensors.iter().map(settings).collect(),
            residents,
            gradient_files: files.unwrap_or_default(),
            unit: self.unit,
        }
    }

    /// What records are for a pipeline: themselves, or their chunks.
    pub(super) fn units_of(&self, store: &Store, records: &[usize]) -> Vec<usize> {
        match self.unit {
            Unit::Chunk => {
                records.iter().flat_map(|r| store.layout().records()[*r].clone()).collect()
            }
            Unit::Record => records.to_vec(),
        }
    }
}

/// A store that was just imported, in a folder that lives as long as it, and its pipeline.
pub(super) fn imported() -> (tempfile::TempDir, Setup, Arc<Store>, Arc<CheckedSchedule>, Pipeline) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let setup = Setup::default();
    setup.create(&path);
    let store = setup.open(&path);
    let (schedule, pipeline) = (schedule(&store, Unit::Record), setup.pipeline(&store));
    (folder, setup, store, schedule, pipeline)
}

/// Forward over all records, then backward with updates, as training does.
pub(super) fn schedule(store: &Store, unit: Unit) -> Arc<CheckedSchedule> {
    schedule_of(store, unit, Kind::Load, &[Kind::Update])
}

pub(super) fn schedule_of(
    store: &Store,
    unit: Unit,
    first: Kind,
    gradients: &[Kind],
) -> Arc<CheckedSchedule> {
    let chunks = |record: usize, kind| {
        store.layout().records()[record].clone().map(move |chunk| ChunkOp { kind, chunk })
    };
    let mut operations = Vec::new();
    for record in 0..3 {
        operations.extend(chunks(record, first));
    }
    for record in (0..3).rev().filter(|_| !gradients.is_empty()) {
        operations.extend(chunks(record, Kind::Load));
        operations.extend(gradients.iter().flat_map(|kind| chunks(record, *kind)));
    }
    Arc::new(CheckedSchedule::new(store.units(unit), operations).expect("valid"))
}

pub(super) fn train_step(
    pipeline: &Pipeline,
    schedule: &Arc<CheckedSchedule>,
    step: u64,
    commit: bool,
) -> Result {
    pipeline.begin(Arc::clone(schedule), adamw(step), commit)?;
    forward(pipeline)?;
    for record in (0..3).rev() {
        train_record(pipeline, record, |index| gradient(step, record, index))?;
    }
    pipeline.end(commit.then(|| format!("step {step}").into_bytes()), After::Stands)
}

/// Takes all weights and drops them.
pub(super) fn forward(pipeline: &Pipeline) -> Result {
    for unit in 0..pipeline.units().records().len() {
        drop(pipeline.take_weights(unit, LONG)?.expect("in time"));
    }
    Ok(())
}

/// Every plane of every record, as f32 bits.
pub(super) fn read_all(store: &Store, format: StateFormat) -> Vec<Vec<[u32; 3]>> {
    let committed = store.committed();
    let layout = store.layout();
    let mut out = vec![Vec::new(); RECORDS.len()];
    for (index, chunk) in layout.chunks().iter().enumerate() {
        let slot = || {
            Slot::standalone(
                chunk.extent_bytes(Group::Update).max(PAGE_BYTES),
                &Ledger::new(),
                "test",
            )
            .expect("memory")
        };
        let weights =
            store.read_group(&committed.table, index, Group::Weight, slot()).expect("whole");
        let planes =
            store.read_group(&committed.table, index, Group::Update, slot()).expect("whole");
        let ranges = chunk.plane_ranges(Group::Update);
        let u32_at = |bytes: &[u8], i: usize| {
            u32::from_le_bytes(bytes[i * 4..i * 4 + 4].try_into().expect("four"))
        };
        let u16_at = |bytes: &[u8], i: usize| {
            u16::from_le_bytes(bytes[i * 2..i * 2 + 2].try_into().expect("two"))
        };
        for i in 0..chunk.parameters {
            let moments = &ranges[ranges.len() - 2..];
            let master = if format == StateFormat::F32 {
                u32_at(&weights, i)
            } else {
                split::join(u16_at(&weights, i), u16_at(&planes, i).cast_signed()).to_bits()
            };
            out[chunk.record].push([
                master,
                u32_at(&planes[moments[0].clone()], i),
                u32_at(&planes[moments[1].clone()], i),
            ]);
        }
    }
    out
}

pub(super) fn expected(steps: u64) -> Vec<Vec<[u32; 3]>> {
    expected_scaled(steps, |_| 1.0)
}

pub(super) fn expected_scaled(steps: u64, scale: impl Fn(u64) -> f32) -> Vec<Vec<[u32; 3]>> {
    let mut model = InMemory::new();
    (1..=steps).for_each(|step| model.step(step, scale(step)));
    let bits = |r: usize, i: usize| {
        [
            model.weight[r][i].to_bits(),
            model.exp_avg[r][i].to_bits(),
            model.exp_avg_sq[r][i].to_bits(),
        ]
    };
    (0..3).map(|r| (0..len(RECORDS[r])).map(|i| bits(r, i)).collect()).collect()
}

/// Weights of a unit while somebody computes with them.
pub(super) enum Away {
    /// In the buffer that they were loaded into: whole records, and what stays in RAM.
    Here(Slot),
    /// On a device.
    There(Vec<u8>),
}

/// The units of a record.
pub(super) fn units_of(pipeline: &Pipeline, record: usize) -> std::ops::Range<usize> {
    match pipeline.units().unit() {
        Unit::Chunk => pipeline.store().layout().records()[record].clone(),
        Unit::Record => record..record + 1,
    }
}

/// Fetches the weights of a record, unit by unit, then submits each with its gradient, as a trainer
/// does that computes a whole record at once.
pub(super) fn train_record(
    pipeline: &Pipeline,
    record: usize,
    gradient: impl Fn(usize) -> f32,
) -> Result {
    let away = fetch_record(pipeline, record)?;
    for (unit, weights) in units_of(pipeline, record).zip(away) {
        submit_unit(pipeline, unit, weights, &gradient)?;
    }
    Ok(())
}

pub(super) fn fetch_record(pipeline: &Pipeline, record: usize) -> Result<Vec<Away>> {
    let fetch = |unit: usize| {
        let slot = pipeline.take_weights(unit, LONG)?.expect("in time");
        let stays = pipeline.pool().residents.weights_of(unit).is_some();
        Ok(match pipeline.units().unit() == Unit::Chunk && !stays {
            true => Away::There(slot.to_vec()),
            false => Away::Here(slot),
        })
    };
    units_of(pipeline, record).map(fetch).collect()
}

pub(super) fn submit_unit(
    pipeline: &Pipeline,
    unit: usize,
    weights: Away,
    gradient: impl Fn(usize) -> f32,
) -> Result {
    let weights = match weights {
        Away::Here(slot) => slot,
        Away::There(bytes) => {
            let mut slot = pipeline.take_outgoing(unit, LONG)?.expect("in time");
            slot.copy_from_slice(&bytes);
            slot
        }
    };
    let first = pipeline.units().records()[unit].start;
    let first = len(pipeline.store().layout().chunks()[first].start);
    let parameters = len(pipeline.units().record_parameters(unit));
    let mut buffer = pipeline.take_gradient(unit, LONG)?.expect("in time");
    for (index, bytes) in buffer.chunks_mut(4).take(parameters).enumerate() {
        bytes.copy_from_slice(&gradient(first + index).to_le_bytes());
    }
    pipeline.submit(unit, Some(weights), buffer)
}

/// By record and by chunk.
pub(super) fn run(setup: Setup) {
    run_one(&setup);
    run_one(&Setup { unit: Unit::Chunk, ..setup });
}

pub(super) fn run_one(setup: &Setup) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    setup.create(&path);
    let store = setup.open(&path);
    let schedule = schedule(&store, setup.unit);
    let pipeline = setup.pipeline(&store);
    for step in 1..=3 {
        let commits = step % setup.commit_every == 0;
        train_step(&pipeline, &schedule, step, commits).expect("a step");
    }
    assert!(pipeline.wait_durable(LONG).expect("durable"));
    drop(pipeline);
    assert_eq!(&*store.committed().blob, b"step 3");
    drop(store);
    let store = setup.open(&path);
    assert_eq!(store.committed().generation, 1 + 3 / setup.commit_every);
    assert!(read_all(&store, setup.format) == expected(3), "the bits of in-memory training");
}
