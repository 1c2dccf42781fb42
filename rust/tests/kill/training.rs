//! What is trained: stores of three sizes, a gradient that follows from the step alone, and the
//! same training in memory.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use megatrain_io::memory::{self, BufferKind, Ledger, PoolSizes, Slot};
use megatrain_io::optimizer::{self, AdamW, Kernel};
use megatrain_io::pipeline::{CheckedSchedule, ChunkOp, Kind, TensorSettings, chunk_slot_bytes};
use megatrain_io::store::{Content, Durability, Manifest, Record, Store, Tensor};
use megatrain_io::{Group, StateFormat, Unit, to_usize};

const WEIGHT_DECAY: f64 = 0.01;

/// What a store holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    chunk_parameters: u64,
    drives: usize,
    records: [(StateFormat, u64); 3],
}

/// A generation takes a few milliseconds: kills land between the operations of a commit.
pub(crate) const SMALL: Shape = Shape {
    name: "small",
    chunk_parameters: 4096,
    drives: 1,
    records: [
        (StateFormat::F32, 3 * 4096),
        (StateFormat::Bf16, 5 * 4096 + 256),
        (StateFormat::F32, 2 * 4096 + 128),
    ],
};
/// A step writes 5.4 MiB, over two drives: kills land among the chunks.
pub(crate) const LARGE: Shape = Shape {
    name: "large",
    chunk_parameters: 1 << 16,
    drives: 2,
    records: [
        (StateFormat::F32, 3 * 4096),
        (StateFormat::Bf16, (6 << 16) + 256),
        (StateFormat::F32, (1 << 16) + 128),
    ],
};
/// A step writes 36 MiB, in a store of 75 MiB: kills land while the queue of the drive is full.
pub(crate) const WIDE: Shape = Shape {
    name: "wide",
    chunk_parameters: 1 << 18,
    drives: 1,
    records: [
        (StateFormat::F32, 1 << 20),
        (StateFormat::Bf16, 1 << 20),
        (StateFormat::F32, 1 << 20),
    ],
};

impl Shape {
    /// The files of a store, one for each drive.
    pub(crate) fn files(&self, path: &Path) -> Vec<PathBuf> {
        (0..self.drives).map(|drive| path.with_extension(drive.to_string())).collect()
    }

    pub(crate) fn manifest(&self) -> Manifest {
        let name = |index: usize| format!("layer.{index}");
        let records = self.records.iter().enumerate();
        let tensors = records.clone().map(|(record, &(_, parameters))| Tensor {
            name: format!("{}.weight", name(record)),
            record,
            offset: 0,
            shape: vec![parameters],
        });
        let records = records.clone().map(|(record, &(format, parameters))| Record {
            name: name(record),
            format,
            parameters,
        });
        Manifest {
            durability: Durability::Step,
            drives: self.drives,
            content: Content::Training,
            chunk_parameters: self.chunk_parameters,
            records: records.collect(),
            tensors: tensors.collect(),
            model: serde_json::Value::Null.into(),
        }
    }

    pub(crate) fn parameters(&self, record: usize) -> usize {
        to_usize(self.records[record].1)
    }

    /// The first parameter of a record's chunk.
    pub(crate) fn start_of(&self, chunk: usize) -> usize {
        chunk * to_usize(self.chunk_parameters)
    }

    pub(crate) fn pool(&self, unit: Unit) -> PoolSizes {
        let kind = |bytes, count| memory::Kind { bytes, count };
        let parameters = (0..3).map(|record| self.parameters(record)).max().unwrap_or(0);
        let chunk = to_usize(self.chunk_parameters);
        let formats = [StateFormat::F32, StateFormat::Bf16];
        let slot = formats.map(|format| chunk_slot_bytes(format, chunk)).into_iter().max();
        let of_chunks = unit == Unit::Chunk;
        let parameters = if of_chunks { chunk } else { parameters };
        PoolSizes {
            chunk_slots: kind(slot.unwrap_or(0) + chunk * size_of::<f32>(), 4),
            weights: vec![BufferKind::of_all(parameters * 4, 3)],
            outgoing: if of_chunks { kind(parameters * 4, 2) } else { memory::Kind::default() },
            gradients: vec![BufferKind::of_all(parameters * 4, 2)],
        }
    }

    pub(crate) fn settings(&self) -> Vec<TensorSettings> {
        let records = self.records.iter().enumerate();
        let of = |(record, &(_, elements)): (usize, &(StateFormat, u64))| TensorSettings {
            record,
            offset: 0,
            elements,
            weight_decay: WEIGHT_DECAY,
            lr_scale: 1.0,
        };
        records.map(of).collect()
    }
}

pub(crate) fn adamw(step: u64) -> AdamW {
    AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, step }
}

/// Every second step is clipped.
pub(crate) fn gradient_scale(step: u64) -> f32 {
    if step.is_multiple_of(2) { 0.5 } else { 1.0 }
}

/// A pure function of the step: whoever trains a step again trains it alike.
pub(crate) fn gradient(step: u64, record: usize, index: usize) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let value = ((index * 7 + record * 13 + to_usize(step) * 31) % 1009) as f32;
    (value / 505.0 - 1.0) * 0.1
}

/// The same training in memory, from a weight of zero.
pub(crate) struct Memory {
    pub(crate) step: u64,
    records: Vec<InMemory>,
}

struct InMemory {
    weight: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

impl Memory {
    pub(crate) fn new(shape: &Shape) -> Self {
        let of = |record| {
            let zeros = || vec![0.0; shape.parameters(record)];
            InMemory { weight: zeros(), exp_avg: zeros(), exp_avg_sq: zeros() }
        };
        Self { step: 0, records: (0..3).map(of).collect() }
    }

    pub(crate) fn train_to(&mut self, step: u64) {
        while self.step < step {
            self.step += 1;
            let (adamw, scale) = (adamw(self.step), gradient_scale(self.step));
            for (index, record) in self.records.iter_mut().enumerate() {
                let InMemory { weight, exp_avg, exp_avg_sq } = record;
                let gradients: Vec<f32> =
                    (0..weight.len()).map(|i| gradient(self.step, index, i)).collect();
                let planes = [weight, exp_avg, exp_avg_sq].map(Vec::as_mut_slice);
                adamw.update_tensor(Kernel::detect(), scale, WEIGHT_DECAY, &gradients, planes);
            }
        }
    }

    /// Compares every bit of the store's committed state.
    pub(crate) fn assert_is(&self, store: &Store, what: &dyn fmt::Display) {
        let table = store.committed().table;
        let words = |bytes: &[u8]| -> Vec<u32> {
            let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("four bytes"));
            bytes.chunks_exact(4).map(word).collect()
        };
        let halves = |bytes: &[u8]| -> Vec<u16> {
            let half = |b: &[u8]| u16::from_le_bytes(b.try_into().expect("two bytes"));
            bytes.chunks_exact(2).map(half).collect()
        };
        let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|v| v.to_bits()).collect() };
        for (index, chunk) in store.layout().chunks().iter().enumerate() {
            let read = |group| {
                let bytes = chunk.extent_bytes(group);
                let slot = Slot::standalone(bytes, &Ledger::new(), "test").expect("memory");
                store
                    .read_group(&table, index, group, slot)
                    .unwrap_or_else(|e| panic!("{what}: {e}"))
            };
            let (weights, update) = (read(Group::Weight), read(Group::Update));
            let planes = chunk.plane_ranges(Group::Update);
            let weights = &weights[chunk.plane_ranges(Group::Weight)[0].clone()];
            let masters = if chunk.format() == StateFormat::F32 {
                words(weights)
            } else {
                let remainders = halves(&update[planes[0].clone()]);
                let pairs = halves(weights).into_iter().zip(remainders);
                pairs.map(|(w, r)| optimizer::join(w, r.cast_signed()).to_bits()).collect()
            };
            let moments = &planes[planes.len() - 2..];
            let found =
                [masters, words(&update[moments[0].clone()]), words(&update[moments[1].clone()])];
            let record = &self.records[chunk.record];
            let place = to_usize(chunk.start)..to_usize(chunk.start) + chunk.parameters;
            let expected = [&record.weight, &record.exp_avg, &record.exp_avg_sq]
                .map(|values| bits(&values[place.clone()]));
            assert!(found == expected, "{what}: chunk {index} is not that of step {}", self.step);
        }
    }
}

/// Forward over all records, with the updates that wait, then backward with what a step does there.
pub(crate) fn schedule(
    store: &Store,
    unit: Unit,
    first: Kind,
    gradients: &[Kind],
) -> Arc<CheckedSchedule> {
    let chunks = |record: usize, kind| {
        store.layout().records()[record].clone().map(move |chunk| ChunkOp { kind, chunk })
    };
    let forward = (0..3).flat_map(|record| chunks(record, first));
    let backward = (0..3).rev().flat_map(|record| {
        let done = gradients.iter().flat_map(move |kind| chunks(record, *kind));
        chunks(record, Kind::Load).chain(done)
    });
    let operations = forward.chain(backward).collect();
    Arc::new(CheckedSchedule::new(store.units(unit), operations).expect("valid"))
}
