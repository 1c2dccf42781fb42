//! Hyperparameters of one step, whichever the optimizer: the one place that names all of them.

use crate::error::{Error, Result};
use crate::optimizer::adamw::AdamW;
use crate::optimizer::update::{Span, Update};
use crate::units::StateFormat;

/// The hyperparameters of one step's updates, by optimizer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Hyperparameters {
    /// [`AdamW`]'s.
    AdamW(AdamW),
}

impl From<AdamW> for Hyperparameters {
    fn from(adamw: AdamW) -> Self {
        Self::AdamW(adamw)
    }
}

impl Hyperparameters {
    /// The same for a record that has been updated so often before: bias corrections are its own.
    #[must_use]
    pub fn after(self, updates: u32) -> Self {
        match self {
            Self::AdamW(adamw) => Self::AdamW(AdamW { step: u64::from(updates) + 1, ..adamw }),
        }
    }

    /// The update of a chunk of `parameters` parameters in this format, in which the tensors lie at `spans`.
    /// Gradients are multiplied by `gradient_scale` before anything else: 1, or less where they are clipped.
    ///
    /// # Errors
    /// `Invalid` when such records are not for this optimizer.
    ///
    /// # Panics
    /// If the spans overlap, are out of order, or end behind the chunk.
    pub fn over(
        &self,
        format: StateFormat,
        parameters: usize,
        gradient_scale: f32,
        spans: &[Span],
    ) -> Result<Box<dyn Update>> {
        let (name, update) = match self {
            Self::AdamW(adamw) => ("AdamW", adamw.over(format, parameters, gradient_scale, spans)),
        };
        update.ok_or_else(|| {
            let format = format.spec().name;
            Error::invalid(format!("{name} does not update records of format {format}"))
        })
    }
}

#[cfg(test)]
mod tests;
