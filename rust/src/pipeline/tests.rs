//! A store that is trained through the pipeline must end with the bits of the same training in
//! memory, whatever the chunk size, pool, engine and number of threads.

use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::io::engine::choice::Choice;
use crate::memory::ledger::Ledger;
use crate::memory::pool::{self, PoolSizes};
use crate::memory::slot::Slot;
use crate::optimizer::adamw::{AdamW, Kernel};
use crate::optimizer::{adamw, norm, split};
use crate::pipeline::{
    After, ChunkOp, GradientFiles, Kind, Options, Pipeline, Residents, Schedule, TensorSettings,
    chunk_slot_bytes,
};
use crate::store::layout::tests::manifest;
use crate::store::{BLOB_BYTES_MAX, Creator, OpenOptions, Store};
use crate::units::{Group, PAGE_BYTES, StateFormat};

mod by_chunk;
mod kept;
mod residents;

const LONG: Duration = Duration::from_secs(60);

fn adamw(step: u64) -> AdamW {
    AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, step, gradient_scale: 1.0 }
}

/// Records of a small model: block, larger record, block with a short last chunk.
const RECORDS: [u64; 3] = [3 * 4096, 5 * 4096 + 256, 2 * 4096 + 128];

fn weight(record: usize, index: usize) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let value = ((index * 7 + record * 13) % 1009) as f32;
    value / 505.0 - 1.0
}

fn gradient(step: u64, record: usize, index: usize) -> f32 {
    weight(record + 1, index + usize::try_from(step).expect("small") * 31) * 0.1
}

/// The same training in memory: weight, exp_avg, exp_avg_sq by record.
struct InMemory {
    weight: Vec<Vec<f32>>,
    exp_avg: Vec<Vec<f32>>,
    exp_avg_sq: Vec<Vec<f32>>,
}

impl InMemory {
    fn new() -> Self {
        let zeros = || RECORDS.iter().map(|n| vec![0.0; len(*n)]).collect();
        let weight = (0..3).map(|r| (0..len(RECORDS[r])).map(|i| weight(r, i)).collect()).collect();
        Self { weight, exp_avg: zeros(), exp_avg_sq: zeros() }
    }

    fn step(&mut self, step: u64, gradient_scale: f32) {
        for (record, &parameters) in RECORDS.iter().enumerate() {
            let gradient: Vec<f32> =
                (0..len(parameters)).map(|i| gradient(step, record, i)).collect();
            let span = adamw::Span {
                start: 0,
                len: gradient.len(),
                scalars: AdamW { gradient_scale, ..adamw(step) }.scalars(1.0, 0.01),
            };
            let old = self.weight[record].clone();
            adamw::update_f32(
                Kernel::Scalar,
                &[span],
                Some(&old),
                &mut self.weight[record],
                &gradient,
                &mut self.exp_avg[record],
                &mut self.exp_avg_sq[record],
            );
        }
    }
}

fn len(parameters: u64) -> usize {
    usize::try_from(parameters).expect("small")
}

struct Setup {
    chunk_parameters: u64,
    format: StateFormat,
    engine: Choice,
    threads: usize,
    slots: usize,
    drives: usize,
    /// By record; each stands for its chunks where pieces are chunks.
    residents: Residents,
    commit_every: u64,
    by_chunk: bool,
    /// Where gradients wait that have no buffer of their own.
    gradients_beside: Option<std::path::PathBuf>,
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
            by_chunk: false,
            gradients_beside: None,
        }
    }
}

impl Setup {
    /// The files of a store, one for each drive.
    fn files(&self, path: &std::path::Path) -> Vec<std::path::PathBuf> {
        (0..self.drives).map(|drive| path.with_extension(drive.to_string())).collect()
    }

    fn create(&self, path: &std::path::Path) {
        let records: Vec<_> = RECORDS.iter().map(|n| (self.format, *n)).collect();
        let manifest = manifest(self.chunk_parameters, &records);
        let ledger = Ledger::new();
        let mut creator =
            Creator::new(&self.files(path), manifest, self.engine, &ledger).expect("created");
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

    fn open(&self, path: &std::path::Path) -> Arc<Store> {
        let options = OpenOptions { engine: self.engine, ..OpenOptions::default() };
        let store = Store::open(&self.files(path), options, &Ledger::new()).expect("opened");
        assert!(store.verify(&mut |_, _| true).expect("read").damaged.is_empty());
        Arc::new(store)
    }

    fn pipeline(&self, store: &Arc<Store>) -> Pipeline {
        Pipeline::start(Arc::clone(store), &self.options(store)).expect("started")
    }

    fn options(&self, store: &Store) -> Options {
        let (layout, pieces) = (store.layout(), store.pieces(self.by_chunk));
        let kind = |bytes, count| pool::Kind { bytes, count };
        let bytes = |record: usize| layout.record_weight_bytes(record);
        let chunk = len(self.chunk_parameters.min(RECORDS[1]));
        let kept = if self.gradients_beside.is_some() { chunk * 4 } else { 0 };
        let slots = kind(chunk_slot_bytes(self.format, chunk) + kept, self.slots);
        let pool = if self.by_chunk {
            let weights = (0..pieces.records().len()).map(|p| pieces.record_weight_bytes(p)).max();
            PoolSizes {
                chunk_slots: slots,
                block_buffers: kind(weights.expect("chunks"), self.slots.min(2)),
                outer_buffers: kind(weights.expect("chunks"), self.slots.min(2)),
                block_gradients: kind(chunk * 4, 1),
                outer_gradients: kind(0, 0),
            }
        } else {
            PoolSizes {
                chunk_slots: slots,
                block_buffers: kind(bytes(0), self.slots.min(2)),
                outer_buffers: kind(bytes(1), 1),
                block_gradients: kind(len(RECORDS[0]) * 4, 1),
                outer_gradients: kind(len(RECORDS[1]) * 4, 1),
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
            records: self.pieces_of(store, &self.residents.records),
            chunks: self.residents.chunks.clone(),
            gradients: self.pieces_of(store, &self.residents.gradients),
        };
        let files = self.gradients_beside.as_ref().map(|path| {
            GradientFiles::create(&self.files(path), pieces, &residents.gradients).expect("created")
        });
        Options {
            pool,
            threads: self.threads,
            kernel: None,
            tensors: store.manifest().tensors.iter().map(settings).collect(),
            residents,
            gradient_files: files.unwrap_or_default(),
            by_chunk: self.by_chunk,
        }
    }

    /// What records are for a pipeline: themselves, or their chunks.
    fn pieces_of(&self, store: &Store, records: &[usize]) -> Vec<usize> {
        match self.by_chunk {
            true => records.iter().flat_map(|r| store.layout().records()[*r].clone()).collect(),
            false => records.to_vec(),
        }
    }
}

/// A store that was just imported, in a folder that lives as long as it, and its pipeline.
fn imported() -> (tempfile::TempDir, Setup, Arc<Store>, Arc<Schedule>, Pipeline) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let setup = Setup::default();
    setup.create(&path);
    let store = setup.open(&path);
    let (schedule, pipeline) = (schedule(&store, false), setup.pipeline(&store));
    (folder, setup, store, schedule, pipeline)
}

/// Forward over all records, then backward with updates, as training does.
fn schedule(store: &Store, by_chunk: bool) -> Arc<Schedule> {
    schedule_of(store, by_chunk, Kind::Load, &[Kind::Update])
}

fn schedule_of(store: &Store, by_chunk: bool, first: Kind, gradients: &[Kind]) -> Arc<Schedule> {
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
    Arc::new(Schedule::new(store.pieces(by_chunk), operations).expect("valid"))
}

fn train_step(pipeline: &Pipeline, schedule: &Arc<Schedule>, step: u64, commit: bool) -> Result {
    pipeline.begin(Arc::clone(schedule), adamw(step), commit)?;
    forward(pipeline)?;
    for record in (0..3).rev() {
        by_chunk::train_record(pipeline, record, |index| gradient(step, record, index))?;
    }
    pipeline.end(commit.then(|| format!("step {step}").into_bytes()), After::Stands)
}

/// Takes all weights and drops them.
fn forward(pipeline: &Pipeline) -> Result {
    for piece in 0..pipeline.pieces().records().len() {
        drop(pipeline.take_weights(piece, LONG)?.expect("in time"));
    }
    Ok(())
}

/// Every plane of every record, as f32 bits.
fn read_all(store: &Store, format: StateFormat) -> Vec<Vec<[u32; 3]>> {
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

fn expected(steps: u64) -> Vec<Vec<[u32; 3]>> {
    expected_scaled(steps, |_| 1.0)
}

fn expected_scaled(steps: u64, scale: impl Fn(u64) -> f32) -> Vec<Vec<[u32; 3]>> {
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

/// By record and by chunk.
fn run(setup: Setup) {
    run_one(&setup);
    run_one(&Setup { by_chunk: true, ..setup });
}

fn run_one(setup: &Setup) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    setup.create(&path);
    let store = setup.open(&path);
    let schedule = schedule(&store, setup.by_chunk);
    let pipeline = setup.pipeline(&store);
    for step in 1..=3 {
        let commits = step % setup.commit_every == 0;
        train_step(&pipeline, &schedule, step, commits).expect("a step");
    }
    assert!(pipeline.wait_settled(LONG).expect("settled"));
    drop(pipeline);
    assert_eq!(&*store.committed().blob, b"step 3");
    drop(store);
    let store = setup.open(&path);
    assert_eq!(store.committed().generation, 1 + 3 / setup.commit_every);
    assert!(read_all(&store, setup.format) == expected(3), "the bits of in-memory training");
}

#[test]
fn paged_training_has_the_bits_of_in_memory_training() {
    for format in [StateFormat::F32, StateFormat::Bf16] {
        run(Setup { format, ..Setup::default() });
    }
}

#[test]
fn chunk_size_pool_engine_and_threads_change_no_bit() {
    for chunk_parameters in [8192, 1 << 16] {
        run(Setup { chunk_parameters, ..Setup::default() });
    }
    run(Setup { slots: 1, ..Setup::default() });
    run(Setup { engine: Choice::Threads, ..Setup::default() });
    run(Setup { drives: 2, ..Setup::default() });
    run(Setup {
        drives: 3,
        engine: Choice::Threads,
        format: StateFormat::Bf16,
        ..Setup::default()
    });
    run(Setup { threads: 1, ..Setup::default() });
}

#[test]
fn an_aborted_step_leaves_the_last_commit_and_the_handle_usable() {
    let (_folder, setup, store, schedule, pipeline) = imported();
    train_step(&pipeline, &schedule, 1, true).expect("a step");
    // The second step is written in part, but never ended.
    pipeline.begin(Arc::clone(&schedule), adamw(9), false).expect("begun");
    forward(&pipeline).expect("read");
    let weights = pipeline.take_weights(2, LONG).expect("read").expect("in time");
    let gradient = pipeline.take_gradient(2, LONG).expect("free").expect("in time");
    pipeline.submit(2, Some(weights), gradient).expect("submitted");
    pipeline.abort().expect("aborted");
    assert_eq!(&*store.committed().blob, b"step 1");
    for step in 2..=3 {
        train_step(&pipeline, &schedule, step, true).expect("a step");
    }
    assert!(pipeline.wait_settled(LONG).expect("settled"));
    assert!(read_all(&store, setup.format) == expected(3));
}

#[test]
fn steps_between_commits_are_written_in_place_and_lost_together() {
    let (folder, setup, store, schedule, pipeline) = imported();
    for step in 1..=5 {
        train_step(&pipeline, &schedule, step, step % 2 == 0).expect("a step");
    }
    assert!(pipeline.wait_settled(LONG).expect("settled"));
    drop(pipeline);
    drop(store);
    let store = setup.open(&folder.path().join("store"));
    assert_eq!(&*store.committed().blob, b"step 4");
    assert!(read_all(&store, setup.format) == expected(4));
}

#[test]
fn a_flipped_byte_stops_the_step_and_names_its_tensor() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let setup = Setup::default();
    setup.create(&path);
    let store = setup.open(&path);
    let plan = store.plan_read(&store.committed().table, 4, Group::Weight);
    let mut byte = [0; 1];
    store.drives().main().read_at(&mut byte, 0).ok();
    let buffered = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&setup.files(&path)[0])
        .expect("open");
    std::os::unix::fs::FileExt::write_at(&buffered, &[0xab; 3], plan.offset + 5).expect("spoiled");
    buffered.sync_all().expect("flushed");
    let pipeline = setup.pipeline(&store);
    let error = train_step(&pipeline, &schedule(&store, false), 1, true).expect_err("found");
    assert!(
        matches!(&error, Error::Corrupt { what, .. } if what.contains("layer.1.weight")),
        "{error}"
    );
    assert!(pipeline.wait_settled(LONG).is_err(), "the failure stays");
    drop(pipeline);
    let report = store.verify(&mut |_, _| true).expect("read");
    assert_eq!(report.damaged.len(), 1);
    assert_eq!(report.damaged[0].chunk, 4);
}

#[test]
fn asking_for_weights_out_of_order_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let setup = Setup::default();
    setup.create(&path);
    let store = setup.open(&path);
    let pipeline = setup.pipeline(&store);
    pipeline.begin(schedule(&store, false), adamw(1), false).expect("begun");
    let error = pipeline.take_weights(1, LONG).expect_err("record 0 comes first");
    assert!(error.to_string().contains("next load is record 0"), "{error}");
}

#[test]
fn a_step_that_has_ended_survives_abort_and_stop() {
    let (_folder, setup, store, schedule, pipeline) = imported();
    train_step(&pipeline, &schedule, 1, true).expect("a step");
    pipeline.begin(Arc::clone(&schedule), adamw(2), false).expect("begun");
    // The updates of step 1 may still be under way: they are finished first.
    pipeline.abort().expect("aborted");
    assert_eq!(&*store.committed().blob, b"step 1");
    train_step(&pipeline, &schedule, 2, true).expect("a step");
    drop(pipeline);
    assert_eq!(&*store.committed().blob, b"step 2");
    assert!(read_all(&store, setup.format) == expected(2));
}

#[test]
fn what_contradicts_the_step_is_refused() {
    let (_folder, _, _, schedule, pipeline) = imported();
    assert!(pipeline.end(None, After::Stands).is_err(), "no step was begun");
    pipeline.begin(Arc::clone(&schedule), adamw(1), false).expect("begun");
    assert!(pipeline.begin(Arc::clone(&schedule), adamw(1), false).is_err(), "not ended");
    let small = || Slot::standalone(PAGE_BYTES, &Ledger::new(), "test").expect("memory");
    assert!(pipeline.submit(0, Some(small()), small()).is_err(), "too small");
    assert!(pipeline.submit(9, Some(small()), small()).is_err(), "no such record");
    assert!(
        pipeline.end(Some(vec![0; BLOB_BYTES_MAX + 1]), After::Stands).is_err(),
        "a blob too large"
    );
    pipeline.end(None, After::Stands).expect("sent");
    let error = pipeline.wait_settled(LONG).expect_err("gradients are missing");
    assert!(error.to_string().contains("without the gradient of record 0"), "{error}");
}
