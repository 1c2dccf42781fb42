//! Updating one chunk: which tensors lie in it, AdamW over its planes, checksums of what it wrote.

use bytemuck::{cast_slice, cast_slice_mut};
use rayon::current_num_threads;
use rayon::prelude::*;

use crate::adamw::{self, AdamW, Kernel, Span};
use crate::buffer::Slot;
use crate::checksum::{self, Binding, Running, UNIT_BYTES};
use crate::error::{Error, Result};
use crate::layout::{Chunk, Layout, Manifest};
use crate::units::{Group, StateFormat, to_usize};

/// What one tensor's update differs in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorSettings {
    /// Index of its record.
    pub record: usize,
    /// First parameter, counted from the record's start.
    pub offset: u64,
    /// Number of elements.
    pub elements: u64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Factor on the step's learning rate.
    pub lr_scale: f64,
}

/// The settings of all tensors, found by chunk.
#[derive(Debug)]
pub(super) struct Settings {
    by_record: Vec<Vec<TensorSettings>>,
}

impl Settings {
    /// Checks that the settings name exactly the tensors of the manifest's trained records.
    pub(super) fn new(
        manifest: &Manifest,
        layout: &Layout,
        tensors: &[TensorSettings],
    ) -> Result<Self> {
        let mut by_record = vec![Vec::new(); layout.records().len()];
        let mut given = tensors.iter();
        for tensor in &manifest.tensors {
            if !manifest.records[tensor.record].format.is_trainable() || tensors.is_empty() {
                continue;
            }
            let settings = given.next().filter(|settings| {
                settings.record == tensor.record
                    && settings.offset == tensor.offset
                    && Some(settings.elements) == tensor.elements()
            });
            let Some(settings) = settings else {
                return Err(Error::invalid(format!(
                    "no settings for tensor {} in its place",
                    tensor.name
                )));
            };
            by_record[tensor.record].push(*settings);
        }
        match given.next() {
            Some(left) => Err(Error::invalid(format!(
                "settings for a tensor that the store does not have: {left:?}"
            ))),
            None => Ok(Self { by_record }),
        }
    }

    /// The runs of one chunk that share scalars; padding between tensors is in none.
    pub(super) fn spans(&self, adamw: &AdamW, chunk: &Chunk) -> Vec<Span> {
        let end = chunk.start + chunk.parameters as u64;
        self.by_record[chunk.record]
            .iter()
            .filter(|t| t.offset < end && t.offset + t.elements > chunk.start)
            .map(|t| {
                let start = t.offset.max(chunk.start);
                let stop = (t.offset + t.elements).min(end);
                Span {
                    start: to_usize(start - chunk.start),
                    len: to_usize(stop - start),
                    scalars: adamw.scalars(t.lr_scale, t.weight_decay),
                }
            })
            .collect()
    }
}

/// Parameters of which a piece takes the way through update and checksums: what it touches fits the
/// second-level cache of a core.
const PIECE: usize = 16 << 10;

/// Updates one chunk and returns the checksums of both its groups. `weights` and `gradient` are the
/// chunk's part of its record's buffers; `weight_out` and `planes` are the two halves of its chunk slot.
#[expect(clippy::too_many_arguments, reason = "one slice a plane")]
pub(super) fn update_chunk(
    kernel: Kernel,
    spans: &[Span],
    chunk: &Chunk,
    weights: &[u8],
    gradient: &[u8],
    weight_out: &mut Slot,
    planes: &mut Slot,
    bindings: [&Binding; 2],
) -> [Vec<u32>; 2] {
    let ranges = chunk.plane_ranges(Group::Update);
    let content = chunk.parameters * chunk.format().weight_bytes();
    // What lies between the content and the next 4 KiB border is written too: no stale bytes there.
    weight_out[content..].fill(0);
    let end = ranges.last().map_or(0, |range| range.end);
    planes[end..].fill(0);
    let weights = &weights[..content];
    let gradient: &[f32] = cast_slice(gradient);
    // Where each plane is made of whole checksum units, they are made while the bytes are in the cache;
    // not where that would leave a core without work.
    let run = UNIT_BYTES / if chunk.format() == StateFormat::Bf16 { 2 } else { 4 };
    let in_one_pass =
        chunk.parameters.is_multiple_of(run) && chunk.parameters / run >= current_num_threads();
    let (out, planes_out) = (&mut weight_out[..content], &mut planes[..end]);
    let units = |plane: usize| ranges[plane].start / UNIT_BYTES;
    let sums = match chunk.format() {
        StateFormat::Bf16 => {
            let (low, moments) = planes_out.split_at_mut(ranges[0].len());
            let (m, v) = moments.split_at_mut(ranges[1].len());
            let low: &mut [i16] = cast_slice_mut(low);
            let (m, v): (&mut [f32], &mut [f32]) = (cast_slice_mut(m), cast_slice_mut(v));
            let (w, out): (&[u16], &mut [u16]) = (cast_slice(weights), cast_slice_mut(out));
            if in_one_pass {
                adamw::check(
                    w.len(),
                    spans,
                    [out.len(), low.len(), gradient.len(), m.len(), v.len()],
                );
                let runs = (
                    w.par_chunks(run),
                    out.par_chunks_mut(run),
                    low.par_chunks_mut(run),
                    gradient.par_chunks(run),
                    m.par_chunks_mut(run),
                    v.par_chunks_mut(run),
                );
                let sums: Vec<_> = runs
                    .into_par_iter()
                    .enumerate()
                    .map(|(index, (w, out, low, g, m, v))| {
                        let mut sums = [
                            Running::new(bindings[0], index),
                            Running::new(bindings[1], units(0) + index),
                            Running::new(bindings[1], units(1) + 2 * index),
                            Running::new(bindings[1], units(2) + 2 * index),
                        ];
                        for start in (0..run).step_by(PIECE) {
                            let p = start..start + PIECE;
                            let (w, out) = (&w[p.clone()], &mut out[p.clone()]);
                            let (low, g) = (&mut low[p.clone()], &g[p.clone()]);
                            let (m, v) = (&mut m[p.clone()], &mut v[p]);
                            let at = index * run + start;
                            adamw::tile_split(kernel, spans, at, Some(w), out, low, g, m, v);
                            sums[0].update(cast_slice(out));
                            sums[1].update(cast_slice(low));
                            sums[2].update(cast_slice(m));
                            sums[3].update(cast_slice(v));
                        }
                        sums.map(Running::finish)
                    })
                    .collect();
                Some(by_group(&sums))
            } else {
                adamw::update_split(kernel, spans, Some(w), out, low, gradient, m, v);
                None
            }
        }
        StateFormat::F32 => {
            let (m, v) = planes_out.split_at_mut(ranges[0].len());
            let (m, v): (&mut [f32], &mut [f32]) = (cast_slice_mut(m), cast_slice_mut(v));
            let (w, out): (&[f32], &mut [f32]) = (cast_slice(weights), cast_slice_mut(out));
            if in_one_pass {
                adamw::check(w.len(), spans, [out.len(), gradient.len(), m.len(), v.len()]);
                let runs = (
                    w.par_chunks(run),
                    out.par_chunks_mut(run),
                    gradient.par_chunks(run),
                    m.par_chunks_mut(run),
                    v.par_chunks_mut(run),
                );
                let sums: Vec<_> = runs
                    .into_par_iter()
                    .enumerate()
                    .map(|(index, (w, out, g, m, v))| {
                        let mut sums = [
                            Running::new(bindings[0], index),
                            Running::new(bindings[1], units(0) + index),
                            Running::new(bindings[1], units(1) + index),
                        ];
                        for start in (0..run).step_by(PIECE) {
                            let p = start..start + PIECE;
                            let (w, out, g) = (&w[p.clone()], &mut out[p.clone()], &g[p.clone()]);
                            let (m, v) = (&mut m[p.clone()], &mut v[p]);
                            let at = index * run + start;
                            adamw::tile_f32(kernel, spans, at, Some(w), out, g, m, v);
                            sums[0].update(cast_slice(out));
                            sums[1].update(cast_slice(m));
                            sums[2].update(cast_slice(v));
                        }
                        sums.map(Running::finish)
                    })
                    .collect();
                Some(by_group(&sums))
            } else {
                adamw::update_f32(kernel, spans, Some(w), out, gradient, m, v);
                None
            }
        }
        StateFormat::Raw8 | StateFormat::Raw16 | StateFormat::Raw32 => None,
    };
    let separately =
        || [checksum::sums(bindings[0], weight_out), checksum::sums(bindings[1], planes)];
    sums.unwrap_or_else(separately)
}

/// Sums of runs, each by plane, as sums of the two groups: the weights, and all other planes.
fn by_group<const N: usize>(runs: &[[Vec<u32>; N]]) -> [Vec<u32>; 2] {
    let plane = |plane: usize| runs.iter().flat_map(move |sums| sums[plane].iter().copied());
    [plane(0).collect(), (1..N).flat_map(plane).collect()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adamw::Scalars;
    use crate::layout::tests::manifest;
    use crate::ledger::Ledger;

    fn scalars(weight_decay: f64) -> Scalars {
        let adamw = AdamW { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, step: 3 };
        adamw.scalars(1.0, weight_decay)
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
            let sums = one.install(|| {
                let (out, planes) = (&mut out, &mut planes);
                let (kernel, bindings) = (Kernel::detect(), [&bindings[0], &bindings[1]]);
                update_chunk(kernel, &spans, &chunk, &weights, &gradient, out, planes, bindings)
            });
            let (mut expected_out, mut expected) = (slot(bytes[0], 3), slot(bytes[1], 4));
            plain(
                format,
                parameters,
                &spans,
                &weights,
                &gradient,
                &mut expected_out,
                &mut expected,
            );
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
}
