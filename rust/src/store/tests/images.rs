//! Stores on a drive in RAM, trained for a few generations, for tests that damage them.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::io::drives::Drives;
use crate::io::engine::memory::Memory;
use crate::io::engine::{self, Engine, Operation};
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::store::checksum;
use crate::store::header::Header;
use crate::store::layout::{Layout, Manifest, Record, Tensor};
use crate::store::{Entry, Store, StoreCreator, Table};
use crate::units::{CopyId, Group, StateFormat};

/// Boot id under which these stores were written; no other one may vouch for them.
pub(in crate::store) const BOOT_ID: [u8; 16] = [1; 16];

/// Formats and parameters of the records: chunks of both trained formats, one not trained, and a
/// short last chunk of each kind.
pub(in crate::store) const RECORDS: [(StateFormat, u64); 4] = [
    (StateFormat::F32, 4096 + 128),
    (StateFormat::Bf16, 2 * 4096),
    (StateFormat::Raw16, 4096 + 256),
    (StateFormat::F32, 128),
];

/// A store after three generations.
pub(in crate::store) struct Trained {
    pub(in crate::store) drives: Drives,
    pub(in crate::store) header: Header,
    pub(in crate::store) layout: Arc<Layout>,
    /// Generation 1 is the first.
    pub(in crate::store) states: Vec<State>,
}

/// A committed generation.
pub(in crate::store) struct State {
    /// What the drive held when it was the newest, cleanly closed.
    pub(in crate::store) image: Memory,
    pub(in crate::store) blob: Vec<u8>,
    /// By chunk and plane group, in table order.
    pub(in crate::store) groups: Vec<Held>,
    /// How often each chunk was updated.
    pub(in crate::store) updates: Vec<u32>,
}

/// What a plane group holds.
#[derive(Clone)]
pub(in crate::store) struct Held {
    /// Where its planes lie in the file; empty when all are zero.
    pub(in crate::store) place: Range<u64>,
    /// The whole extent as it is read.
    pub(in crate::store) bytes: Vec<u8>,
}

impl Trained {
    /// A store that lies, but for its bytes, in `folder`. Of the trained chunks, generation 1 writes
    /// some planes of all, 2 those of records 0 and 1 but for the last chunk, 3 every other of these:
    /// so both copies hold current data, older data and nothing.
    pub(in crate::store) fn new(
        folder: &Path,
        records: &[(StateFormat, u64)],
        chunk: u64,
        seed: u64,
    ) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let paths = [folder.join(format!("{seed}.mtio"))];
        let engine = Arc::new(Memory::default());
        let over = Arc::clone(&engine) as Arc<dyn Engine>;
        let (manifest, ledger) = (manifest(records, chunk, seed), Ledger::new());
        let creator = StoreCreator::over(over, None, &paths, manifest, &ledger).expect("created");
        let mut states = vec![State::import(creator, &engine, &mut rng)];
        let drives = Drives::open_waiting(&paths, &mut |_, _| Ok(())).expect("opened");
        let over = Arc::clone(&engine) as Arc<dyn Engine>;
        let store = Store::open_on(&drives, over, BOOT_ID, &ledger).expect("opened");
        for held in &mut states[0].groups {
            held.place.start += store.header.data_offset;
            held.place.end += store.header.data_offset;
        }
        let of_two: Vec<usize> = (0..store.layout.records()[1].end - 1).collect();
        for chunks in [of_two.clone(), of_two.into_iter().step_by(2).collect()] {
            let next = State::train(&store, &states[states.len() - 1], &chunks, &engine, &mut rng);
            states.push(next);
        }
        let (header, layout) = (store.header.clone(), Arc::clone(store.layout()));
        Self { drives, header, layout, states }
    }

    /// What the drive holds now.
    pub(in crate::store) fn image(&self) -> &Memory {
        &self.states[self.states.len() - 1].image
    }
}

pub(in crate::store) fn manifest(
    records: &[(StateFormat, u64)],
    chunk_parameters: u64,
    seed: u64,
) -> Manifest {
    let record = |(index, &(format, parameters))| Record {
        name: format!("layers.{index}"),
        format,
        parameters,
    };
    let tensor = |(record, &(_, parameters))| Tensor {
        name: format!("layers.{record}.weight"),
        record,
        offset: 0,
        shape: vec![parameters],
    };
    Manifest {
        durability: crate::store::layout::Durability::Step,
        drives: 1,
        content: crate::store::layout::Content::Training,
        chunk_parameters,
        records: records.iter().enumerate().map(record).collect(),
        tensors: records.iter().enumerate().map(tensor).collect(),
        model: serde_json::json!({ "seed": seed }).into(),
    }
}

impl State {
    /// Half of the planes of each trained group, the whole of the others; places count from the
    /// start of the data area.
    fn import(mut creator: StoreCreator, engine: &Memory, rng: &mut fastrand::Rng) -> Self {
        let layout = creator.layout().expect("a layout").clone();
        let mut groups = Vec::new();
        for (index, chunk) in layout.chunks().iter().enumerate() {
            for group in Group::ALL {
                let planes = chunk.format().planes(group).len().div_ceil(2);
                let imported = group == Group::Weight || chunk.format() == StateFormat::Bf16;
                let planes = if imported { planes } else { 0 };
                let stored = chunk.stored_bytes(group, planes);
                let bytes = random_bytes(stored, chunk.extent_bytes(group), rng);
                if planes > 0 {
                    let slot = slot_of(&bytes);
                    creator.write_group(index, group, planes, slot).expect("written");
                }
                let start = layout.extent_offset(index, group, CopyId::A);
                groups.push(Held { place: start..start + stored as u64, bytes });
            }
        }
        let blob = random_bytes(1000, 1000, rng);
        creator.finish(&blob).expect("finished");
        let updates = vec![0; layout.chunks().len()];
        Self { image: engine.copy(), blob, groups, updates }
    }

    /// The next generation, in which these chunks are written, the first of them twice.
    fn train(
        store: &Store,
        last: &Self,
        chunks: &[usize],
        engine: &Memory,
        rng: &mut fastrand::Rng,
    ) -> Self {
        let mut table: Table = (*store.committed().table).clone();
        let (mut groups, mut updates) = (last.groups.clone(), last.updates.clone());
        store.run(store.start_writing().expect("writable")).expect("written");
        for &index in chunks[..1].iter().chain(chunks) {
            let chunk = store.layout.chunks()[index];
            updates[index] += 1 + rng.u32(..1000);
            for group in Group::ALL {
                let planes = chunk.format().planes(group).len();
                let plan = store.plan_write(&table, index, group, planes).expect("trained");
                let stored = chunk.stored_bytes(group, planes);
                let bytes = random_bytes(stored, chunk.extent_bytes(group), rng);
                let sums = checksum::sums(&plan.binding, &bytes[..stored]);
                let slot = Some(slot_of(&bytes));
                engine::perform(
                    engine,
                    Operation::Write,
                    store.drives.file(plan.drive),
                    plan.offset,
                    slot,
                )
                .1
                .expect("written");
                let updates = if group == Group::Update { updates[index] } else { 0 };
                let entry = Entry { updates, ..plan.entry };
                table.set(&store.layout, index, group, entry, &sums);
                groups[store.layout.entry(index, group)] =
                    Held { place: plan.offset..plan.offset + stored as u64, bytes };
            }
        }
        let blob = random_bytes(1000 + rng.usize(..5000), 0, rng);
        store.commit(table, &blob).expect("committed");
        store.mark_clean().expect("closed");
        Self { image: engine.copy(), blob, groups, updates }
    }
}

/// So many random bytes, then zeros up to `length`.
fn random_bytes(random: usize, length: usize, rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = vec![0; random];
    rng.fill(&mut bytes);
    bytes.resize(length.max(random), 0);
    bytes
}

/// A slot that begins with these bytes; pages of it.
fn slot_of(bytes: &[u8]) -> Slot {
    let mut slot = Slot::standalone(bytes.len(), &Ledger::new(), "test").expect("memory");
    slot[..bytes.len()].copy_from_slice(bytes);
    slot
}
