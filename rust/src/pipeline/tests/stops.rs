//! Stops with several records, one for each format: a step with the least pool gets to its end, with the bits of
//! an ample one, and a pool that lacks the buffers of a format is refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::Result;
use crate::memory::ledger::Ledger;
use crate::memory::pool::{self, BufferKind, PoolSizes};
use crate::memory::slot::Slot;
use crate::pipeline::{
    After, CheckedSchedule, ChunkOp, GradientFiles, Kind, Options, Pipeline, Residents,
    TensorSettings, chunk_slot_bytes,
};
use crate::store::layout::tests::manifest;
use crate::store::{OpenOptions, Store};
use crate::units::{Group, StateFormat, Unit};

use super::support::*;

const FORMATS: [StateFormat; 3] = [StateFormat::Bf16, StateFormat::F32, StateFormat::Raw16];
const CHUNK: u64 = 4096;

/// A model as a step meets it.
#[derive(Debug)]
struct Model {
    /// Format and parameters of each record.
    records: Vec<(StateFormat, u64)>,
    /// Records of embedding, blocks and head.
    stops: Vec<Vec<usize>>,
    is_tied: bool,
}

impl Model {
    /// Each stop has two or three records, of one to three chunks, in any order of their formats.
    fn random(rng: &mut fastrand::Rng) -> Self {
        let (mut records, mut stops) = (Vec::new(), Vec::new());
        for _ in 0..rng.usize(3..6) {
            let mut formats = FORMATS;
            rng.shuffle(&mut formats);
            let first = records.len();
            for format in formats.into_iter().take(rng.usize(2..4)) {
                records.push((format, rng.u64(1..97) * 128));
            }
            stops.push((first..records.len()).collect());
        }
        Self { records, stops, is_tied: rng.bool() }
    }

    fn blocks(&self) -> std::ops::Range<usize> {
        1..self.stops.len() - 1
    }

    fn head(&self) -> usize {
        self.stops.len() - 1
    }

    fn is_trained(&self, record: usize) -> bool {
        self.records[record].0.is_trainable()
    }

    /// The two kinds of buffer of each format, as `store/pool.py` has them: `few` for what is in blocks, and those for
    /// what is larger. A tied table's are beside others.
    fn kinds(
        &self,
        few: usize,
        records: &[usize],
        bytes: impl Fn(usize) -> usize,
    ) -> Vec<BufferKind> {
        let mut kinds = Vec::new();
        for format in FORMATS {
            let own: Vec<_> =
                records.iter().copied().filter(|r| self.records[*r].0 == format).collect();
            let in_block = |record: &usize| self.blocks().any(|b| self.stops[b].contains(record));
            let largest = own.iter().filter(|r| in_block(r)).map(|r| bytes(*r)).max().unwrap_or(0);
            let (outer, inner): (Vec<_>, Vec<_>) = own.iter().partition(|r| bytes(**r) > largest);
            let has_table = |records: &[usize]| {
                usize::from(self.is_tied && records.iter().any(|r| self.stops[0].contains(r)))
            };
            let mut add = |bytes, count| {
                let slots = pool::Kind { bytes, count };
                kinds.push(BufferKind { format: Some(format), slots });
            };
            add(largest, inner.len().min(few + has_table(&inner)));
            let largest = outer.iter().map(|r| bytes(*r)).max().unwrap_or(0);
            add(largest, outer.len().min(1 + has_table(&own)));
        }
        kinds
    }

    fn least_pool(&self, store: &Store) -> PoolSizes {
        let all: Vec<_> = (0..self.records.len()).collect();
        let trained: Vec<_> = all.iter().copied().filter(|r| self.is_trained(*r)).collect();
        let gradient = |record: usize| len(self.records[record].1) * size_of::<f32>();
        let slot = FORMATS.map(|format| chunk_slot_bytes(format, len(CHUNK))).into_iter().max();
        PoolSizes {
            chunk_slots: pool::Kind { bytes: slot.unwrap_or(0) + len(CHUNK) * 4, count: 1 },
            weights: self.kinds(2, &all, |r| store.layout().record_weight_bytes(r)),
            outgoing: pool::Kind::default(),
            gradients: self.kinds(1, &trained, gradient),
        }
    }

    fn ample_pool(&self, store: &Store) -> PoolSizes {
        let least = self.least_pool(store);
        let of_all = |kinds: &[BufferKind]| {
            let bytes = kinds.iter().map(|kind| kind.slots.bytes).max().unwrap_or(0);
            vec![BufferKind::of_all(bytes, self.records.len())]
        };
        PoolSizes {
            chunk_slots: pool::Kind { count: 4, ..least.chunk_slots },
            weights: of_all(&least.weights),
            gradients: of_all(&least.gradients),
            ..least
        }
    }

    fn options(&self, pool: PoolSizes, gradient_files: GradientFiles) -> Options {
        let settings = |(record, &(_, elements)): (usize, &(StateFormat, u64))| TensorSettings {
            record,
            offset: 0,
            elements,
            weight_decay: 0.01,
            lr_scale: 1.0,
        };
        let records = self.records.iter().enumerate();
        let trained = records.filter(|(record, _)| self.is_trained(*record));
        Options {
            pool,
            threads: 1,
            kernel: None,
            tensors: trained.map(settings).collect(),
            residents: Residents::default(),
            gradient_files,
            unit: Unit::Record,
        }
    }

    /// The schedule as `store/schedule.py` makes it.
    fn schedule(&self, store: &Store, applies: bool, gradients: &[Kind]) -> Arc<CheckedSchedule> {
        let mut operations = Vec::new();
        let mut add = |kind, record: usize| {
            let chunks = store.layout().records()[record].clone();
            operations.extend(chunks.map(|chunk| ChunkOp { kind, chunk }));
        };
        let (head, last) = (self.head(), self.head() - 1);
        for record in 0..self.records.len() {
            let applies = applies && self.is_trained(record);
            add(if applies { Kind::Apply } else { Kind::Load }, record);
        }
        if self.is_tied {
            self.stops[0].iter().for_each(|record| add(Kind::Load, *record));
        }
        for stop in (0..=head).rev() {
            let is_met = stop > 0 || self.stops[0].iter().any(|r| self.is_trained(*r));
            if stop < last && is_met {
                self.stops[stop].iter().for_each(|record| add(Kind::Load, *record));
            }
            for record in self.stops[stop].iter().filter(|r| self.is_trained(**r)) {
                gradients.iter().for_each(|kind| add(*kind, *record));
            }
        }
        Arc::new(CheckedSchedule::new(store.units(Unit::Record), operations).expect("valid"))
    }

    /// What `paging/step.py` does: nothing of a stop is given back before all of it was taken.
    fn step(&self, pipeline: &Pipeline, number: u64) -> Result {
        let head = self.head();
        let mut last = None;
        for stop in 0..head {
            let weights = self.take(pipeline, stop)?;
            last = (stop + 1 == head).then_some(weights);
        }
        let weights = self.take(pipeline, head)?;
        let table = if self.is_tied { Some(self.take(pipeline, 0)?) } else { None };
        let own = self.gradients(pipeline, head, number)?;
        let mut of_table =
            if self.is_tied { Some(self.gradients(pipeline, 0, number)?) } else { None };
        Self::submit(pipeline, weights, own)?;
        drop(table);
        for stop in (1..head).rev() {
            let weights = match last.take() {
                Some(weights) => weights,
                None => self.take(pipeline, stop)?,
            };
            let gradients = self.gradients(pipeline, stop, number)?;
            Self::submit(pipeline, weights, gradients)?;
        }
        if self.stops[0].iter().any(|record| self.is_trained(*record)) {
            let weights = self.take(pipeline, 0)?;
            let gradients = match of_table.take() {
                Some(gradients) => gradients,
                None => self.gradients(pipeline, 0, number)?,
            };
            Self::submit(pipeline, weights, gradients)?;
        }
        Ok(())
    }

    fn take(&self, pipeline: &Pipeline, stop: usize) -> Result<Vec<(usize, Slot)>> {
        let take = |record: &usize| {
            Ok((*record, pipeline.take_weights(*record, LONG)?.expect("a step that goes on")))
        };
        self.stops[stop].iter().map(take).collect()
    }

    fn gradients(
        &self,
        pipeline: &Pipeline,
        stop: usize,
        number: u64,
    ) -> Result<BTreeMap<usize, Slot>> {
        let mut gradients = BTreeMap::new();
        for &record in self.stops[stop].iter().filter(|record| self.is_trained(**record)) {
            let mut slot = pipeline.take_gradient(record, LONG)?.expect("a step that goes on");
            for (index, bytes) in slot.chunks_exact_mut(4).enumerate() {
                bytes.copy_from_slice(&gradient(number, record, index).to_le_bytes());
            }
            gradients.insert(record, slot);
        }
        Ok(gradients)
    }

    fn submit(
        pipeline: &Pipeline,
        weights: Vec<(usize, Slot)>,
        mut gradients: BTreeMap<usize, Slot>,
    ) -> Result {
        for (record, weights) in weights {
            if let Some(gradient) = gradients.remove(&record) {
                pipeline.submit(record, Some(weights), gradient)?;
            }
        }
        Ok(())
    }

    /// Three steps, the second one scaled, and a flush: all that lies in the store then.
    fn trained(&self, of: impl Fn(&Store) -> PoolSizes, gradients: &[Kind]) -> Vec<Vec<u8>> {
        let folder = tempfile::tempdir().expect("a folder");
        let manifest = manifest(CHUNK, &self.records);
        let files = [folder.path().join("store")];
        let store = Store::create_empty(&files, manifest, OpenOptions::default(), &Ledger::new());
        let store = Arc::new(store.expect("created"));
        let files = match gradients.contains(&Kind::Defer) {
            true => {
                let files = [folder.path().join("gradients")];
                GradientFiles::create(&files, store.layout(), &[]).expect("created")
            }
            false => GradientFiles::default(),
        };
        let options = self.options(of(&store), files);
        let pipeline = Pipeline::start(Arc::clone(&store), &options).expect("started");
        let mut waiting = false;
        for number in 1..=3 {
            let schedule = self.schedule(&store, waiting, gradients);
            pipeline.begin(schedule, adamw(number), true).expect("begun");
            self.step(&pipeline, number).expect("a step");
            let scale = if number == 2 { 0.5 } else { 1.0 };
            waiting = !gradients.contains(&Kind::Update)
                || gradients.contains(&Kind::Defer) && scale < 1.0;
            let after = if waiting { After::Applied(scale) } else { After::Stands };
            pipeline.end(Some(number.to_le_bytes().into()), after).expect("ended");
        }
        if waiting {
            let trained = (0..self.records.len()).filter(|record| self.is_trained(*record));
            let chunks = |record: usize| store.layout().records()[record].clone();
            let applied = trained.clone().flat_map(chunks);
            let operations = applied.map(|chunk| ChunkOp { kind: Kind::Apply, chunk }).collect();
            let flush = CheckedSchedule::new(store.units(Unit::Record), operations).expect("valid");
            pipeline.begin(Arc::new(flush), adamw(4), false).expect("begun");
            for record in trained {
                drop(pipeline.take_weights(record, LONG).expect("read").expect("a flush"));
            }
            pipeline.end(None, After::Stands).expect("ended");
        }
        assert!(pipeline.wait_durable(LONG).expect("durable"));
        drop(pipeline);
        let committed = store.committed();
        assert_eq!(&*committed.blob, 3_u64.to_le_bytes());
        let mut state = Vec::new();
        for (index, chunk) in store.layout().chunks().iter().enumerate() {
            for group in Group::ALL {
                let bytes = chunk.extent_bytes(group);
                if bytes > 0 {
                    let slot = Slot::standalone(bytes, &Ledger::new(), "test").expect("memory");
                    let whole = store.read_group(&committed.table, index, group, slot);
                    state.push(whole.expect("whole").to_vec());
                }
            }
        }
        state
    }
}

#[test]
fn steps_with_the_least_pool_get_to_their_end_and_have_the_bits_of_an_ample_one() {
    let mut rng = fastrand::Rng::with_seed(1);
    for _ in 0..8 {
        let model = Model::random(&mut rng);
        for gradients in [&[Kind::Update][..], &[Kind::Defer], &[Kind::Update, Kind::Defer]] {
            if model.records.iter().all(|(format, _)| !format.is_trainable()) {
                continue;
            }
            let least = model.trained(|store| model.least_pool(store), gradients);
            let ample = model.trained(|store| model.ample_pool(store), gradients);
            assert!(least == ample, "{gradients:?} of {model:?}");
            let is_zero = |bytes: &Vec<u8>| bytes.iter().all(|byte| *byte == 0);
            assert!(!least.iter().all(is_zero), "{model:?}");
        }
    }
}

#[test]
fn a_pool_without_the_buffers_of_a_format_is_refused() {
    let records = vec![
        (StateFormat::Bf16, 4096),
        (StateFormat::Bf16, 4096),
        (StateFormat::F32, 128),
        (StateFormat::Raw16, 8192),
    ];
    let model = Model { records, stops: vec![vec![0], vec![1, 2, 3]], is_tied: false };
    let folder = tempfile::tempdir().expect("a folder");
    let manifest = manifest(CHUNK, &model.records);
    let files = [folder.path().join("store")];
    let store = Store::create_empty(&files, manifest, OpenOptions::default(), &Ledger::new());
    let store = Arc::new(store.expect("created"));
    let start = |pool: PoolSizes| {
        let options = model.options(pool, GradientFiles::default());
        Pipeline::start(Arc::clone(&store), &options).map(drop).map_err(|error| error.to_string())
    };
    let kind = |format, bytes, count| {
        let slots = pool::Kind { bytes, count };
        BufferKind { format: Some(format), slots }
    };
    let (weights, gradients) = (
        vec![
            kind(StateFormat::Bf16, 8192, 2),
            kind(StateFormat::F32, 4096, 1),
            kind(StateFormat::Raw16, 16384, 1),
        ],
        vec![kind(StateFormat::Bf16, 16384, 1), kind(StateFormat::F32, 512, 1)],
    );
    let chunk_slots = pool::Kind { bytes: chunk_slot_bytes(StateFormat::Bf16, 4096), count: 1 };
    let whole = PoolSizes { chunk_slots, weights, outgoing: pool::Kind::default(), gradients };
    start(whole.clone()).expect("has all");
    // Larger ones of another format stand there in vain.
    let names = ["layer.0", "layer.2", "layer.3"];
    for (number, name) in names.iter().enumerate() {
        let mut pool = whole.clone();
        pool.weights[number].slots.count = 0;
        let error = start(pool).expect_err("no weights");
        assert!(error.contains("bytes of weights of") && error.contains(name), "{error}");
    }
    for (number, name) in names[..2].iter().enumerate() {
        let mut pool = whole.clone();
        pool.gradients[number].slots.count = 0;
        let error = start(pool).expect_err("no gradients");
        assert!(error.contains("bytes of gradients of") && error.contains(name), "{error}");
    }
    let mut pool = whole;
    pool.gradients[0].format = None;
    pool.gradients.truncate(1);
    start(pool).expect("one kind for all formats");
}
