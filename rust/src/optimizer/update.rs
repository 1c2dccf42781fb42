//! One step over a chunk, whatever the optimizer: where tensors begin and end, tiles, threads.
//!
//! To the rest of the crate an optimizer is an [`Update`], made for one chunk and one step by
//! [`Hyperparameters::over`](crate::optimizer::Hyperparameters::over). What its author writes is an
//! [`Optimizer`]: the step of consecutive parameters of one tensor, once for each format of weights. The loops
//! around that are here, compiled for each of them; only a whole tile is reached through a pointer.

use std::ops::Range;

use bytemuck::{Pod, Zeroable, cast_slice, cast_slice_mut};
use rayon::prelude::*;

use crate::optimizer::kernel::Kernel;
use crate::units::{Group, PlaneSpec, StateFormat};

/// Parameters that one task updates: few enough to keep all cores busy to the end of a chunk, so
/// many (0.7 MB) that handing a task out costs nothing beside it.
pub(crate) const TASK: usize = 32 << 10;
/// Parameters whose old weights are kept aside at once when they are updated in place: they stay in the
/// first-level cache.
const COPIED: usize = 1024;
/// Elements of PyTorch's vector: what of a tensor does not fill one is its tail.
const LANES: usize = 8;

/// Update planes of the format that has most.
pub(crate) const PLANES_MAX: usize = {
    let (mut most, mut index) = (0, 0);
    while index < StateFormat::ALL.len() {
        let planes = StateFormat::ALL[index].planes(Group::Update).len();
        most = if planes > most { planes } else { most };
        index += 1;
    }
    most
};

/// Consecutive parameters of one tensor that lie in one chunk, and what their update differs in.
///
/// A tensor may be cut into spans at multiples of 8 parameters from its start only (chunk borders
/// are): a span that is no multiple of 8 long is taken to end where its tensor ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// First parameter, counted from the start of the chunk.
    pub start: usize,
    /// Number of parameters.
    pub len: usize,
    /// Factor on the step's learning rate.
    pub lr_scale: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

impl Span {
    pub(crate) fn end(&self) -> usize {
        self.start + self.len
    }

    fn tail_start(&self) -> usize {
        self.end() - self.len % LANES
    }
}

/// The state of consecutive parameters of one chunk, in memory: one element of each plane a parameter.
///
/// Weights are read in one place and written in another, or replaced where they are, which saves memory traffic
/// and gives the same bits.
#[derive(Debug)]
pub struct State<'a> {
    format: StateFormat,
    /// First parameter, counted from the start of the chunk.
    start: usize,
    weight: Option<&'a [u8]>,
    weight_out: &'a mut [u8],
    gradient: &'a [f32],
    /// Empty where the format has fewer.
    planes: [&'a mut [u8]; PLANES_MAX],
}

impl<'a> State<'a> {
    /// That of a whole chunk. `planes` are those of the update, in the format's order; without `weight` what
    /// `weight_out` holds is replaced.
    ///
    /// # Panics
    /// If the format has other planes, or their lengths do not fit that of the gradient.
    #[must_use]
    pub fn new(
        format: StateFormat,
        weight: Option<&'a [u8]>,
        weight_out: &'a mut [u8],
        gradient: &'a [f32],
        planes: Vec<&'a mut [u8]>,
    ) -> Self {
        let old = weight.map_or(weight_out.len(), <[u8]>::len);
        let given = [old, weight_out.len()].into_iter().chain(planes.iter().map(|p| p.len()));
        let given: Vec<usize> = given.collect();
        let groups = [Group::Weight, Group::Weight, Group::Update];
        let specs = groups.into_iter().flat_map(|group| format.planes(group));
        let needed: Vec<usize> = specs.map(|plane| plane.bytes() * gradient.len()).collect();
        assert!(given == needed, "lengths differ: planes of {given:?} bytes, not {needed:?}");
        let mut planes = planes.into_iter();
        let planes = std::array::from_fn(|_| planes.next().unwrap_or_default());
        Self { format, start: 0, weight, weight_out, gradient, planes }
    }

    /// Number of parameters.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.gradient.len()
    }

    /// What an update writes: the weights, then the format's other planes.
    pub(crate) fn written(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(&*self.weight_out).chain(self.planes.iter().map(|plane| &**plane))
    }

    /// The same in parts of so many parameters, in order; the last may have fewer.
    pub(crate) fn cut(&mut self, parameters: usize) -> impl Iterator<Item = State<'_>> {
        let mut rest = State {
            format: self.format,
            start: self.start,
            weight: self.weight,
            weight_out: &mut *self.weight_out,
            gradient: self.gradient,
            planes: self.planes.each_mut().map(|plane| &mut **plane),
        };
        std::iter::from_fn(move || rest.split_off(parameters))
    }

    /// Splits so many parameters off at the front, or as many as there are; `None` when there are none.
    fn split_off(&mut self, parameters: usize) -> Option<Self> {
        let parameters = parameters.min(self.parameters());
        if parameters == 0 {
            return None;
        }
        let (start, specs) = (self.start, self.format.planes(Group::Update));
        self.start += parameters;
        let weights = parameters * self.format.weight_bytes();
        let mut widths = specs.iter().map(PlaneSpec::bytes);
        let planes = self.planes.each_mut().map(|plane| {
            let bytes = parameters * widths.next().unwrap_or_default();
            plane.split_off_mut(..bytes).unwrap_or_default()
        });
        Some(Self {
            format: self.format,
            start,
            weight: self.weight.as_mut().and_then(|weight| weight.split_off(..weights)),
            weight_out: self.weight_out.split_off_mut(..weights)?,
            gradient: self.gradient.split_off(..parameters)?,
            planes,
        })
    }
}

/// One step's update of one chunk.
pub trait Update: Send + Sync {
    /// The format of the state that it updates, whose row names the planes.
    fn format(&self) -> StateFormat;

    /// Updates a part of the chunk, on this thread. Outside every span new weights are the old ones, other
    /// planes stay, and the gradient is not looked at. The bits do not depend on where the chunk was cut.
    ///
    /// # Panics
    /// If the state has another format.
    fn tile(&self, kernel: Kernel, tile: &mut State<'_>);
}

/// Updates a whole chunk, on the current rayon pool. The result does not depend on the number of threads.
///
/// # Panics
/// If the state has another format than the update.
pub fn update(kernel: Kernel, update: &dyn Update, mut chunk: State<'_>) {
    let tiles: Vec<_> = chunk.cut(TASK).collect();
    tiles.into_par_iter().for_each(|mut tile| update.tile(kernel, &mut tile));
}

/// An optimizer over one format of weights, with so many planes of its own: what is written to add one.
pub(crate) trait Optimizer<const PLANES: usize> {
    /// The format of the state: its row has `PLANES` update planes.
    const FORMAT: StateFormat;
    /// An element of the weights.
    type Weight: Pod;
    /// What the step has worked out of its hyperparameters for tensors of the same settings.
    type Scalars: Send + Sync;

    /// One step of consecutive parameters of one tensor: reads `weight`, writes `weight_out`, changes `planes`,
    /// which are in the format's order. All are of the same number of parameters, of any alignment beyond that of
    /// an element.
    ///
    /// `kernel` says how they are gone through, and must change no bit. `None`: they are the last of their tensor,
    /// too few for one of PyTorch's vectors, and round as they do there.
    fn step(
        kernel: Option<Kernel>,
        scalars: &Self::Scalars,
        weight: &[Self::Weight],
        weight_out: &mut [Self::Weight],
        gradient: &[f32],
        planes: [&mut [u8]; PLANES],
    );
}

/// A step of an optimizer over the spans of one chunk.
pub(crate) struct ChunkUpdate<O: Optimizer<PLANES>, const PLANES: usize> {
    spans: Vec<(Span, O::Scalars)>,
}

impl<O: Optimizer<PLANES>, const PLANES: usize> ChunkUpdate<O, PLANES> {
    /// Bytes a parameter of each plane.
    const WIDTHS: [usize; PLANES] = {
        let specs = O::FORMAT.planes(Group::Update);
        assert!(specs.len() == PLANES, "as the format's row says");
        let (mut widths, mut plane) = ([0; PLANES], 0);
        while plane < PLANES {
            widths[plane] = specs[plane].bytes();
            plane += 1;
        }
        widths
    };

    /// # Panics
    /// If the spans overlap, are out of order, or end behind the chunk, which has so many parameters.
    pub(crate) fn new(
        spans: &[Span],
        parameters: usize,
        scalars: impl Fn(&Span) -> O::Scalars,
    ) -> Self {
        let mut free = 0;
        for span in spans {
            assert!(span.start >= free, "spans overlap or are out of order at {}", span.start);
            let room = parameters.checked_sub(span.start);
            assert!(room.is_some_and(|room| span.len <= room), "a span ends behind the chunk");
            free = span.end();
        }
        Self { spans: spans.iter().map(|span| (*span, scalars(span))).collect() }
    }
}

impl<O: Optimizer<PLANES>, const PLANES: usize> Update for ChunkUpdate<O, PLANES> {
    fn format(&self) -> StateFormat {
        O::FORMAT
    }

    fn tile(&self, kernel: Kernel, tile: &mut State<'_>) {
        assert_eq!(tile.format, O::FORMAT, "the format of the state");
        let weight: Option<&[O::Weight]> = tile.weight.map(cast_slice);
        let weight_out: &mut [O::Weight] = cast_slice_mut(tile.weight_out);
        let Some(planes) = tile.planes.first_chunk_mut::<PLANES>() else {
            unreachable!("no format has more planes than there is room for")
        };
        let mut old = [O::Weight::zeroed(); COPIED];
        for (range, part) in pieces(&self.spans, tile.start, weight_out.len(), weight.is_none()) {
            let out = &mut weight_out[range.clone()];
            let weight = match weight {
                Some(weight) => &weight[range.clone()],
                None => {
                    old[..out.len()].copy_from_slice(out);
                    &old[..out.len()]
                }
            };
            let (scalars, kernel) = match part {
                Part::Gap => {
                    out.copy_from_slice(weight);
                    continue;
                }
                Part::Body(scalars) => (scalars, Some(kernel)),
                Part::Tail(scalars) => (scalars, None),
            };
            let gradient = &tile.gradient[range.clone()];
            let mut widths = Self::WIDTHS.into_iter();
            let planes = planes.each_mut().map(|plane| {
                let width = widths.next().unwrap_or_default();
                &mut plane[range.start * width..range.end * width]
            });
            O::step(kernel, scalars, weight, out, gradient, planes);
        }
    }
}

/// What is to be done with a run of parameters.
enum Part<'a, Scalars> {
    /// They belong to no tensor.
    Gap,
    Body(&'a Scalars),
    /// The end of a tensor, behind PyTorch's last whole vector.
    Tail(&'a Scalars),
}

impl<Scalars> Clone for Part<'_, Scalars> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<Scalars> Copy for Part<'_, Scalars> {}

/// The parts of the `len` parameters from `start` on, as ranges that count from `start`. They
/// cover everything; some are empty.
fn parts<Scalars>(
    spans: &[(Span, Scalars)],
    start: usize,
    len: usize,
) -> impl Iterator<Item = (Range<usize>, Part<'_, Scalars>)> {
    let first = spans.partition_point(|(span, _)| span.end() <= start);
    let mut done = 0;
    spans
        .iter()
        .skip(first)
        .take_while(move |(span, _)| span.start < start + len)
        .flat_map(|(span, scalars)| {
            let (body, tail) = (Part::Body(scalars), Part::Tail(scalars));
            [(span.start, Part::Gap), (span.tail_start(), body), (span.end(), tail)]
        })
        .chain([(start + len, Part::Gap)])
        .map(move |(until, part)| {
            let from = done;
            done = until.saturating_sub(start).clamp(from, len);
            (from..done, part)
        })
}

/// As [`parts`], and no range longer than [`COPIED`] where the old weights are copied.
fn pieces<Scalars>(
    spans: &[(Span, Scalars)],
    start: usize,
    len: usize,
    is_in_place: bool,
) -> impl Iterator<Item = (Range<usize>, Part<'_, Scalars>)> {
    let longest = if is_in_place { COPIED } else { len.max(1) };
    parts(spans, start, len).flat_map(move |(range, part)| {
        let end = range.end;
        range.step_by(longest).map(move |from| (from..(from + longest).min(end), part))
    })
}

#[cfg(test)]
mod tests;
