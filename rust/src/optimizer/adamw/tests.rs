use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use bytemuck::cast_slice;

use super::*;
use crate::optimizer::hyperparameters::Hyperparameters;
use crate::optimizer::split::*;
use crate::optimizer::update::TASK;

pub(crate) const ADAMW: AdamW =
    AdamW { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, step: 3 };

/// [`split`], element by element.
fn split_slice(master: &[f32], weight: &mut [u16], remainder: &mut [i16]) {
    assert_eq!(master.len(), weight.len(), "weight");
    assert_eq!(master.len(), remainder.len(), "remainder");
    for ((master, weight), remainder) in master.iter().zip(weight).zip(remainder) {
        (*weight, *remainder) = split(*master);
    }
}

/// [`join`], element by element.
fn join_slice(weight: &[u16], remainder: &[i16], master: &mut [f32]) {
    assert_eq!(master.len(), weight.len(), "weight");
    assert_eq!(master.len(), remainder.len(), "remainder");
    for ((master, weight), remainder) in master.iter_mut().zip(weight).zip(remainder) {
        *master = join(*weight, *remainder);
    }
}

fn span(start: usize, len: usize, weight_decay: f64) -> Span {
    Span { start, len, lr_scale: 1.0, weight_decay }
}

/// One step of a chunk of either format, its weights in place or not.
fn update_in<W: bytemuck::Pod>(
    format: StateFormat,
    (kernel, adamw, spans): (Kernel, AdamW, &[Span]),
    weight: Option<&[W]>,
    weight_out: &mut [W],
    gradient: &[f32],
    planes: Vec<&mut [u8]>,
) {
    let hyperparameters = Hyperparameters::AdamW(adamw);
    let update = hyperparameters.over(format, gradient.len(), 1.0, spans).expect("trained");
    let (weight, out) = (weight.map(cast_slice), cast_slice_mut(weight_out));
    update::update(kernel, &*update, State::new(format, weight, out, gradient, planes));
}

/// One chunk in both formats: f32 weights, and the same split.
#[derive(Clone, Debug)]
struct Chunk {
    weight: Vec<f32>,
    halves: (Vec<u16>, Vec<i16>),
    gradient: Vec<f32>,
    moments: [(Vec<f32>, Vec<f32>); 2],
}

impl Chunk {
    fn new(weight: Vec<f32>, gradient: Vec<f32>, exp_avg: Vec<f32>, exp_avg_sq: Vec<f32>) -> Self {
        let mut halves = (vec![0; weight.len()], vec![0; weight.len()]);
        split_slice(&weight, &mut halves.0, &mut halves.1);
        let moments = [(exp_avg.clone(), exp_avg_sq.clone()), (exp_avg, exp_avg_sq)];
        Self { weight, halves, gradient, moments }
    }

    /// Something different in every element, from a multiplicative hash.
    fn hashed(len: u32) -> Self {
        let plane = |salt: u32, scale: f32| {
            let hash = move |i: u32| (i * 8 + salt).wrapping_mul(2_654_435_769) >> 9;
            let unit = move |i| f32::from_bits(0x3F80_0000 | hash(i)) - 1.5;
            (0..len).map(|i| unit(i) * scale).collect::<Vec<_>>()
        };
        let exp_avg_sq = plane(4, 1e-6).iter().map(|v| v.abs()).collect();
        Self::new(plane(1, 0.1), plane(2, 1e-2), plane(3, 1e-3), exp_avg_sq)
    }

    fn update(&mut self, kernel: Kernel, adamw: AdamW, spans: &[Span]) {
        let [(m, v), (split_m, split_v)] = &mut self.moments;
        let (with, g) = ((kernel, adamw, spans), &self.gradient);
        let (mut own, mut own_m, mut own_v) = (self.weight.clone(), m.clone(), v.clone());
        let planes = vec![cast_slice_mut(&mut own_m), cast_slice_mut(&mut own_v)];
        update_in(StateFormat::F32, with, None, &mut own, g, planes);
        let mut weight_out = vec![f32::NAN; self.weight.len()];
        let planes = vec![cast_slice_mut(m), cast_slice_mut(v)];
        update_in(StateFormat::F32, with, Some(&self.weight), &mut weight_out, g, planes);
        self.weight = weight_out;
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let in_place = [&own, &own_m, &own_v].map(|values| bits(values));
        assert!(in_place == [&self.weight, m, v].map(|values| bits(values)), "in place");

        let (weight, low) = &mut self.halves;
        let mut weight_out = vec![0xFFFF; weight.len()];
        let (mut own, mut own_low) = (weight.clone(), low.clone());
        let (mut own_m, mut own_v) = (split_m.clone(), split_v.clone());
        let moments = (cast_slice_mut(&mut own_m), cast_slice_mut(&mut own_v));
        let planes = vec![cast_slice_mut(&mut own_low), moments.0, moments.1];
        update_in(StateFormat::Bf16, with, None, &mut own, g, planes);
        let planes = vec![cast_slice_mut(low), cast_slice_mut(split_m), cast_slice_mut(split_v)];
        update_in(StateFormat::Bf16, with, Some(weight), &mut weight_out, g, planes);
        *weight = weight_out;
        assert!(own == *weight && own_low == *low, "in place");
        assert!(bits(&own_m) == bits(split_m) && bits(&own_v) == bits(split_v), "in place");
    }

    /// The specification, one element after the other.
    fn update_plainly(&mut self, adamw: AdamW, spans: &[Span]) {
        for span in spans {
            let (Span { start, len, .. }, scalars) = (*span, adamw.scalars(1.0, span));
            for i in start..start + len {
                let (p, g) = (self.weight[i], self.gradient[i]);
                let (m, v) = (self.moments[0].0[i], self.moments[0].1[i]);
                let tail = i >= start + len / 8 * 8;
                let step = if tail { Scalars::step::<true> } else { Scalars::step::<false> };
                let (p, m, v) = step(&scalars, p, g, m, v);
                (self.weight[i], self.moments[0].0[i], self.moments[0].1[i]) = (p, m, v);
            }
        }
        *self = Self::new(
            self.weight.clone(),
            self.gradient.clone(),
            self.moments[0].0.clone(),
            self.moments[0].1.clone(),
        );
    }

    /// Bits of everything but the gradient, with one NaN for all.
    fn bits(&self) -> Vec<u32> {
        let mut master = vec![0.0; self.weight.len()];
        join_slice(&self.halves.0, &self.halves.1, &mut master);
        let moments = self.moments.iter().flat_map(|(m, v)| [m, v]);
        let planes = moments.chain([&self.weight, &master]).flatten();
        planes.map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
    }
}

/// Every kind of f32, NaN, infinities, zeros and denormals included.
fn any_f32() -> impl Strategy<Value = f32> {
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, 1e-45];
    let bits = any::<u32>().prop_map(f32::from_bits);
    prop_oneof![-2.0_f32..2.0, bits, select(special.to_vec())]
}

prop_compose! {
    fn any_chunk()(planes in vec((any_f32(), any_f32(), any_f32(), any_f32()), 0..70)) -> Chunk {
        let plane = |pick: fn(&(f32, f32, f32, f32)) -> f32| planes.iter().map(pick).collect();
        Chunk::new(plane(|x| x.0), plane(|x| x.1), plane(|x| x.2), plane(|x| x.3))
    }
}

prop_compose! {
    fn any_adamw()(
        learning_rate in 0.0..1.0,
        beta1 in prop_oneof![Just(0.0), Just(0.5), 0.0..1.0],
        beta2 in 0.0..1.0,
        eps in prop_oneof![Just(0.0), 0.0..1e-3],
        step in prop_oneof![1_u64..100, any::<u64>()],
    ) -> AdamW {
        AdamW { learning_rate, beta1, beta2, eps, step }
    }
}

proptest! {
    #[test]
    fn kernels_agree_with_the_specification(
        chunk in any_chunk(),
        adamw in any_adamw(),
        weight_decay in prop_oneof![Just(0.0), 0.0..1.0],
        cuts: [Index; 2],
    ) {
        let mut cuts = cuts.map(|cut| cut.index(chunk.weight.len() + 1));
        cuts.sort_unstable();
        let [start, end] = cuts;
        let spans = [span(start, end - start, weight_decay)];
        let mut expected = chunk.clone();
        expected.update_plainly(adamw, &spans);
        for kernel in Kernel::available() {
            let mut found = chunk.clone();
            found.update(kernel, adamw, &spans);
            prop_assert_eq!(found.bits(), expected.bits(), "{}", kernel);
        }
    }

    #[test]
    fn split_loses_nothing(bits: u32) {
        let (weight, remainder) = split(f32::from_bits(bits));
        prop_assert_eq!(join(weight, remainder).to_bits(), bits);
    }
}

#[test]
fn split_at_the_edges() {
    let edges = [0, 0x7FFF, 0x8000, 0x8001, 0xFFFF];
    for upper in [0, 1, 0x7F, 0x80, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0xFF7F, 0xFF80, 0xFFFF] {
        for bits in edges.map(|lower| (upper << 16) | lower) {
            let (weight, remainder) = split(f32::from_bits(bits));
            assert_eq!(join(weight, remainder).to_bits(), bits);
        }
    }
    assert_eq!(split(1.0), (0x3F80, 0));
    assert_eq!(split(f32::from_bits(0x3F80_7FFF)), (0x3F80, 0x7FFF));
    assert_eq!(split(f32::from_bits(0x3F80_8000)), (0x3F81, -0x8000), "ties go away from zero");
    assert_eq!(split(f32::from_bits(0xBF80_8000)), (0xBF81, -0x8000), "ties go away from zero");
    assert_eq!(split(f32::MAX), (0x7F80, -1));
}

/// Weight, `exp_avg` and `exp_avg_sq` after three steps of `torch.optim.AdamW(fused=True)`,
/// PyTorch 2.13 on x86-64, from the data in [`equals_pytorch`]. The last three of the eleven
/// elements are the tensor's tail.
#[rustfmt::skip]
const PYTORCH: [(AdamW, f64, [[u32; 11]; 3]); 2] = [
    (
        AdamW { step: 0, ..ADAMW },
        0.01,
        [
            [
                0xBF03_A58E, 0x3E74_D2D1, 0xBD92_FCD8, 0xBEC2_7D43, 0x3EC1_A8DB, 0x3D87_1599,
                0xBE77_49AB, 0x3F04_5A6D, 0x3E51_1F42, 0xBDCF_4DCB, 0xBED2_515B,
            ],
            [
                0xBE90_99B5, 0x3E3F_210C, 0x3E34_6495, 0xBD95_0A1E, 0xBDAA_8307, 0x3E2F_50AC,
                0xBD9F_31EF, 0xBDB4_AAD9, 0x3E2A_3CC3, 0xBDA9_59C1, 0xBDBE_D2AB,
            ],
            [
                0x3B5B_7F35, 0x3B2F_0F84, 0x3AE6_CE12, 0x3B19_46F7, 0x3B0E_0BC1, 0x3A9B_CF3E,
                0x3AC5_7F05, 0x3A52_691C, 0x3AC8_AA74, 0x3AD0_4A29, 0x39B8_AE88,
            ],
        ],
    ),
    (
        AdamW { learning_rate: 2e-3, beta1: 0.3, beta2: 0.95, eps: 1e-6, step: 0 },
        0.0,
        [
            [
                0xBF02_F00A, 0x3E73_208E, 0xBD96_FAC2, 0xBEC1_FA42, 0x3EC2_41AB, 0x3D80_B973,
                0xBE76_91FE, 0x3F04_D6FD, 0x3E4C_FC04, 0xBDCB_2C8C, 0xBED0_A9CC,
            ],
            [
                0xBF70_1294, 0x3F3C_28F6, 0x3EC5_BF85, 0xBF04_D921, 0xBF5E_2254, 0x3F23_5E1A,
                0xBE88_B593, 0xBF1D_A3FD, 0x3F63_DC71, 0xBC77_1C89, 0xBEBA_4B4A,
            ],
            [
                0x3E21_D5CA, 0x3E00_8F4B, 0x3DA5_DECF, 0x3DE0_C881, 0x3DD7_F91E, 0x3D68_BAE3,
                0x3D91_F105, 0x3D22_728C, 0x3D9B_0F76, 0x3D9B_4CEF, 0x3C8A_B343,
            ],
        ],
    ),
];

#[test]
fn equals_pytorch() {
    let weight = (0..11_i16).map(|i| f32::from(i * 53 % 31 - 15) / 29.0).collect();
    let gradient = |t: u16| {
        let steps = (0..11).map(move |i| (i * (37 + t) * 101 + t * 13) % 257);
        steps.map(|x| (f32::from(x) - 128.0) / 97.0).collect()
    };
    let fresh = Chunk::new(weight, gradient(1), vec![0.0; 11], vec![0.0; 11]);
    for (adamw, weight_decay, [weight, exp_avg, exp_avg_sq]) in PYTORCH {
        for kernel in Kernel::available() {
            let mut chunk = fresh.clone();
            for t in 1..=3 {
                chunk.gradient = gradient(t);
                let adamw = AdamW { step: t.into(), ..adamw };
                chunk.update(kernel, adamw, &[span(0, 11, weight_decay)]);
            }
            let moments = [exp_avg, exp_avg_sq];
            let expected = [moments, moments, [weight; 2]].concat().concat();
            assert_eq!(chunk.bits(), expected, "{kernel}, {adamw:?}");
        }
    }
}

#[test]
fn gaps_stay_and_their_gradient_is_not_looked_at() {
    let spans = [(3, 10), (13, 0), (13, 16), (40, 24)];
    let spans = spans.map(|(start, len)| span(start, len, 0.1));
    let mut before = Chunk::hashed(70);
    let outside: Vec<usize> =
        (0..70).filter(|i| spans.iter().all(|s| !(s.start..s.end()).contains(i))).collect();
    assert_eq!(outside.len(), 20);
    for i in &outside {
        before.gradient[*i] = f32::NAN;
    }
    for kernel in Kernel::available() {
        let mut after = before.clone();
        after.update(kernel, ADAMW, &spans);
        for (plane, (after, before)) in
            after.bits().chunks(70).zip(before.bits().chunks(70)).enumerate()
        {
            for i in 0..70 {
                let same = after[i] == before[i];
                assert_eq!(same, outside.contains(&i), "{kernel}, plane {plane}, element {i}");
            }
        }
    }
}

#[test]
fn result_depends_neither_on_tiles_nor_on_threads() {
    let len = 2 * TASK + 1000;
    let spans = [
        span(5, TASK - 7, 0.1),
        Span { lr_scale: 0.5, ..span(TASK - 1, TASK + 3, 0.0) },
        span(2 * TASK + 2, 901, 0.1),
    ];
    let chunk = Chunk::hashed(u32::try_from(len).unwrap());
    let mut expected = chunk.clone();
    expected.update_plainly(ADAMW, &spans);
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for kernel in Kernel::available() {
            let mut found = chunk.clone();
            pool.install(|| found.update(kernel, ADAMW, &spans));
            assert!(found.bits() == expected.bits(), "{kernel}, {threads} threads");
        }
    }
}

#[test]
fn scalars_at_the_edges() {
    let scalars = |adamw: AdamW, weight_decay| adamw.scalars(1.0, &span(0, 1, weight_decay));
    assert_eq!(scalars(ADAMW, 0.0).decay.to_bits(), 1.0_f32.to_bits());
    let large = AdamW { learning_rate: 0.972_694_307_565_689_1, ..ADAMW };
    let rounded_once = scalars(large, 1.3);
    assert_eq!(rounded_once.decay.to_bits(), 0xBE87_6CE3);
    let halved = AdamW { learning_rate: 5e-4, ..ADAMW };
    let half = Span { lr_scale: 0.5, ..span(0, 1, 0.1) };
    assert_eq!(ADAMW.scalars(1.0, &half), scalars(halved, 0.1));
    let last = AdamW { step: 1 << 24, beta1: 1.0 - 1e-7, ..ADAMW };
    let later = AdamW { step: u64::MAX, ..last };
    assert_eq!(scalars(last, 0.1), scalars(later, 0.1));
    let before = AdamW { step: 1 << 23, ..last };
    assert_ne!(scalars(last, 0.1), scalars(before, 0.1));
}

#[test]
fn a_weight_that_becomes_nan_shows_in_its_upper_half() {
    let spans = [span(0, 9, 0.1)];
    for kernel in Kernel::available() {
        let mut chunk = Chunk::hashed(9);
        chunk.gradient.fill(f32::from_bits(0x7FFF_FFFF));
        chunk.update(kernel, ADAMW, &spans);
        assert_eq!(chunk.halves, (vec![0x7FC0; 9], vec![0; 9]));
    }
}

#[test]
fn kernels_have_names() {
    assert_eq!(Kernel::Scalar.to_string(), "scalar");
    assert!(Kernel::available().contains(&Kernel::detect()));
}

#[test]
#[should_panic(expected = "lengths differ")]
fn lengths_must_agree() {
    let (mut weight, mut m, mut v) = ([0.0; 8], [0.0; 8], [0.0; 7]);
    let planes: [&mut [f32]; 3] = [&mut weight, &mut m, &mut v];
    ADAMW.update_tensor(Kernel::Scalar, 1.0, 0.0, &[0.0; 8], planes);
}

#[test]
#[should_panic(expected = "overlap")]
fn spans_must_not_overlap() {
    Chunk::hashed(32).update(Kernel::Scalar, ADAMW, &[span(0, 9, 0.0), span(8, 8, 0.0)]);
}

#[test]
#[should_panic(expected = "behind the chunk")]
fn spans_must_lie_in_the_chunk() {
    Chunk::hashed(32).update(Kernel::Scalar, ADAMW, &[span(8, usize::MAX, 0.0)]);
}
