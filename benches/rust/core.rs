//! The parts that run on the CPU, each beside the ceiling of its machine: `cargo bench --bench core`.
//!
//! GB/s count every byte read or written by the kernel. The parts take turns, so that a drift of the
//! machine is nobody's. The ceiling is the faster of two ways to pass memory through all cores, measured
//! in the same run: a copy, and changing it where it is (a copy first reads what it overwrites).
#![expect(clippy::print_stdout, reason = "the result of a program")]

use divan::Bencher;
use megatrain_io::Result;
use megatrain_io::measure::{Figure, Workload};
use megatrain_io::memory::{Ledger, SlotList};
use megatrain_io::optimizer::Kernel;

/// Parameters of a large chunk set: far more than the caches hold.
const PARAMETERS: usize = 16 << 20;
const ROUNDS: usize = 11;

fn main() -> Result {
    divan::main();
    // With arguments it is one of divan's benchmarks that is wanted.
    if std::env::args().skip(1).any(|word| word != "--bench") {
        return Ok(());
    }
    let mut parts = Vec::new();
    for (name, title) in [
        ("copy", "memory copy"),
        ("update", "memory, changed in place"),
        ("checksum", "CRC-32C in units of 1 MiB"),
    ] {
        parts.push((title.to_owned(), Workload::named(name, PARAMETERS, None)?));
    }
    for kernel in Kernel::available() {
        for name in ["adamw f32", "adamw split", "adamw f32 in place", "adamw split in place"] {
            let workload = Workload::named(name, PARAMETERS, Some(&kernel.to_string()))?;
            parts.push((format!("{name}, {kernel}"), workload));
        }
    }
    let mut figures: Vec<Vec<Figure>> = vec![Vec::new(); parts.len()];
    for round in 0..=ROUNDS {
        for turn in 0..parts.len() {
            let index = (turn + round) % parts.len();
            let figure = parts[index].1.run();
            // The first round only touches the memory.
            if round > 0 {
                figures[index].push(figure);
            }
        }
    }
    print(&parts, &figures);
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a figure to print")]
fn print(parts: &[(String, Workload)], figures: &[Vec<Figure>]) {
    let median = |index: usize, value: fn(&Figure) -> f64| {
        let mut values: Vec<f64> = figures[index].iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        (values[values.len() / 2], values[0], values[values.len() - 1])
    };
    let ceiling = median(0, Figure::gb_per_s).0.max(median(1, Figure::gb_per_s).0);
    println!("\n{PARAMETERS} parameters, {ROUNDS} rounds in turn; medians (least to most)\n");
    println!("| part | GB/s | CPU s/GB | M parameters/s | of the ceiling |");
    println!("|---|---|---|---|---|");
    for (index, (name, _)) in parts.iter().enumerate() {
        let (rate, least, most) = median(index, Figure::gb_per_s);
        let cpu = median(index, Figure::cpu_s_per_gb).0;
        let seconds = median(index, |figure| figure.wall.as_secs_f64()).0;
        let pace = match name.starts_with("adamw") {
            true => format!("{:.0}", PARAMETERS as f64 / 1e6 / seconds),
            false => String::new(),
        };
        let share = 100.0 * rate / ceiling;
        println!(
            "| {name} | {rate:.1} ({least:.1} to {most:.1}) | {cpu:.3} | {pace} | {share:.0} % |"
        );
    }
}

/// Taking a slot and giving it back.
#[divan::bench]
fn pool_take_and_return(bencher: Bencher) {
    let (_region, mut lists) =
        SlotList::cut(&[(1 << 20, 8)], &Ledger::new(), "pool").expect("memory");
    let list = lists.remove(0);
    bencher.bench_local(|| drop(divan::black_box(list.try_take())));
}
