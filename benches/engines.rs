//! The engines and their settings side by side: `cargo bench --bench engines -- [--rounds N] [--mib N] WORD...`
//! where the words pick comparisons by name. Forms take turns within each round; a row has the median, the
//! least and the most of all rounds, and CPU seconds beside the throughput.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::unbounded;
use megatrain_io::buffer::SlotList;
use megatrain_io::engine::threads::{self, Threads};
use megatrain_io::engine::uring::{self, Uring};
use megatrain_io::engine::{Engine, Operation, Request};
use megatrain_io::file::DirectFile;
use megatrain_io::ledger::Ledger;
use rustix::time::{ClockId, clock_gettime};

/// One engine with its settings, and the requests that it is given.
struct Form {
    name: String,
    engine: Arc<dyn Engine>,
    registers: bool,
    bytes: usize,
    in_flight: usize,
}

/// Which operation has which number.
type Order = fn(usize) -> Operation;

const KINDS: [(&str, Order); 3] = [
    ("read", |_| Operation::Read),
    ("write", |_| Operation::Write),
    // 14 reads to 12 writes, as in training.
    ("mixed", |number| if number % 13 < 7 { Operation::Read } else { Operation::Write }),
];
/// Request size and requests in flight: metadata, small chunks, the update planes of a whole chunk.
const REQUESTS: [(usize, usize); 3] = [(64 << 10, 64), (1 << 20, 32), (20 << 20, 4)];

fn uring(tuning: uring::Tuning) -> Arc<dyn Engine> {
    Arc::new(Uring::start_with(tuning).expect("io_uring"))
}

fn threads(threads: usize, piece_bytes: usize) -> Arc<dyn Engine> {
    Arc::new(Threads::start_with(threads::Tuning { threads, piece_bytes }).expect("threads"))
}

fn form(name: String, engine: Arc<dyn Engine>, (bytes, in_flight): (usize, usize)) -> Form {
    Form { name, engine, registers: true, bytes, in_flight }
}

/// What falls back to what: each price of a refusal.
fn fallbacks(requests: (usize, usize)) -> Vec<Form> {
    let plain = uring::Tuning::default();
    let mut unregistered = form("uring, pool not registered".into(), uring(plain), requests);
    unregistered.registers = false;
    let tuning = threads::Tuning::default();
    vec![
        form("uring, registered pool".into(), uring(plain), requests),
        unregistered,
        form("threads".into(), threads(tuning.threads, tuning.piece_bytes), requests),
    ]
}

/// How deep, and into what pieces large requests are cut.
fn settings(requests: (usize, usize)) -> Vec<Form> {
    let grid = [32, 64].map(|depth| [1, 2, 4].map(|mib| (depth, mib << 20)));
    grid.into_iter()
        .flatten()
        .map(|(depth, piece_bytes)| {
            let name = format!("depth {depth}, pieces of {} MiB", piece_bytes >> 20);
            form(name, uring(uring::Tuning { depth, piece_bytes }), requests)
        })
        .collect()
}

/// How many threads, and into what pieces large requests are cut.
fn pools(requests: (usize, usize)) -> Vec<Form> {
    let mut forms = vec![form("uring".into(), uring(uring::Tuning::default()), requests)];
    for (count, piece_bytes) in
        [(8, 2 << 20), (8, 1 << 30), (12, 2 << 20), (16, 1 << 20), (16, 2 << 20), (16, 4 << 20)]
    {
        let name = format!("{count} threads, pieces of {} MiB", piece_bytes >> 20);
        forms.push(form(name, threads(count, piece_bytes), requests));
    }
    forms
}

type Comparison = fn((usize, usize)) -> Vec<Form>;
const COMPARISONS: [(&str, Comparison); 3] =
    [("fallbacks", fallbacks), ("settings", settings), ("pools", pools)];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |name: &str, default: usize| {
        let place = arguments.iter().position(|argument| argument == name);
        let value = place.and_then(|place| arguments.get(place + 1)).and_then(|v| v.parse().ok());
        value.unwrap_or(default)
    };
    let (rounds, file_bytes) = (number("--rounds", 5), number("--mib", 512) << 20);
    let wanted = |name: &str| {
        let mut words = COMPARISONS.iter().map(|(name, _)| *name);
        !words.any(|word| arguments.iter().any(|argument| argument == word))
            || arguments.iter().any(|argument| argument == name)
    };
    let file = file(file_bytes);
    for (name, make) in COMPARISONS.into_iter().filter(|(name, _)| wanted(name)) {
        for requests in REQUESTS {
            compare(name, &make(requests), &file, file_bytes, rounds);
        }
    }
}

/// Written once, so that every extent is more than reserved; without a name, so that nothing is left.
fn file(bytes: usize) -> Arc<DirectFile> {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let path = folder.join(format!("engines-{}", std::process::id()));
    let file = DirectFile::create(&path, bytes as u64).expect("space for the file");
    std::fs::remove_file(&path).expect("removed");
    let file = Arc::new(file);
    let form = form(String::new(), threads(8, 2 << 20), (4 << 20, 8));
    run(&form, &slots(&form), &file, bytes, |_| Operation::Write);
    file
}

fn slots(form: &Form) -> SlotList {
    let (region, mut lists) =
        SlotList::cut(&[(form.bytes, form.in_flight)], &Ledger::new(), "bench").expect("memory");
    let found = region.populate();
    assert!(found.is_none_or(|found| found.is_enough()), "the pool lies in small pages: {found:?}");
    if form.registers {
        form.engine
            .register(&region)
            .expect("registered: needs CAP_IPC_LOCK or a raised ulimit -l");
    }
    lists.remove(0)
}

#[expect(clippy::cast_precision_loss, clippy::print_stdout, reason = "a table for people")]
fn compare(name: &str, forms: &[Form], file: &Arc<DirectFile>, file_bytes: usize, rounds: usize) {
    let mut found = vec![[const { (Vec::new(), Vec::new()) }; KINDS.len()]; forms.len()];
    for round in 0..rounds {
        for (kind, (_, operation)) in KINDS.iter().enumerate() {
            for turn in 0..forms.len() {
                // Another one goes first each time.
                let place = (turn + round) % forms.len();
                let slots = slots(&forms[place]);
                let (start, cpu) = (Instant::now(), cpu_seconds());
                let moved = run(&forms[place], &slots, file, file_bytes, operation);
                let seconds = start.elapsed().as_secs_f64();
                let (gb_s, cpu_s_gb) = &mut found[place][kind];
                gb_s.push(moved as f64 / 1e9 / seconds);
                cpu_s_gb.push((cpu_seconds() - cpu) * 1e9 / moved as f64);
                forms[place].engine.unregister();
            }
        }
    }
    let (bytes, in_flight) = (forms[0].bytes, forms[0].in_flight);
    println!("\n{name}: requests of {} KiB, {in_flight} in flight, {rounds} rounds\n", bytes >> 10);
    println!("| form | read GB/s | CPU s/GB | write GB/s | CPU s/GB | mixed GB/s | CPU s/GB |");
    println!("|---|---|---|---|---|---|---|");
    for (form, kinds) in forms.iter().zip(&mut found) {
        let cells = kinds.each_mut().map(|(gb_s, cpu)| {
            let (least, middle, most) = spread(gb_s);
            let (_, cpu, _) = spread(cpu);
            format!("{middle:.2} ({least:.2} to {most:.2}) | {cpu:.4}")
        });
        println!("| {} | {} |", form.name, cells.join(" | "));
    }
}

fn spread(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}

#[expect(clippy::cast_precision_loss, reason = "seconds")]
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Transfers the whole file once; the bytes moved.
fn run(
    form: &Form,
    slots: &SlotList,
    file: &Arc<DirectFile>,
    file_bytes: usize,
    operation: impl Fn(usize) -> Operation,
) -> usize {
    let (reply, completions) = unbounded();
    let count = file_bytes / form.bytes;
    let mut next = 0;
    for _ in 0..count {
        while next < count
            && let Some(slot) = slots.try_take()
        {
            form.engine.submit(Request {
                operation: operation(next),
                file: Arc::clone(file),
                offset: (next * form.bytes) as u64,
                slot: Some(slot),
                bytes: form.bytes,
                tag: 0,
                reply: reply.clone(),
            });
            next += 1;
        }
        completions.recv().expect("a completion").result.expect("transferred");
    }
    count * form.bytes
}
