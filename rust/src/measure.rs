//! Measuring what training is made of, with the parts that training uses: transfers through an
//! engine over a preallocated file, flushes, and what runs on the CPU.
//!
//! Every figure has bytes, wall time and CPU time. CPU time is that of the whole process, the
//! kernel's work for it included as far as the system accounts it there (io_uring's own workers are
//! threads of the process; interrupts are nobody's).

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

mod flush;
mod scratch;
mod transfers;
mod workload;

pub use flush::FlushLatency;
pub use scratch::ScratchFile;
pub use transfers::{Form, Limit, TRAINING_CYCLE_BYTES, Traffic, Transfers};
pub use workload::Workload;

/// What a piece of work moved, and what it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figure {
    /// Bytes read.
    pub read: u64,
    /// Bytes written.
    pub written: u64,
    /// Time that passed.
    pub wall: Duration,
    /// CPU time that the process took, all threads together.
    pub cpu: Duration,
}

impl Figure {
    /// Bytes read and written.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.read + self.written
    }

    /// GB/s (10^9 bytes), read and written together; 0 when no time passed.
    #[must_use]
    pub fn gb_per_s(&self) -> f64 {
        ratio(gigabytes(self.bytes()), self.wall.as_secs_f64())
    }

    /// CPU seconds for each GB moved; 0 when nothing was.
    #[must_use]
    pub fn cpu_s_per_gb(&self) -> f64 {
        ratio(self.cpu.as_secs_f64(), gigabytes(self.bytes()))
    }
}

fn ratio(of: f64, to: f64) -> f64 {
    if to > 0.0 { of / to } else { 0.0 }
}

#[expect(clippy::cast_precision_loss, reason = "a figure to print")]
fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// Wall clock and CPU clock, started together.
struct Clocks {
    wall: Instant,
    cpu: Duration,
}

impl Clocks {
    fn start() -> Self {
        Self { wall: Instant::now(), cpu: cpu_time() }
    }

    fn figure(&self, read: u64, written: u64) -> Figure {
        let wall = self.wall.elapsed();
        Figure { read, written, wall, cpu: cpu_time().saturating_sub(self.cpu) }
    }
}

/// CPU time of this process since it began, user and system.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or_default(),
        u32::try_from(now.tv_nsec).unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests;
