//! How a pipeline is set up.

use crate::memory::pool::PoolSizes;
use crate::optimizer::kernel::Kernel;
use crate::pipeline::gradient_files::GradientFiles;
use crate::pipeline::memory::Residents;
use crate::pipeline::update::TensorSettings;
use crate::units::Unit;

/// How a pipeline is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// The pool.
    pub pool: PoolSizes,
    /// Threads for AdamW and checksums; 0 means one per core.
    pub threads: usize,
    /// The AdamW kernel; `None` picks the fastest.
    pub kernel: Option<Kernel>,
    /// Weight decay and learning-rate scale of each tensor, by record and offset.
    pub tensors: Vec<TensorSettings>,
    /// What stays in RAM from step to step.
    pub residents: Residents,
    /// Where deferred gradients wait that have no buffer of their own; without, none of them can be deferred.
    pub gradient_files: GradientFiles,
    /// What a buffer holds. Schedules must be made for `Store::units` of this unit.
    pub unit: Unit,
}
