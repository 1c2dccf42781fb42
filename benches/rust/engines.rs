//! The engines with other settings than their own, side by side, and what each fallback costs.
//!
//!     cargo bench --bench engines -- fallbacks settings pools [--rounds N] [--mib N]
//!
//! Forms take turns within each round; a cell has the median, the least and the most of all rounds, and CPU
//! seconds beside the throughput. Without a word it does nothing: `cargo bench` runs every benchmark, and
//! `io` compares the engines as they are.
#![expect(clippy::print_stdout, reason = "a table for people")]

use std::path::Path;
use std::sync::Arc;

use megatrain_io::Result;
use megatrain_io::io::Engine;
use megatrain_io::io::threads::{self, Threads};
use megatrain_io::io::uring::{self, Uring};
use megatrain_io::measure::{Figure, Form, Limit, ScratchFile, Traffic, Transfers};

/// One engine with its settings.
struct Contender {
    name: String,
    engine: Arc<dyn Engine>,
    registers: bool,
    /// By kind of traffic.
    figures: [Vec<Figure>; KINDS.len()],
}

const KINDS: [Traffic; 3] = [Traffic::Read, Traffic::Write, Traffic::Mixed];
/// Small chunks, and the update planes of a whole one.
const FORMS: [Form; 2] = [Form { bytes: 1 << 20, depth: 32 }, Form { bytes: 20 << 20, depth: 4 }];

type Comparison = fn() -> Result<Vec<Contender>>;
const COMPARISONS: [(&str, Comparison); 3] =
    [("fallbacks", fallbacks), ("settings", settings), ("pools", pools)];

fn contender(name: String, engine: Arc<dyn Engine>) -> Contender {
    Contender { name, engine, registers: true, figures: Default::default() }
}

fn uring(name: impl Into<String>, tuning: uring::Tuning) -> Result<Contender> {
    Ok(contender(name.into(), Arc::new(Uring::start_with(tuning)?)))
}

fn threads(name: impl Into<String>, tuning: threads::Tuning) -> Result<Contender> {
    Ok(contender(name.into(), Arc::new(Threads::start_with(tuning)?)))
}

/// What falls back to what: each price of a refusal.
fn fallbacks() -> Result<Vec<Contender>> {
    let tuning = uring::Tuning::default();
    let unregistered =
        Contender { registers: false, ..uring("uring, pool not registered", tuning)? };
    let threads = threads("threads", threads::Tuning::default())?;
    Ok(vec![uring("uring, registered pool", tuning)?, unregistered, threads])
}

/// How deep, and into what pieces large requests are cut.
fn settings() -> Result<Vec<Contender>> {
    let grid = [32, 64].into_iter().flat_map(|depth| [1, 2, 4].map(|mib| (depth, mib)));
    grid.map(|(depth, mib)| {
        let name = format!("depth {depth}, pieces of {mib} MiB");
        uring(name, uring::Tuning { depth, piece_bytes: mib << 20 })
    })
    .collect()
}

/// How many threads, and into what pieces large requests are cut.
fn pools() -> Result<Vec<Contender>> {
    let grid = [(8, 2), (8, 1024), (12, 2), (16, 1), (16, 2), (16, 4)];
    let pools = grid.into_iter().map(|(count, mib)| {
        let name = format!("{count} threads, pieces of {mib} MiB");
        threads(name, threads::Tuning { threads: count, piece_bytes: mib << 20 })
    });
    std::iter::once(uring("uring", uring::Tuning::default())).chain(pools).collect()
}

fn main() -> Result {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |name: &str, default: u64| {
        let at = words.iter().position(|word| word == name);
        at.and_then(|at| words.get(at + 1)).and_then(|word| word.parse().ok()).unwrap_or(default)
    };
    let (rounds, bytes) = (number("--rounds", 5), number("--mib", 512) << 20);
    let wanted = COMPARISONS.iter().filter(|(name, _)| words.iter().any(|word| word == name));
    let mut file = None;
    for (name, make) in wanted {
        let file = match &mut file {
            Some(file) => file,
            empty => empty.insert(written(bytes)?),
        };
        for form in FORMS {
            let mut contenders = make()?;
            compare(&mut contenders, form, file, rounds)?;
            print(name, &contenders, form, rounds);
        }
    }
    Ok(())
}

/// Written once, so that every extent is more than reserved.
fn written(bytes: u64) -> Result<ScratchFile> {
    let file = ScratchFile::create(Path::new(env!("CARGO_TARGET_TMPDIR")), bytes)?;
    let engine: Arc<dyn Engine> = Arc::new(Threads::start(1)?);
    file.fill(&engine)?;
    Ok(file)
}

fn compare(contenders: &mut [Contender], form: Form, file: &ScratchFile, rounds: u64) -> Result {
    let count = contenders.len();
    for round in 0..rounds {
        for (kind, traffic) in KINDS.into_iter().enumerate() {
            for turn in 0..count {
                // Another one goes first each time.
                let contender = &mut contenders[(turn + megatrain_io::to_usize(round)) % count];
                let transfers = Transfers::new(&contender.engine, form)?;
                if let Some(why) = transfers.registration_refused() {
                    println!("{}: memory is not registered: {why}", contender.name);
                }
                if !contender.registers {
                    contender.engine.unregister();
                }
                let figure = transfers.run(file, traffic, 0, Limit::bytes(file.bytes()))?;
                contender.figures[kind].push(figure);
            }
        }
    }
    Ok(())
}

fn print(name: &str, contenders: &[Contender], form: Form, rounds: u64) {
    let Form { bytes, depth } = form;
    println!("\n{name}: requests of {} KiB, {depth} in flight, {rounds} rounds\n", bytes >> 10);
    println!("| form | read GB/s | CPU s/GB | write GB/s | CPU s/GB | mixed GB/s | CPU s/GB |");
    println!("|---|---|---|---|---|---|---|");
    for contender in contenders {
        let cells = contender.figures.each_ref().map(|figures| {
            let (least, middle, most) = spread(figures, Figure::gb_per_s);
            let (_, cpu, _) = spread(figures, Figure::cpu_s_per_gb);
            format!("{middle:.2} ({least:.2} to {most:.2}) | {cpu:.4}")
        });
        println!("| {} | {} |", contender.name, cells.join(" | "));
    }
}

fn spread(figures: &[Figure], value: fn(&Figure) -> f64) -> (f64, f64, f64) {
    let mut values: Vec<f64> = figures.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}
