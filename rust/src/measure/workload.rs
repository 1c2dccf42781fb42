//! What runs on the CPU, over memory of the kind that training uses: huge pages, all cores.

use std::fmt;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::measure::{Clocks, Figure};
use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::optimizer::adamw::AdamW;
use crate::optimizer::hyperparameters::Hyperparameters;
use crate::optimizer::kernel::Kernel;
use crate::optimizer::update::{Span, State, update};
use crate::store::checksum::{self, Binding};
use crate::units::{Group, PlaneSpec, StateFormat};

const ADAMW: AdamW = AdamW { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, step: 10 };

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

    /// AdamW over state of a format, whose weights it replaces, or writes elsewhere as it does for a chunk that
    /// is paged.
    ///
    /// # Errors
    /// `Io` when memory is refused; `Invalid` for a format that AdamW does not update.
    pub fn adamw(
        format: StateFormat,
        kernel: Kernel,
        parameters: usize,
        in_place: bool,
    ) -> Result<Self> {
        let widths = move |group: Group| format.planes(group).iter().map(PlaneSpec::bytes);
        let bytes = parameters * format.weight_bytes();
        let weight = if in_place { None } else { Some(filled(bytes)?) };
        let (gradient, mut out) = (filled(size_of::<f32>() * parameters)?, filled(bytes)?);
        let planes = widths(Group::Update).map(|width| filled(width * parameters));
        let mut planes = planes.collect::<Result<Vec<_>>>()?;
        let span = Span { start: 0, len: parameters, lr_scale: 1.0, weight_decay: 0.01 };
        let optimizer = Hyperparameters::AdamW(ADAMW).over(format, parameters, 1.0, &[span])?;
        let work = move || {
            let lens = widths(Group::Update).map(|width| width * parameters);
            let state = State::new(
                format,
                weight.as_ref().map(|weight| &weight[..bytes]),
                &mut out[..bytes],
                bytemuck::cast_slice(&gradient[..size_of::<f32>() * parameters]),
                planes.iter_mut().zip(lens).map(|(plane, len)| &mut plane[..len]).collect(),
            );
            update(kernel, &*optimizer, state);
        };
        let written: usize = Group::ALL.into_iter().map(|group| format.group_bytes(group)).sum();
        let read = size_of::<f32>() + written;
        let [read, written] = [read, written].map(|bytes| (bytes * parameters) as u64);
        Ok(Self { read, written, work: Box::new(work) })
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
            "adamw f32" => Self::adamw(StateFormat::F32, found, parameters, false),
            "adamw split" => Self::adamw(StateFormat::Bf16, found, parameters, false),
            "adamw f32 in place" => Self::adamw(StateFormat::F32, found, parameters, true),
            "adamw split in place" => Self::adamw(StateFormat::Bf16, found, parameters, true),
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
