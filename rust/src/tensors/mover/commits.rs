//! Commits and first writes: sequences of operations that keep their order.

use crossbeam_channel::Sender;

use super::{Mover, Pending, Plan, Running};
use crate::error::{Error, Result};
use crate::memory::slot::Slot;
use crate::store::Next;
use crate::tensors::ticket::Outcome;

impl Mover {
    pub(super) fn commit(&mut self, done: Sender<Outcome>) {
        if let Some((chunk, cause)) = self.torn.first_key_value() {
            let _ = done.send(Err(self.torn_error(*chunk, cause.as_ref())));
        } else if !self.touched {
            let _ = done.send(self.store.check().map(|()| None));
        } else {
            let blob = self.store.committed().blob;
            match self.store.start_commit(self.working.clone(), &blob) {
                Ok(sequence) => self.go_on(Running { sequence, commit: Some(done) }),
                Err(error) => drop(done.send(Err(error))),
            }
        }
    }

    /// Submits a sequence's next operations, or takes note of its end.
    pub(super) fn go_on(&mut self, mut running: Running) {
        loop {
            match self.store.next_operation(&mut running.sequence) {
                Ok(Next::Operation(next)) => {
                    self.request(Pending { plan: Plan::Sequence, again: false }, next);
                }
                Ok(Next::Wait) => return self.running = Some(running),
                Ok(Next::End) => {
                    if let Some(done) = running.commit {
                        self.touched = false;
                        let _ = done.send(Ok(None));
                    }
                    return;
                }
                Err(error) => return Self::sequence_failed(running, error),
            }
        }
    }

    pub(super) fn sequence_completed(&mut self, slot: Option<Slot>, result: Result) {
        let Some(mut running) = self.running.take() else { return };
        match self.store.completed(&mut running.sequence, slot, result) {
            Ok(()) => self.go_on(running),
            Err(error) => Self::sequence_failed(running, error),
        }
    }

    /// The transfer behind a failed first write meets the store's own refusal.
    fn sequence_failed(running: Running, error: Error) {
        if let Some(done) = running.commit {
            let _ = done.send(Err(error));
        }
    }

    /// A scratch store has one copy, so what was put counts when it is closed, committed or not.
    pub(super) fn finish_scratch(&mut self) {
        if !self.store.is_scratch() || !self.touched || self.store.check().is_err() {
            return;
        }
        let blob = self.store.committed().blob;
        let taken = match self.store.start_commit(self.working.clone(), &blob) {
            Ok(mut sequence) if self.torn.is_empty() => self.store.next_operation(&mut sequence),
            _ => Err(Error::invalid("torn")),
        };
        if taken.is_err() {
            let _ = self.store.give_up();
        }
    }
}
