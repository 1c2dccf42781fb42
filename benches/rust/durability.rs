//! One training whose forward and backward cost nothing, so that the drive and the update decide: what
//! durability and checksums cost. `benches/io/durability.py` runs it in all its forms, side by side.
//!
//!     durability make DIR[:DIR...] step|scratch PARAMETERS
//!     durability run DIR[:DIR...] step|scratch STEPS COMMIT_EVERY
//!
//! The store has a file in each folder, as on so many drives.
//!
//! Without arguments it runs both once, small.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use megatrain_io::io::Choice;
use megatrain_io::memory::{self, BufferKind, Ledger, PoolSizes, Slot};
use megatrain_io::optimizer::AdamW;
use megatrain_io::pipeline::{
    After, CheckedSchedule, ChunkOp, GradientFiles, Kind, Options, Pipeline, Residents,
    TensorSettings, chunk_slot_bytes,
};
use megatrain_io::store::{
    Content, Durability, Manifest, OpenOptions, Record, Store, StoreCreator, Tensor,
};
use megatrain_io::{Error, Group, Result, StateFormat, Unit};

const FORMAT: StateFormat = StateFormat::Bf16;
const CHUNK: u64 = 2 << 20;
const RECORDS: u64 = 4;
const LONG: Duration = Duration::from_secs(60);

fn main() -> Result {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().expect("a number");
    match words[..] {
        ["make", folder, durability, parameters] => {
            make(&files(folder, durability), durability, number(parameters))
        }
        ["run", folder, durability, steps, every] => {
            run(&files(folder, durability), durability, number(steps), number(every))
        }
        // `cargo bench` runs every benchmark: a short look; the comparison is `benches/io/durability.py`.
        [] => look(),
        _ => Err(Error::invalid(
            "make DIR step|scratch PARAMETERS, run DIR step|scratch STEPS EVERY",
        )),
    }
}

fn files(folders: &str, durability: &str) -> Vec<PathBuf> {
    let folders: Vec<&str> = folders.split(':').collect();
    let name = |drive| format!("{durability}-{}.{drive}.mtio", folders.len());
    folders.iter().enumerate().map(|(drive, folder)| Path::new(folder).join(name(drive))).collect()
}

/// Both durabilities once, small, in a folder of its own that is removed.
fn look() -> Result {
    let name = format!("durability-{}", std::process::id());
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir(&folder).map_err(|e| Error::io("create", &folder, 0, 0, e))?;
    let both = ["step", "scratch"].into_iter().try_for_each(|durability| {
        let files = [folder.join(durability)];
        make(&files, durability, 16 << 20)?;
        run(&files, durability, 5, 1)
    });
    // What cannot be removed cannot be helped here.
    let _ = std::fs::remove_dir_all(&folder);
    both
}

fn make(files: &[PathBuf], durability: &str, parameters: u64) -> Result {
    let record = |index| Record {
        name: format!("layer.{index}"),
        format: FORMAT,
        parameters: parameters / RECORDS,
    };
    let tensor = |index: u64| Tensor {
        name: format!("layer.{index}.weight"),
        record: usize::try_from(index).expect("small"),
        offset: 0,
        shape: vec![parameters / RECORDS],
    };
    let manifest = Manifest {
        chunk_parameters: CHUNK,
        drives: files.len(),
        durability: if durability == "scratch" { Durability::Scratch } else { Durability::Step },
        content: Content::Training,
        records: (0..RECORDS).map(record).collect(),
        tensors: (0..RECORDS).map(tensor).collect(),
        model: serde_json::Value::Null.into(),
    };
    let ledger = Ledger::new();
    let mut creator = StoreCreator::new(files, manifest, Choice::Auto, &ledger)?;
    for (index, chunk) in creator.layout()?.chunks().to_vec().into_iter().enumerate() {
        let slot = Slot::standalone(chunk.extent_bytes(Group::Weight), &ledger, "import")?;
        creator.write_group(index, Group::Weight, 1, slot)?;
    }
    creator.finish(b"imported").map(|_| ())
}

fn run(files: &[PathBuf], durability: &str, steps: u64, every: u64) -> Result {
    let ledger = Ledger::new();
    let store = Store::open(files, OpenOptions::default(), &ledger)?;
    let store = Arc::new(store);
    let pipeline = Pipeline::start(Arc::clone(&store), &options(&store))?;
    let schedule = schedule(&store)?;
    // The first two steps write each copy for the first time, which costs the file system more.
    for step in 1..=2 {
        train(&pipeline, &schedule, step, true)?;
    }
    while !pipeline.wait_durable(LONG)? {}
    let (start, before) = (Instant::now(), store.engine().0.counters().totals());
    for step in 3..steps + 3 {
        let commit = (step - 2).is_multiple_of(every) || durability == "scratch";
        train(&pipeline, &schedule, step, commit)?;
    }
    while !pipeline.wait_durable(LONG)? {}
    let (seconds, after) = (start.elapsed(), store.engine().0.counters().totals());
    drop(pipeline);
    store.mark_clean()?;
    let figures = serde_json::json!({
        "durability": durability,
        "seconds": seconds.as_secs_f64(),
        "read": after.0 - before.0,
        "written": after.1 - before.1,
    });
    #[expect(clippy::print_stdout, reason = "the result of a program")]
    {
        println!("{figures}");
    }
    Ok(())
}

fn options(store: &Store) -> Options {
    let kind = |bytes, count| memory::Kind { bytes, count };
    let layout = store.layout();
    let parameters = usize::try_from(layout.record_parameters(0)).expect("fits memory");
    let chunk = layout.chunks()[0].parameters;
    let pool = PoolSizes {
        chunk_slots: kind(chunk_slot_bytes(FORMAT, chunk), 4),
        weights: vec![BufferKind::of_all(layout.record_weight_bytes(0), 3)],
        gradients: vec![BufferKind::of_all(parameters * 4, 2)],
        ..PoolSizes::default()
    };
    let settings = |(record, records): (usize, &std::ops::Range<usize>)| TensorSettings {
        record,
        offset: 0,
        elements: layout.record_parameters(layout.chunks()[records.start].record),
        weight_decay: 0.0,
        lr_scale: 1.0,
    };
    let tensors = layout.records().iter().enumerate().map(settings).collect();
    Options {
        pool,
        threads: 0,
        kernel: None,
        tensors,
        residents: Residents::default(),
        gradient_files: GradientFiles::default(),
        unit: Unit::Record,
    }
}

/// Weights of all records, forward; then backward, each with its update.
fn schedule(store: &Store) -> Result<Arc<CheckedSchedule>> {
    let layout = store.layout();
    let of = |record: usize, kind| {
        layout.records()[record].clone().map(move |chunk| ChunkOp { kind, chunk })
    };
    let mut operations = Vec::new();
    for record in 0..layout.records().len() {
        operations.extend(of(record, Kind::Load));
    }
    for record in (0..layout.records().len()).rev() {
        operations.extend(of(record, Kind::Load));
        operations.extend(of(record, Kind::Update));
    }
    CheckedSchedule::new(layout, operations).map(Arc::new)
}

/// A step with the gradient that happens to be in the buffer: zeros.
fn train(pipeline: &Pipeline, schedule: &Arc<CheckedSchedule>, step: u64, commit: bool) -> Result {
    let adamw = AdamW { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, step };
    let records = pipeline.store().layout().records().len();
    pipeline.begin(Arc::clone(schedule), adamw, commit)?;
    for record in 0..records {
        drop(pipeline.take_weights(record, LONG)?.expect("within a minute"));
    }
    for record in (0..records).rev() {
        let weights = pipeline.take_weights(record, LONG)?.expect("within a minute");
        let gradient = pipeline.take_gradient(record, LONG)?.expect("within a minute");
        pipeline.submit(record, Some(weights), gradient)?;
    }
    pipeline.end(commit.then(|| step.to_le_bytes().to_vec()), After::Stands)
}
