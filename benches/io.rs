//! How fast the engines move extents, and with how much CPU: `cargo bench --bench io`. The file lies in
//! the build folder, so it is that drive which is measured.

use std::sync::{Arc, OnceLock};

use crossbeam_channel::unbounded;
use divan::Bencher;
use divan::counter::BytesCount;
use megatrain_io::buffer::SlotList;
use megatrain_io::engine::choice::{self, Choice};
use megatrain_io::engine::{Engine, Operation, Request};
use megatrain_io::file::DirectFile;
use megatrain_io::ledger::Ledger;

const FILE_BYTES: usize = 512 << 20;

fn main() {
    divan::main();
}

/// One file, written once, so that every extent is more than reserved.
fn file() -> Arc<DirectFile> {
    static FILE: OnceLock<Arc<DirectFile>> = OnceLock::new();
    let make = || {
        let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
        let path = folder.join(format!("io-{}", std::process::id()));
        let file = DirectFile::create(&path, FILE_BYTES as u64).expect("space for the file");
        // Nothing is left behind, however the benchmark ends.
        std::fs::remove_file(&path).expect("removed");
        let file = Arc::new(file);
        let engine = engine("threads");
        Transfers::new(&engine, 4 << 20, 8).run(&file, |_| Operation::Write);
        file
    };
    Arc::clone(FILE.get_or_init(make))
}

fn engine(name: &str) -> Arc<dyn Engine> {
    let choice = if name == "uring" { Choice::Uring } else { Choice::Threads };
    choice::start(choice, 1).expect("an engine").0
}

/// Transfers over the whole file, so many in flight.
struct Transfers {
    engine: Arc<dyn Engine>,
    slots: SlotList,
    bytes: usize,
}

impl Transfers {
    fn new(engine: &Arc<dyn Engine>, bytes: usize, depth: usize) -> Self {
        let (region, mut lists) =
            SlotList::cut(&[(bytes, depth)], &Ledger::new(), "bench").expect("memory");
        // A refusal (RLIMIT_MEMLOCK) costs CPU time only.
        let _ = engine.register(&region);
        Self { engine: Arc::clone(engine), slots: lists.remove(0), bytes }
    }

    fn run(&self, file: &Arc<DirectFile>, operation: impl Fn(usize) -> Operation) {
        let (reply, completions) = unbounded();
        let count = FILE_BYTES / self.bytes;
        let mut next = 0;
        for _ in 0..count {
            while next < count
                && let Some(slot) = self.slots.try_take()
            {
                self.engine.submit(Request {
                    operation: operation(next),
                    file: Arc::clone(file),
                    offset: (next * self.bytes) as u64,
                    slot: Some(slot),
                    bytes: self.bytes,
                    tag: 0,
                    reply: reply.clone(),
                });
                next += 1;
            }
            completions.recv().expect("a completion").result.expect("transferred");
        }
    }
}

const FORMS: [(&str, usize, usize); 6] = [
    ("uring", 1 << 20, 32),
    ("uring", 4 << 20, 8),
    ("uring", 20 << 20, 4),
    ("threads", 1 << 20, 32),
    ("threads", 4 << 20, 8),
    ("threads", 20 << 20, 4),
];

fn measure(
    bencher: Bencher,
    (name, bytes, depth): (&str, usize, usize),
    operation: impl Fn(usize) -> Operation + Copy,
) {
    let (file, engine) = (file(), engine(name));
    let transfers = Transfers::new(&engine, bytes, depth);
    bencher
        .counter(BytesCount::new(FILE_BYTES / bytes * bytes))
        .bench_local(|| transfers.run(&file, operation));
    engine.unregister();
}

/// Engine, bytes of a request, requests in flight.
#[divan::bench(args = FORMS, sample_count = 7)]
fn read(bencher: Bencher, form: (&str, usize, usize)) {
    measure(bencher, form, |_| Operation::Read);
}

#[divan::bench(args = FORMS, sample_count = 7)]
fn write(bencher: Bencher, form: (&str, usize, usize)) {
    measure(bencher, form, |_| Operation::Write);
}

/// 14 reads to 12 writes, as in training.
#[divan::bench(args = FORMS, sample_count = 7)]
fn mixed(bencher: Bencher, form: (&str, usize, usize)) {
    measure(
        bencher,
        form,
        |number| {
            if number % 13 < 7 { Operation::Read } else { Operation::Write }
        },
    );
}
