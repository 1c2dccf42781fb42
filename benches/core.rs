//! The parts that run on the CPU, each beside the ceiling of its machine: `cargo bench --bench core`.
//! GB/s count every byte read or written by the kernel.

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use megatrain_io::adamw::{AdamW, Kernel, Span, update_f32, update_split};
use megatrain_io::buffer::SlotList;
use megatrain_io::checksum::{self, Binding};
use megatrain_io::ledger::Ledger;
use megatrain_io::units::Group;

/// Parameters of a large chunk set: far more than the caches hold.
const PARAMETERS: usize = 16 << 20;

fn main() {
    divan::main();
}

fn kernels() -> Vec<String> {
    Kernel::available().iter().map(Kernel::to_string).collect()
}

fn kernel(name: &str) -> Kernel {
    let found = Kernel::available().into_iter().find(|kernel| kernel.to_string() == name);
    found.expect("one of the available")
}

fn span() -> Span {
    let adamw = AdamW { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, step: 10 };
    Span { start: 0, len: PARAMETERS, scalars: adamw.scalars(1.0, 0.01) }
}

fn values(seed: usize) -> Vec<f32> {
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let value = |index: usize| ((index * 7 + seed) % 1009) as f32 / 1009.0 - 0.5;
    (0..PARAMETERS).map(value).collect()
}

/// AdamW with f32 weights: 16 bytes a parameter read, 12 written.
#[divan::bench(args = kernels(), sample_count = 15)]
fn adamw_f32(bencher: Bencher, name: &str) {
    let (weight, gradient) = (values(1), values(2));
    let mut out = values(3);
    let (mut exp_avg, mut exp_avg_sq) = (values(4), vec![0.1_f32; PARAMETERS]);
    bencher
        .counter(BytesCount::new(28 * PARAMETERS))
        .counter(ItemsCount::new(PARAMETERS))
        .bench_local(|| {
            update_f32(
                kernel(name),
                &[span()],
                &weight,
                &mut out,
                &gradient,
                &mut exp_avg,
                &mut exp_avg_sq,
            );
        });
}

/// AdamW with split weights: 16 bytes a parameter read, 12 written.
#[divan::bench(args = kernels(), sample_count = 15)]
fn adamw_split(bencher: Bencher, name: &str) {
    let gradient = values(2);
    let (weight, mut out) = (vec![0x3c00_u16; PARAMETERS], vec![0_u16; PARAMETERS]);
    let mut remainder = vec![3_i16; PARAMETERS];
    let (mut exp_avg, mut exp_avg_sq) = (values(4), vec![0.1_f32; PARAMETERS]);
    bencher
        .counter(BytesCount::new(28 * PARAMETERS))
        .counter(ItemsCount::new(PARAMETERS))
        .bench_local(|| {
            update_split(
                kernel(name),
                &[span()],
                &weight,
                &mut out,
                &mut remainder,
                &gradient,
                &mut exp_avg,
                &mut exp_avg_sq,
            );
        });
}

/// The ceiling of what moves memory: a copy on all cores.
#[divan::bench(sample_count = 15)]
fn copy(bencher: Bencher) {
    use rayon::prelude::*;
    let from = vec![1_u8; 4 * PARAMETERS];
    let mut to = vec![0_u8; 4 * PARAMETERS];
    bencher.counter(BytesCount::new(2 * from.len())).bench_local(|| {
        to.par_chunks_mut(1 << 20)
            .zip(from.par_chunks(1 << 20))
            .for_each(|(to, from)| to.copy_from_slice(from));
    });
}

/// CRC-32C in units of 1 MiB, on all cores.
#[divan::bench(sample_count = 15)]
fn checksums(bencher: Bencher) {
    let data = vec![7_u8; 4 * PARAMETERS];
    let binding = Binding { store: [1; 16], chunk: 0, group: Group::Weight, generation: 1 };
    bencher
        .counter(BytesCount::new(data.len()))
        .bench_local(|| divan::black_box(checksum::sums(&binding, &data)));
}

/// Taking a slot and giving it back.
#[divan::bench]
fn pool_take_and_return(bencher: Bencher) {
    let (_region, mut lists) =
        SlotList::cut(&[(1 << 20, 8)], &Ledger::new(), "pool").expect("memory");
    let list = lists.remove(0);
    bencher.bench_local(|| drop(divan::black_box(list.try_take())));
}
