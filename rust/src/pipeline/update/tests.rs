use super::*;
use crate::memory::ledger::Ledger;
use crate::optimizer::adamw::Scalars;
use crate::store::layout::tests::manifest;

fn scalars(weight_decay: f64) -> Scalars {
    crate::optimizer::adamw::tests::ADAMW.scalars(1.0, weight_decay)
}

fn slot(bytes: usize, seed: usize) -> Slot {
    let mut slot = Slot::standalone(bytes.max(1), &Ledger::new(), "test").expect("memory");
    for (index, value) in slot.chunks_exact_mut(4).enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let number = ((index * 7 + seed) % 1009) as f32 / 1009.0;
        value.copy_from_slice(&number.to_le_bytes());
    }
    slot
}

/// Bits and sums are those of `update_split` or `update_f32` and of `checksum::sums`.
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
            Span { start: 0, len: 8003, scalars: scalars(0.01) },
            Span { start: 8064, len: parameters - 8064 - 128, scalars: scalars(0.0) },
        ];
        let manifest = manifest(parameters as u64, &[(format, parameters as u64)]);
        let chunk = Layout::new(&manifest).expect("a layout").chunks()[0];
        let weights = slot(parameters * format.weight_bytes(), 1);
        let gradient = slot(parameters * 4, 2);
        let bytes = Group::ALL.map(|group| chunk.extent_bytes(group));
        let (mut out, mut planes) = (slot(bytes[0], 3), slot(bytes[1], 4));
        let update = |weights: Weights<'_>, planes: &mut Slot, stays: bool| {
            let bindings = [&bindings[0], &bindings[1]].map(|b| (!stays).then_some(b));
            let kernel = Kernel::detect();
            one.install(|| {
                update_chunk(kernel, &spans, &chunk, weights, &gradient, planes, bindings)
            })
        };
        let sums = update(Weights::Apart(&weights, &mut out), &mut planes, false);
        // In place, with checksums and without.
        for stays in [false, true] {
            let (mut own, mut own_planes) = (slot(bytes[0], 1), slot(bytes[1], 4));
            let own_sums = update(Weights::InPlace(&mut own), &mut own_planes, stays);
            assert!(own[..] == out[..] && own_planes[..] == planes[..], "{format:?} {parameters}");
            assert_eq!(own_sums, if stays { [vec![], vec![]] } else { sums.clone() });
        }
        let (mut expected_out, mut expected) = (slot(bytes[0], 3), slot(bytes[1], 4));
        plain(format, parameters, &spans, &weights, &gradient, &mut expected_out, &mut expected);
        assert!(
            out[..] == expected_out[..] && planes[..] == expected[..],
            "{format:?} {parameters}"
        );
        assert_eq!(sums[0], checksum::sums(&bindings[0], &expected_out));
        assert_eq!(sums[1], checksum::sums(&bindings[1], &expected));
    }
}

#[expect(clippy::too_many_arguments, reason = "one slice a plane")]
fn plain(
    format: StateFormat,
    parameters: usize,
    spans: &[Span],
    weights: &[u8],
    gradient: &[u8],
    out: &mut [u8],
    planes: &mut [u8],
) {
    let (kernel, gradient) = (Kernel::detect(), &cast_slice(gradient)[..parameters]);
    let content = parameters * format.weight_bytes();
    let (weights, out) = (&weights[..content], &mut out[..content]);
    if format == StateFormat::Bf16 {
        let (low, moments) = planes.split_at_mut(parameters * 2);
        let (m, v) = moments.split_at_mut(parameters * 4);
        let (low, m) = (cast_slice_mut(low), cast_slice_mut(m));
        let v = cast_slice_mut(&mut v[..parameters * 4]);
        let (weights, out) = (cast_slice(weights), cast_slice_mut(out));
        adamw::update_split(kernel, spans, Some(weights), out, low, gradient, m, v);
    } else {
        let (m, v) = planes.split_at_mut(parameters * 4);
        let (m, v) = (cast_slice_mut(m), cast_slice_mut(&mut v[..parameters * 4]));
        let (weights, out) = (cast_slice(weights), cast_slice_mut(out));
        adamw::update_f32(kernel, spans, Some(weights), out, gradient, m, v);
    }
}
