//! How fast the engines move extents, and with how much CPU: `cargo bench --bench io`.
//!
//!     cargo bench --bench io -- [--rounds N] [--mib N] [--folder DIR]
//!
//! Engines and forms take turns within each round, so that a drift of the drive is nobody's. The file
//! lies in the build folder unless another is named, so it is that drive which is measured.
#![expect(clippy::print_stdout, reason = "the result of a program")]

use std::path::PathBuf;
use std::sync::Arc;

use megatrain_io::io::{Choice, Engine, start};
use megatrain_io::measure::{Figure, Form, Limit, ScratchFile, Traffic, Transfers};
use megatrain_io::{Error, Result};

const FILE_BYTES: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

struct Options {
    rounds: usize,
    bytes: u64,
    folder: PathBuf,
}

/// One row of the table.
struct Contender {
    kind: &'static str,
    traffic: Traffic,
    form: Form,
    engine: Arc<dyn Engine>,
    figures: Vec<Figure>,
}

fn main() -> Result {
    let options = options()?;
    let engines = engines()?;
    let file = ScratchFile::create(&options.folder, FILE_BYTES)?;
    // What was never written is not read from the drive.
    file.fill(&engines[0])?;
    let mut contenders = contenders(&engines);
    for round in 0..options.rounds {
        for turn in 0..contenders.len() {
            let count = contenders.len();
            let contender = &mut contenders[(turn + round) % count];
            let transfers = match contender.traffic {
                Traffic::Training => {
                    Transfers::for_training(&contender.engine, contender.form.depth)
                }
                _ => Transfers::new(&contender.engine, contender.form),
            }?;
            if let (0, Some(why)) = (round, transfers.registration_refused()) {
                println!("{}: memory is not registered: {why}", contender.engine.name());
            }
            let limit = Limit::bytes(options.bytes);
            contender.figures.push(transfers.run(&file, contender.traffic, 0, limit)?);
        }
    }
    file.verify(&engines[0])?;
    print(&contenders, &options, file.is_direct());
    Ok(())
}

fn options() -> Result<Options> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let mut options = Options { rounds: 5, bytes: 512 * MIB, folder };
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_default();
        let number = value.parse::<u64>().ok().filter(|number| *number > 0);
        match (word.as_str(), number) {
            ("--rounds", Some(number)) => options.rounds = megatrain_io::to_usize(number),
            ("--mib", Some(number)) => options.bytes = number * MIB,
            ("--folder", _) => options.folder = value.into(),
            _ => {
                return Err(Error::invalid(format!(
                    "{word} {value}: --rounds N, --mib N, --folder DIR"
                )));
            }
        }
    }
    Ok(options)
}

/// Threads always; io_uring where there is one, else the reason is said.
fn engines() -> Result<Vec<Arc<dyn Engine>>> {
    let mut engines = vec![start(Choice::Threads, 1)?.0];
    match start(Choice::Uring, 1) {
        Ok((engine, _)) => engines.insert(0, engine),
        Err(error) => println!("without uring: {error}"),
    }
    Ok(engines)
}

fn contenders(engines: &[Arc<dyn Engine>]) -> Vec<Contender> {
    let forms = [(1, 32), (4, 4), (4, 8), (4, 16), (8, 4), (20, 4)];
    let mut contenders = Vec::new();
    let mut add = |kind, traffic, mib: u64, depth| {
        for engine in engines {
            let form = Form { bytes: megatrain_io::to_usize(mib * MIB), depth };
            let engine = Arc::clone(engine);
            contenders.push(Contender { kind, traffic, form, engine, figures: Vec::new() });
        }
    };
    for (kind, traffic) in
        [("read", Traffic::Read), ("write", Traffic::Write), ("mixed", Traffic::Mixed)]
    {
        for (mib, depth) in forms {
            add(kind, traffic, mib, depth);
        }
    }
    for depth in [2, 4, 8] {
        add("mixed", Traffic::Training, 20, depth);
    }
    contenders
}

fn print(contenders: &[Contender], options: &Options, direct: bool) {
    let median = |contender: &Contender, value: fn(&Figure) -> f64| {
        let mut values: Vec<f64> = contender.figures.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        (values[values.len() / 2], values[0], values[values.len() - 1])
    };
    println!(
        "{} MiB a run, {} rounds in turn, {}; medians (least to most); mixed is 14 read to 12 written\n",
        options.bytes / MIB,
        options.rounds,
        if direct { "direct I/O" } else { "through the page cache: no direct I/O here" },
    );
    println!("| kind | request, in flight | engine | GB/s | CPU s/GB | of the best of its kind |");
    println!("|---|---|---|---|---|---|");
    for contender in contenders {
        let rates = contenders.iter().filter(|other| other.kind == contender.kind);
        let best = rates.map(|other| median(other, Figure::gb_per_s).0).fold(0.0, f64::max);
        let (rate, least, most) = median(contender, Figure::gb_per_s);
        let cpu = median(contender, Figure::cpu_s_per_gb).0;
        let form = match contender.traffic {
            Traffic::Training => format!("4 and 20 MiB, {}", contender.form.depth),
            _ => format!("{} MiB, {}", contender.form.bytes as u64 / MIB, contender.form.depth),
        };
        let (kind, engine, share) = (contender.kind, contender.engine.name(), 100.0 * rate / best);
        println!(
            "| {kind} | {form} | {engine} | {rate:.2} ({least:.2} to {most:.2}) | {cpu:.3} | {share:.0} % |"
        );
    }
}
