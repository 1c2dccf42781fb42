use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Not an optimizer: it counts, so that nothing but the way through a chunk decides what comes out.
struct Counting;

impl Optimizer<2> for Counting {
    const FORMAT: StateFormat = StateFormat::F32;
    type Weight = f32;
    type Scalars = f32;

    fn step(
        kernel: Option<Kernel>,
        scalars: &f32,
        weight: &[f32],
        weight_out: &mut [f32],
        gradient: &[f32],
        [calls, tails]: [&mut [u8]; 2],
    ) {
        let (calls, tails): (&mut [f32], &mut [f32]) =
            (cast_slice_mut(calls), cast_slice_mut(tails));
        let lens = [weight.len(), weight_out.len(), calls.len(), tails.len()];
        assert_eq!(lens, [gradient.len(); 4], "one element of each a parameter");
        for index in 0..gradient.len() {
            weight_out[index] = weight[index] + scalars * gradient[index];
            calls[index] += 1.0;
            tails[index] += f32::from(u8::from(kernel.is_none()));
        }
    }
}

/// Spans with gaps between them, some empty, and what follows the last.
fn any_spans() -> impl Strategy<Value = (Vec<Span>, usize)> {
    let lens = vec((0_usize..40, prop_oneof![0_usize..40, 1000_usize..3000]), 0..5);
    (lens, 0_usize..40).prop_map(|(lens, rest)| {
        let mut end = 0;
        let mut spans = Vec::new();
        for (gap, len) in lens {
            let lr_scale = [1.0, 2.0][spans.len() % 2];
            spans.push(Span { start: end + gap, len, lr_scale, weight_decay: 0.0 });
            end += gap + len;
        }
        (spans, end + rest)
    })
}

proptest! {
    /// However the chunk is cut, an optimizer is called once for each parameter of a tensor and for no other, with
    /// that tensor's scalars, and learns which elements its vectors leave over.
    #[test]
    fn each_parameter_of_a_tensor_is_stepped_once(
        (spans, len) in any_spans(),
        in_place: bool,
        tile in (1_usize..300).prop_map(|eighths| 8 * eighths),
    ) {
        let old: Vec<f32> = (0_u16..).take(len).map(f32::from).collect();
        let gradient = vec![1e5; len];
        let mut out = if in_place { old.clone() } else { vec![f32::NAN; len] };
        let (mut calls, mut tails) = (vec![0_f32; len], vec![0_f32; len]);
        let update = ChunkUpdate::<Counting, 2>::new(&spans, len, |span| match span.lr_scale {
            1.0 => 1.0,
            _ => 2.0,
        });
        let planes = vec![cast_slice_mut(&mut calls), cast_slice_mut(&mut tails)];
        let weight: Option<&[u8]> = (!in_place).then(|| cast_slice(&old));
        let weight_out = cast_slice_mut(&mut out);
        let mut state = State::new(StateFormat::F32, weight, weight_out, &gradient, planes);
        prop_assert_eq!(state.parameters(), len);
        for mut run in state.cut(2 * tile) {
            run.cut(tile).for_each(|mut tile| update.tile(Kernel::Scalar, &mut tile));
        }
        let (mut expected, mut is_in, mut is_left) = (old, vec![0.0; len], vec![0.0; len]);
        for span in &spans {
            for index in span.start..span.end() {
                let scale = if span.lr_scale == 1.0 { 1e5 } else { 2e5 };
                expected[index] += scale;
                is_in[index] = 1.0;
                is_left[index] = if index >= span.start + span.len / 8 * 8 { 1.0 } else { 0.0 };
            }
        }
        prop_assert_eq!((out, calls, tails), (expected, is_in, is_left));
    }
}

#[test]
#[should_panic(expected = "the format of the state")]
fn an_update_is_for_one_format() {
    let update = ChunkUpdate::<Counting, 2>::new(&[], 1, |_| 1.0);
    let (mut weight, mut low, mut m, mut v) = ([0; 2], [0; 2], [0; 4], [0; 4]);
    let planes: Vec<&mut [u8]> = vec![&mut low, &mut m, &mut v];
    let mut state = State::new(StateFormat::Bf16, None, &mut weight, &[0.0], planes);
    update.tile(Kernel::Scalar, &mut state);
}
