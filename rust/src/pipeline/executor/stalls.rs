//! What callers wait for: the executor knows, and publishes it.

use crate::pipeline::shared::Shared;
use crate::pipeline::stalls::Causes;

/// What was published last.
#[derive(Default)]
pub(super) struct StallMeter {
    published: Causes,
}

impl StallMeter {
    /// Tells the callers what they wait for, if that has changed.
    pub(super) fn publish(&mut self, shared: &Shared, causes: Causes) {
        if causes != self.published {
            self.published = causes;
            shared.lock().causes = causes;
            shared.changed.notify_all();
        }
    }
}
