//! Updating one chunk: which tensors lie in it, and AdamW over its planes.

use bytemuck::cast_slice;

use crate::adamw::{self, AdamW, Kernel, Span};
use crate::buffer::Slot;
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

/// Updates one chunk. `weights` and `gradient` are the chunk's part of its record's buffers;
/// `weight_out` and `planes` are the two halves of its chunk slot.
#[expect(clippy::too_many_arguments, reason = "one slice a plane")]
pub(super) fn update_chunk(
    kernel: Kernel,
    spans: &[Span],
    chunk: &Chunk,
    weights: &[u8],
    gradient: &[u8],
    weight_out: &mut Slot,
    planes: &mut Slot,
) {
    let ranges = chunk.plane_ranges(Group::Update);
    let content = chunk.parameters * chunk.format().weight_bytes();
    // What lies between the content and the next 4 KiB border is written too: no stale bytes there.
    weight_out[content..].fill(0);
    let end = ranges.last().map_or(0, |range| range.end);
    planes[end..].fill(0);
    let weight_out = &mut weight_out[..content];
    let weights = &weights[..content];
    let mut rest = &mut planes[..end];
    let mut next = |bytes: usize| {
        let (front, back) = std::mem::take(&mut rest).split_at_mut(bytes);
        rest = back;
        front
    };
    let gradient: &[f32] = cast_slice(gradient);
    match chunk.format() {
        StateFormat::Bf16 => {
            let remainder = bytemuck::cast_slice_mut(next(ranges[0].len()));
            let exp_avg = bytemuck::cast_slice_mut(next(ranges[1].len()));
            let exp_avg_sq = bytemuck::cast_slice_mut(next(ranges[2].len()));
            let weight_out = bytemuck::cast_slice_mut(weight_out);
            adamw::update_split(
                kernel,
                spans,
                cast_slice(weights),
                weight_out,
                remainder,
                gradient,
                exp_avg,
                exp_avg_sq,
            );
        }
        StateFormat::F32 => {
            let exp_avg = bytemuck::cast_slice_mut(next(ranges[0].len()));
            let exp_avg_sq = bytemuck::cast_slice_mut(next(ranges[1].len()));
            let weight_out = bytemuck::cast_slice_mut(weight_out);
            adamw::update_f32(
                kernel,
                spans,
                cast_slice(weights),
                weight_out,
                gradient,
                exp_avg,
                exp_avg_sq,
            );
        }
        StateFormat::Raw8 | StateFormat::Raw16 | StateFormat::Raw32 => {}
    }
}
