use super::*;
use crate::memory::ledger::Ledger;
use crate::optimizer::adamw::tests::ADAMW;
use crate::optimizer::hyperparameters::Hyperparameters;
use crate::optimizer::update::update;
use crate::store::layout::tests::manifest;
use crate::units::StateFormat;

fn slot(bytes: usize, seed: usize) -> Slot {
    let mut slot = Slot::standalone(bytes.max(1), &Ledger::new(), "test").expect("memory");
    for (index, value) in slot.chunks_exact_mut(4).enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let number = ((index * 7 + seed) % 1009) as f32 / 1009.0;
        value.copy_from_slice(&number.to_le_bytes());
    }
    slot
}

/// Bits and sums are those of the optimizer's update alone and of `checksum::sums`.
#[test]
fn one_pass_gives_the_bits_and_the_sums_of_two() {
    let store = [9; 16];
    let binding = |group| Binding { store, chunk: 5, group, generation: 4 };
    let bindings = [binding(Group::Weight), binding(Group::Update)];
    // With one thread no core is without work: one pass wherever the planes allow it.
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
    for (format, parameters) in [
        (StateFormat::Bf16, 1 << 20),
        (StateFormat::Bf16, (1 << 20) + 4096),
        (StateFormat::F32, 512 << 10),
        (StateFormat::F32, 768 << 10),
        (StateFormat::F32, 12288),
    ] {
        // A gap in between, and a tensor whose end fills no vector.
        let spans = [
            Span { start: 0, len: 8003, lr_scale: 1.0, weight_decay: 0.01 },
            Span { start: 8064, len: parameters - 8064 - 128, lr_scale: 1.0, weight_decay: 0.0 },
        ];
        let optimizer = Hyperparameters::AdamW(ADAMW).over(format, parameters, 1.0, &spans);
        let optimizer = optimizer.expect("a trained format");
        let manifest = manifest(parameters as u64, &[(format, parameters as u64)]);
        let chunk = Layout::new(&manifest).expect("a layout").chunks()[0];
        let weights = slot(parameters * format.weight_bytes(), 1);
        let gradient = slot(parameters * 4, 2);
        let bytes = Group::ALL.map(|group| chunk.extent_bytes(group));
        let (mut out, mut planes) = (slot(bytes[0], 3), slot(bytes[1], 4));
        let one_pass = |weights: Weights<'_>, planes: &mut Slot, stays: bool| {
            let bindings = [&bindings[0], &bindings[1]].map(|b| (!stays).then_some(b));
            let kernel = Kernel::detect();
            one.install(|| {
                update_chunk(kernel, &*optimizer, &chunk, weights, &gradient, planes, bindings)
            })
        };
        let sums = one_pass(Weights::Apart(&weights, &mut out), &mut planes, false);
        // In place, with checksums and without.
        for stays in [false, true] {
            let (mut own, mut own_planes) = (slot(bytes[0], 1), slot(bytes[1], 4));
            let own_sums = one_pass(Weights::InPlace(&mut own), &mut own_planes, stays);
            assert!(own[..] == out[..] && own_planes[..] == planes[..], "{format:?} {parameters}");
            assert_eq!(own_sums, if stays { [vec![], vec![]] } else { sums.clone() });
        }
        let (mut expected_out, mut expected) = (slot(bytes[0], 3), slot(bytes[1], 4));
        let (weights, content) = (&weights[..], parameters * format.weight_bytes());
        let (mut rest, ranges) = (&mut expected[..], chunk.plane_ranges(Group::Update));
        let cut = ranges.iter().filter_map(|range| rest.split_off_mut(..range.len())).collect();
        let (old, new) = (Some(&weights[..content]), &mut expected_out[..content]);
        let state = State::new(format, old, new, cast_slice(&gradient[..4 * parameters]), cut);
        update(Kernel::detect(), &*optimizer, state);
        assert!(
            out[..] == expected_out[..] && planes[..] == expected[..],
            "{format:?} {parameters}"
        );
        assert_eq!(sums[0], checksum::sums(&bindings[0], &expected_out));
        assert_eq!(sums[1], checksum::sums(&bindings[1], &expected));
    }
}
