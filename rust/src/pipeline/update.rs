//! Updating one chunk: which tensors lie in it, the optimizer over its planes, checksums of what it wrote.

use std::ops::Range;

use bytemuck::cast_slice;
use rayon::current_num_threads;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::memory::slot::Slot;
use crate::optimizer::kernel::Kernel;
use crate::optimizer::update::{PLANES_MAX, Span, State, Update};
use crate::store::checksum::{self, Binding, Running, UNIT_BYTES};
use crate::store::layout::{Chunk, Layout, Manifest};
use crate::units::{Group, PlaneSpec, to_usize};

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

    /// Where the tensors of a record, or their parts in one of its chunks, lie in the buffer of that.
    /// `layout` has whole records.
    pub(super) fn tensors(&self, layout: &Layout, chunks: Range<usize>) -> Vec<Range<usize>> {
        let chunks = &layout.chunks()[chunks];
        let Some((first, last)) = chunks.first().zip(chunks.last()) else { return vec![] };
        let (start, end) = (first.start, last.start + last.parameters as u64);
        let place = |t: &TensorSettings| {
            let place = t.offset.max(start)..(t.offset + t.elements).min(end);
            (!place.is_empty()).then(|| to_usize(place.start - start)..to_usize(place.end - start))
        };
        self.by_record[first.record].iter().filter_map(place).collect()
    }

    /// Where the tensors lie in one chunk; padding between them is in no span. The chunk is one of the layout
    /// of whole records.
    pub(super) fn spans(&self, chunk: &Chunk) -> Vec<Span> {
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
                    lr_scale: t.lr_scale,
                    weight_decay: t.weight_decay,
                }
            })
            .collect()
    }
}

/// Parameters of a tile, which takes the way through update and checksums at once: what it touches fits the
/// second-level cache of a core.
const TILE: usize = 16 << 10;

/// Parameters of a task where no checksums are made on the way.
const TASK: usize = 2 * TILE;

/// The chunk's part of its record's weights, and where the new ones go.
pub(super) enum Weights<'a> {
    /// Read here, written there.
    Apart(&'a [u8], &'a mut Slot),
    /// Replaced.
    InPlace(&'a mut Slot),
}

/// Updates one chunk and returns the checksums of those of its two groups that have a binding, or nothing
/// for a group. `gradient` is the chunk's part of its record's buffer, `planes` the update group.
#[expect(clippy::too_many_arguments, reason = "one for each part of a chunk")]
pub(super) fn update_chunk(
    kernel: Kernel,
    update: &dyn Update,
    chunk: &Chunk,
    weights: Weights<'_>,
    gradient: &[u8],
    planes: &mut Slot,
    bindings: [Option<&Binding>; 2],
) -> [Vec<u32>; 2] {
    let format = chunk.format();
    let ranges = chunk.plane_ranges(Group::Update);
    let content = chunk.parameters * format.weight_bytes();
    let (old, out) = match weights {
        Weights::Apart(old, out) => (Some(&old[..content]), out),
        Weights::InPlace(out) => (None, out),
    };
    // What lies between the content and the next 4 KiB border is written too: no stale bytes there.
    out[content..].fill(0);
    let end = ranges.last().map_or(0, |range| range.end);
    planes[end..].fill(0);
    let mut rest = &mut planes[..end];
    let cut = ranges.iter().filter_map(|range| rest.split_off_mut(..range.len())).collect();
    let mut state = State::new(format, old, &mut out[..content], cast_slice(gradient), cut);
    // Where each plane is made of whole checksum units, they are made while the bytes are in the cache;
    // not where that would leave a core without work.
    let widths: Vec<usize> =
        Group::ALL.iter().flat_map(|group| format.planes(*group)).map(PlaneSpec::bytes).collect();
    let unit = UNIT_BYTES / widths.iter().min().copied().unwrap_or(1);
    let in_one_pass = bindings.iter().any(Option::is_some)
        && chunk.parameters.is_multiple_of(unit)
        && chunk.parameters / unit >= current_num_threads();
    let (run, on_the_way) = if in_one_pass { (unit, bindings) } else { (TASK, [None; 2]) };
    // The sum of a plane's part in a run, which begins at a whole unit.
    let starts = std::iter::once(0).chain(ranges.iter().map(|range| range.start));
    let places: Vec<(usize, usize)> = starts.zip(widths).collect();
    let sum = |plane: usize, index: usize| {
        let &(start, width) = places.get(plane)?;
        let unit = (start + index * run * width) / UNIT_BYTES;
        on_the_way[usize::from(plane > 0)].map(|binding| Running::new(binding, unit))
    };
    let runs: Vec<_> = state.cut(run).collect();
    let sums: Vec<_> = runs
        .into_par_iter()
        .enumerate()
        .map(|(index, mut run)| {
            let mut sums: [_; 1 + PLANES_MAX] = std::array::from_fn(|plane| sum(plane, index));
            for mut tile in run.cut(TILE) {
                update.tile(kernel, &mut tile);
                for (sum, bytes) in sums.iter_mut().zip(tile.written()) {
                    if let Some(sum) = sum {
                        sum.update(bytes);
                    }
                }
            }
            sums.map(|sum| sum.map_or(vec![], Running::finish))
        })
        .collect();
    if in_one_pass {
        return by_group(&sums);
    }
    let separately =
        |group: usize, bytes: &[u8]| bindings[group].map_or(vec![], |b| checksum::sums(b, bytes));
    [separately(0, out), separately(1, planes)]
}

/// Sums of runs, each by plane, as sums of the two groups: the weights, and all other planes.
fn by_group<const N: usize>(runs: &[[Vec<u32>; N]]) -> [Vec<u32>; 2] {
    let plane = |plane: usize| runs.iter().flat_map(move |sums| sums[plane].iter().copied());
    [plane(0).collect(), (1..N).flat_map(plane).collect()]
}

#[cfg(test)]
mod tests;
