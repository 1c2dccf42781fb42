//! The crash model: the real store and the real executor over a faulty drive in RAM.
//!
//! One thread drives everything, so a run follows from its seed alone: it picks whether the executor
//! turns, the trainer goes on, or the drive performs one of the operations in flight, and where the
//! process is killed or the power goes. After each of these the store is opened again and must hold,
//! to the bit, the last acknowledged state or the one whose commit was under way.
//!
//! `make soak` runs more of the same: `MEGATRAIN_SOAK_RUNS` says how many.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::io::drives::Drives;
use crate::io::engine::Engine;
use crate::io::engine::faulty::{Fault, Faulty};
use crate::io::engine::memory::Memory;
use crate::io::file::DirectFile;
use crate::memory::ledger::Ledger;
use crate::pipeline::GradientFiles;
use crate::pipeline::crash_model::broken::{Breakage, Broken};
use crate::pipeline::crash_model::memories::Memories;
use crate::pipeline::crash_model::training::Machine;
use crate::store::layout::tests::manifest;
use crate::store::layout::{Durability, Manifest};
use crate::store::{Creator, Store};
use crate::units::{CopyId, Group, StateFormat};

mod broken;
mod calls;
mod causes;
mod exhaustive;
mod memories;
mod process;
mod random;
mod refused;
mod training;

/// An imported store that every run starts from.
struct Base {
    _folder: tempfile::TempDir,
    drives: Drives,
    gradient_files: GradientFiles,
    image: Memory,
    records: Vec<u64>,
    is_scratch: bool,
    /// What the mutations need to know of the layout.
    data_offset: u64,
    copy_bytes: u64,
}

impl Base {
    fn new(records: &[u64], durability: Durability, drives: usize) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |drive| folder.path().join(format!("store.{drive}.mtio"));
        let paths: Vec<_> = (0..drives).map(path).collect();
        let ledger = Ledger::new();
        let shape: Vec<_> = records.iter().map(|n| (StateFormat::F32, *n)).collect();
        let engine = Arc::new(Memory::default());
        let over = Arc::clone(&engine) as Arc<dyn Engine>;
        let manifest = Manifest { durability, ..manifest(4096, &shape) };
        let mut creator = Creator::over(over, None, &paths, manifest, &ledger).expect("created");
        memories::import(&mut creator, &Memories::imported(records), &ledger);
        creator.finish(b"step 0").expect("finished");
        let drives = Drives::open_waiting(&paths, &mut |_, _| Ok(())).expect("opened");
        let store = Store::open_on(&drives, engine.clone(), [1; 16], &ledger).expect("opened");
        let place = |copy| store.layout().extent_offset(0, Group::Weight, copy);
        let copy_bytes = place(CopyId::B) - place(CopyId::A);
        let data_offset = store.data_offset();
        let image = engine.copy();
        let (records, is_scratch) = (records.to_vec(), durability == Durability::Scratch);
        // Only its number counts: the bytes lie in the image, with what the process before left there.
        let file = |_| DirectFile::in_memory(1 << 20).expect("a file");
        let files = (0..drives.count()).map(file).collect();
        let gradient_files = GradientFiles::over(files).expect("numbered");
        Self {
            _folder: folder,
            drives,
            gradient_files,
            image,
            records,
            is_scratch,
            data_offset,
            copy_bytes,
        }
    }

    /// A machine with this store on its drive.
    fn machine(&self, run: &Run) -> Machine<'_> {
        let plan = crate::io::engine::faulty::Plan {
            seed: run.seed,
            ignores_flushes: run.ignores_flushes,
            ..Default::default()
        };
        let drive = Arc::new(Faulty::over(Arc::new(self.image.copy()), plan));
        let engine = Broken::over(Arc::clone(&drive), run.breakage, self);
        Machine::new(self, run, drive, engine)
    }
}

/// What a run is made of.
#[derive(Clone, Debug)]
struct Run {
    seed: u64,
    /// Optimizer steps to train.
    steps: u64,
    commit_every: u64,
    /// Whether each step trains only some of the records.
    partial: bool,
    stays: Stays,
    clips: Clips,
    /// Whether weights and gradients go to and fro by chunk.
    by_chunk: bool,
    breakage: Breakage,
    ignores_flushes: bool,
}

/// What stays in RAM from step to step; of the gradients, where those that are kept wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stays {
    Nothing,
    /// The weights of every second record, and the update planes of every second chunk.
    Half,
    All,
}

/// When updates are made that need the norm of all gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clips {
    /// At once: they do not.
    Never,
    /// By the next step.
    Deferred,
    /// At once, and taken back when the norm is too large; each third step the next one makes them.
    Guessed,
}

impl Run {
    /// What the gradients of a step are multiplied by.
    fn scale(&self, step: u64) -> f32 {
        let mut rng = fastrand::Rng::with_seed(self.seed ^ (step << 16));
        if self.clips == Clips::Never || rng.bool() { 1.0 } else { 0.5 }
    }

    /// Whether a step updates with its own gradients, and whether it keeps them.
    fn updates_and_keeps(&self, step: u64) -> (bool, bool) {
        match self.clips {
            Clips::Never => (true, false),
            Clips::Deferred => (false, true),
            // Updates can be taken back only beside a committed state.
            Clips::Guessed => {
                let is_behind_a_commit = (step - 1).is_multiple_of(self.commit_every);
                (is_behind_a_commit && !step.is_multiple_of(3), true)
            }
        }
    }
}

impl Default for Run {
    fn default() -> Self {
        Self {
            seed: 0,
            steps: 3,
            commit_every: 1,
            partial: false,
            stays: Stays::Nothing,
            clips: Clips::Never,
            by_chunk: false,
            breakage: Breakage::Nothing,
            ignores_flushes: false,
        }
    }
}

/// Checks all numbers below `runs` on all cores, and stops at a failure. Not by rayon: a worker that
/// waits for another pool, as the executor makes it do, would begin the next run on the same stack.
fn first_failure(runs: u64, check: impl Fn(u64) -> Verdict + Sync) -> Option<String> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (next, failure) = (AtomicU64::new(0), OnceLock::new());
    let work = || {
        while failure.get().is_none() {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= runs {
                return;
            }
            if let Err(error) = check(number) {
                let _ = failure.set(error);
            }
        }
    };
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    failure.into_inner()
}

/// What a run found: why it failed, in a sentence that names the seed.
type Verdict = Result<(), String>;
