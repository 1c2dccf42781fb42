//! What runs on the CPU, over memory of the kind that training uses: huge pages, all cores.

use std::fmt;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::measure::{Clocks, Figure};
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::optimizer::adamw::{AdamW, Kernel, Span, update_f32, update_split};
use crate::store::checksum::{self, Binding};
use crate::units::Group;

/// Bytes that an AdamW step reads and writes for each parameter, in either format.
const READ_PER_PARAMETER: u64 = 16;
const WRITTEN_PER_PARAMETER: u64 = 12;

/// Something to run again and again, with its memory.
pub struct Workload {
    read: u64,
    written: u64,
    work: Box<dyn FnMut() + Send>,
}

impl fmt::Debug for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workload")
            .field("read", &self.read)
            .field("written", &self.written)
            .finish()
    }
}

impl Workload {
    /// Runs it once.
    pub fn run(&mut self) -> Figure {
        let clocks = Clocks::start();
        (self.work)();
        clocks.figure(self.read, self.written)
    }

    /// Copies `bytes`: the ceiling of what waits for memory.
    ///
    /// # Errors
    /// `Io` when memory is refused.
    pub fn memory_copy(bytes: usize) -> Result<Self> {
        let (from, mut to) = (filled(bytes)?, filled(bytes)?);
        // One run of bytes for each core: that is how copies of this size are fastest.
        let part = bytes.div_ceil(rayon::current_num_threads()).next_multiple_of(4096);
        let work = move || {
            to[..bytes]
                .par_chunks_mut(part)
                .zip(from[..bytes].par_chunks(part))
                .for_each(|(to, from)| to.copy_from_slice(from));
        };
        Ok(Self { read: bytes as u64, written: bytes as u64, work: Box::new(work) })
    }

    /// Changes `bytes` where they are: the ceiling of what writes to the memory that it reads, as AdamW
    /// does with its moments. A copy first reads what it overwrites, which nobody counts.
    ///
    /// # Errors
    /// `Io` when memory is refused.
    pub fn memory_update(bytes: usize) -> Result<Self> {
        let mut data = filled(bytes)?;
        let part = bytes.div_ceil(rayon::current_num_threads()).next_multiple_of(4096);
        let work = move || {
            data[..bytes].par_chunks_mut(part).for_each(|part| {
                let values: &mut [u32] = bytemuck::cast_slice_mut(part);
                values.iter_mut().for_each(|value| *value = value.wrapping_add(1));
            });
        };
        Ok(Self { read: bytes as u64, written: bytes as u64, work: Box::new(work) })
    }

    /// Checksums of `bytes`, as each read and write of the store takes them.
    ///
    /// # Errors
    /// `Io` when memory is refused.
    pub fn checksum(bytes: usize) -> Result<Self> {
        let data = filled(bytes)?;
        let binding = Binding { store: [1; 16], chunk: 0, group: Group::Weight, generation: 1 };
        let work = move || {
            std::hint::black_box(checksum::sums(&binding, &data[..bytes]));
        };
        Ok(Self { read: bytes as u64, written: 0, work: Box::new(work) })
    }

    /// AdamW with f32 weights, which it replaces, or writes elsewhere as it does for a chunk that is paged.
    ///
    /// # Errors
    /// `Io` when memory is refused.
    pub fn adamw_f32(kernel: Kernel, parameters: usize, in_place: bool) -> Result<Self> {
        let bytes = 4 * parameters;
        let weight = if in_place { None } else { Some(filled(bytes)?) };
        let (gradient, mut out) = (filled(bytes)?, filled(bytes)?);
        let (mut exp_avg, mut exp_avg_sq) = (filled(bytes)?, filled(bytes)?);
        let spans = [span(parameters)];
        let work = move || {
            update_f32(
                kernel,
                &spans,
                weight.as_ref().map(|weight| bytemuck::cast_slice(&weight[..bytes])),
                bytemuck::cast_slice_mut(&mut out[..bytes]),
                bytemuck::cast_slice(&gradient[..bytes]),
                bytemuck::cast_slice_mut(&mut exp_avg[..bytes]),
                bytemuck::cast_slice_mut(&mut exp_avg_sq[..bytes]),
            );
        };
        Ok(Self::of_adamw(parameters, work))
    }

    /// AdamW with split weights (bf16 and the remainder of an f32 master), in place or not.
    ///
    /// # Errors
    /// `Io` when memory is refused.
    pub fn adamw_split(kernel: Kernel, parameters: usize, in_place: bool) -> Result<Self> {
        let (half, bytes) = (2 * parameters, 4 * parameters);
        let weight = if in_place { None } else { Some(filled(half)?) };
        let gradient = filled(bytes)?;
        let (mut out, mut remainder) = (filled(half)?, filled(half)?);
        let (mut exp_avg, mut exp_avg_sq) = (filled(bytes)?, filled(bytes)?);
        let spans = [span(parameters)];
        let work = move || {
            update_split(
                kernel,
                &spans,
                weight.as_ref().map(|weight| bytemuck::cast_slice(&weight[..half])),
                bytemuck::cast_slice_mut(&mut out[..half]),
                bytemuck::cast_slice_mut(&mut remainder[..half]),
                bytemuck::cast_slice(&gradient[..bytes]),
                bytemuck::cast_slice_mut(&mut exp_avg[..bytes]),
                bytemuck::cast_slice_mut(&mut exp_avg_sq[..bytes]),
            );
        };
        Ok(Self::of_adamw(parameters, work))
    }

    fn of_adamw(parameters: usize, work: impl FnMut() + Send + 'static) -> Self {
        let count = parameters as u64;
        Self {
            read: READ_PER_PARAMETER * count,
            written: WRITTEN_PER_PARAMETER * count,
            work: Box::new(work),
        }
    }

    /// By name: `copy`, `update`, `checksum`, `adamw f32` and `adamw split`, each of the two also with
    /// ` in place`; over so many parameters, or four bytes for each of them. AdamW runs the kernel of that name, or the fastest.
    ///
    /// # Errors
    /// `Invalid` for an unknown name; `Io` when memory is refused.
    pub fn named(name: &str, parameters: usize, kernel: Option<&str>) -> Result<Self> {
        let found = match kernel {
            None => Kernel::detect(),
            Some(wanted) => Kernel::available()
                .into_iter()
                .find(|kernel| kernel.to_string() == wanted)
                .ok_or_else(|| Error::invalid(format!("this CPU has no AdamW kernel {wanted}")))?,
        };
        match name {
            "copy" => Self::memory_copy(4 * parameters),
            "update" => Self::memory_update(4 * parameters),
            "checksum" => Self::checksum(4 * parameters),
            "adamw f32" => Self::adamw_f32(found, parameters, false),
            "adamw split" => Self::adamw_split(found, parameters, false),
            "adamw f32 in place" => Self::adamw_f32(found, parameters, true),
            "adamw split in place" => Self::adamw_split(found, parameters, true),
            _ => Err(Error::invalid(format!("no workload is called {name:?}"))),
        }
    }
}

/// Memory with ordinary numbers in it: 0.1 in f32, neither subnormal nor huge in bf16.
fn filled(bytes: usize) -> Result<Slot> {
    let mut slot = Slot::standalone(bytes, &Ledger::new(), "bench")?;
    bytemuck::cast_slice_mut::<u8, f32>(&mut slot).fill(0.1);
    Ok(slot)
}

fn span(parameters: usize) -> Span {
    let adamw = AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        step: 10,
        gradient_scale: 1.0,
    };
    Span { start: 0, len: parameters, scalars: adamw.scalars(1.0, 0.01) }
}
