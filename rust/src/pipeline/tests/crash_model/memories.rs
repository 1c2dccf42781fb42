//! What the state must be: the same training, in memory.

use std::sync::Arc;

use crate::memory::ledger::Ledger;
use crate::memory::slot::Slot;
use crate::optimizer::adamw::AdamW;
use crate::optimizer::kernel::Kernel;
use crate::store::StoreCreator;
use crate::units::Group;

pub(super) fn len(parameters: u64) -> usize {
    usize::try_from(parameters).expect("small")
}

pub(super) fn adamw(step: u64) -> AdamW {
    AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, step }
}

pub(super) fn value(step: u64, record: usize, index: usize) -> f32 {
    let mixed = (index * 7 + record * 13 + len(step) * 31) % 1009;
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let value = mixed as f32;
    value / 505.0 - 1.0
}

/// One record's weights and moments, in memory.
#[derive(Clone, PartialEq)]
pub(super) struct Record {
    pub(super) weight: Vec<f32>,
    pub(super) exp_avg: Vec<f32>,
    pub(super) exp_avg_sq: Vec<f32>,
    /// AdamW's t of the record.
    pub(super) updates: u32,
}

/// What the state is after each step, by training in memory.
#[derive(Clone)]
pub(super) struct Memories {
    pub(super) after: Vec<Vec<Arc<Record>>>,
}

impl Memories {
    /// The state that every store begins with.
    pub(super) fn imported(records: &[u64]) -> Self {
        let record = |(index, &parameters): (usize, &u64)| {
            let zeros = vec![0.0; len(parameters)];
            let weight = (0..len(parameters)).map(|i| value(0, index, i)).collect();
            Arc::new(Record { weight, exp_avg: zeros.clone(), exp_avg_sq: zeros, updates: 0 })
        };
        Self { after: vec![records.iter().enumerate().map(record).collect()] }
    }

    /// One more step, of these records.
    pub(super) fn train(&mut self, step: u64, trained: &[usize], gradient_scale: f32) {
        self.after.truncate(len(step));
        let mut state = self.after[len(step) - 1].clone();
        for &index in trained {
            let record = Arc::make_mut(&mut state[index]);
            let n = record.weight.len();
            let gradient: Vec<f32> = (0..n).map(|i| value(step, index, i)).collect();
            record.updates += 1;
            let own = adamw(record.updates.into());
            let Record { weight, exp_avg, exp_avg_sq, .. } = record;
            let planes = [weight, exp_avg, exp_avg_sq].map(Vec::as_mut_slice);
            own.update_tensor(Kernel::Scalar, gradient_scale, 0.01, &gradient, planes);
        }
        self.after.push(state);
    }
}

pub(super) fn import(creator: &mut StoreCreator, memories: &Memories, ledger: &Ledger) {
    let chunks = creator.layout().expect("a layout").chunks().to_vec();
    for (index, chunk) in chunks.iter().enumerate() {
        let bytes = chunk.extent_bytes(Group::Weight);
        let mut slot = Slot::standalone(bytes, ledger, "test").expect("memory");
        let weights = &memories.after[0][chunk.record].weight[len(chunk.start)..];
        for (bytes, value) in slot.chunks_exact_mut(4).zip(&weights[..chunk.parameters]) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        creator.write_group(index, Group::Weight, 1, slot).expect("written");
    }
}
