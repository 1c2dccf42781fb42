//! Steps: how they begin, what they are told, when they are committed, and how they are dropped.

use std::sync::Arc;

use super::{
    Executor, Kept, Load, OUTER, Pending, PlannedUpdate, RESIDENT, Running, Source, Step, Work,
};
use crate::error::{Error, Result};
use crate::memory::slot::Slot;
use crate::optimizer::adamw::AdamW;
use crate::optimizer::norm::squares_of_runs;
use crate::pipeline::memory::weight_list;
use crate::pipeline::{After, Command, schedule};
use crate::store::{Next, Sequenced, Table};
use crate::units::Group;

impl Executor {
    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Stop => {
                self.stopping = true;
                self.drop_step_under_way();
            }
            Command::Abort { reply } => {
                self.aborting = Some(reply);
                self.drop_step_under_way();
            }
            // After a failure callers get its error; what they still send is dropped here.
            _ if self.failed || self.is_refused => {}
            Command::Begin { schedule, adamw, commits, first_load, number } => {
                let outcome = self.begin(schedule, adamw, commits, first_load, number);
                if let Err(error) = outcome {
                    self.fail(error);
                }
            }
            Command::Submit { piece, weights, gradient } => {
                match self.submitted(piece, weights, gradient) {
                    Ok(()) => {}
                    Err(error @ Error::NotFinite { .. }) => self.refuse_step(error),
                    Err(error) => self.fail(error),
                }
            }
            Command::End { commit, after } => {
                if let Err(error) = self.end(commit, after) {
                    self.fail(error);
                }
            }
        }
    }

    fn begin(
        &mut self,
        schedule: Arc<schedule::Schedule>,
        adamw: AdamW,
        commits: bool,
        first_load: u64,
        begun: u64,
    ) -> Result {
        let pieces = Arc::clone(&self.pieces);
        // Only the last step can have kept gradients: what is applied now is its update.
        let before = self.steps.back().map_or(0, |step| step.number);
        if !schedule.applied().is_empty() {
            let waiting = self.steps.back_mut().filter(|step| step.kept == Kept::Waiting);
            let step = waiting.ok_or_else(|| Error::invalid("no gradients were kept"))?;
            step.kept = Kept::Applied;
            self.held.schedule(schedule.applied(), &pieces, &self.pool, step.commits)?;
        }
        if schedule.kept().is_empty() || !schedule.updated().is_empty() {
            self.held.schedule(schedule.updated(), &pieces, &self.pool, commits)?;
        }
        let mut number = first_load;
        for operation in schedule.operations() {
            let chunk = operation.chunk;
            let piece = pieces.chunks()[chunk].record;
            let applies = operation.kind == schedule::Kind::Apply;
            match operation.kind {
                schedule::Kind::Load | schedule::Kind::Apply
                    if chunk == pieces.records()[piece].start =>
                {
                    let chunks = pieces.records()[piece].clone();
                    let list = weight_list(&self.pool, &pieces, piece);
                    let class = if self.pool.residents.weights_of(piece).is_some() {
                        RESIDENT
                    } else {
                        OUTER * usize::from(!std::ptr::eq(list, &raw const self.pool.block_buffers))
                    };
                    self.loads[class].push_back(Load {
                        number,
                        needs: self.scheduled[chunks.clone()].to_vec(),
                        started: 0,
                        unread: None,
                        parts: chunks.clone().map(|_| None).collect(),
                        missing: chunks.len(),
                        chunks,
                        applies,
                    });
                    number += 1;
                }
                _ => {}
            }
            if matches!(operation.kind, schedule::Kind::Apply | schedule::Kind::Update) {
                let needs = self.scheduled[chunk];
                self.scheduled[chunk] += 1;
                let step = if applies { before } else { begun };
                self.planned.push_back(PlannedUpdate { step, chunk, needs, applies });
            }
        }
        self.steps.push_back(Step {
            number: begun,
            adamw,
            updates_left: schedule.updates(),
            expected: schedule.updated().union(schedule.kept()).copied().collect(),
            schedule,
            ended: false,
            commits,
            commit: None,
            kept: Kept::Nothing,
        });
        Ok(())
    }

    /// Takes a piece's gradient: it is counted into the norm, and then updates, or is kept, or both.
    fn submitted(&mut self, piece: usize, weights: Option<Slot>, gradient: Slot) -> Result {
        let is_expected = |step: &mut Step| !step.ended && step.expected.remove(&piece);
        let Some(step) = self.steps.back_mut().and_then(|step| is_expected(step).then_some(step))
        else {
            let name = self.pieces.piece_name(piece);
            return Err(Error::invalid(format!(
                "the gradient of {name} was submitted and the step does not (or no longer) expect it"
            )));
        };
        let number = step.number;
        let updates = step.schedule.updated().contains(&piece);
        let keeps = step.schedule.kept().contains(&piece);
        let layout = self.store.layout();
        let chunks = self.pieces.records()[piece].clone();
        let tensors = self.settings.tensors(layout, chunks.clone());
        let runs = self.workers.install(|| {
            let parameters = tensors.last().map_or(0, |tensor| tensor.end);
            let values = bytemuck::cast_slice(&gradient[..parameters * size_of::<f32>()]);
            squares_of_runs(self.kernel, &tensors, values)
        });
        if !runs.iter().all(|run| run.is_finite()) {
            let record = layout.chunks()[chunks.start].record;
            let record = self.store.manifest().records[record].name.clone();
            return Err(Error::NotFinite { record });
        }
        let mut state = self.shared.lock();
        // Else nobody has asked for those of that step.
        if state.begun == number {
            state.squares.add(layout, chunks, runs);
        }
        drop(state);
        self.shared.changed.notify_all();
        let on_drive = keeps && self.is_kept_on_drive(piece);
        if on_drive {
            self.expect_kept(piece);
        }
        if updates {
            let missing = || Error::invalid("an update without its weights");
            let weights = self.cut_at_chunks(piece, weights.ok_or_else(missing)?);
            let chunks_left = weights.len();
            self.sources[piece] = Some(Source {
                weights,
                gradient: Some(gradient),
                chunks_left,
                hand_over: None,
                kept_by: on_drive.then_some(number),
            });
        } else if on_drive {
            self.keeping.push_back((number, piece, gradient));
        }
        Ok(())
    }

    /// A piece's buffer, cut at its chunks.
    pub(super) fn cut_at_chunks(&self, piece: usize, weights: Slot) -> Vec<Option<Slot>> {
        let pieces = &self.pieces;
        let mut rest = weights;
        let cut = |chunk: usize| {
            let bytes = pieces.chunks()[chunk].extent_bytes(Group::Weight);
            let at = rest.split_off(bytes);
            Some(std::mem::replace(&mut rest, at))
        };
        pieces.records()[piece].clone().map(cut).collect()
    }

    fn end(&mut self, commit: Option<Vec<u8>>, after: After) -> Result {
        let Some(step) = self.steps.back_mut() else { return Ok(()) };
        if let Some(piece) = step.expected.iter().min() {
            let name = self.pieces.piece_name(*piece);
            let error = format!("the step ended without the gradient of {name}");
            return Err(Error::invalid(error));
        }
        step.ended = true;
        step.commit = commit;
        let After::Applied(scale) = after else { return Ok(()) };
        step.adamw.gradient_scale = scale;
        step.kept = Kept::Waiting;
        if step.schedule.updated().is_empty() {
            step.updates_left = schedule::chunks(&self.pieces, step.schedule.kept());
        } else {
            // The caller may go on at once: what it begins waits for `take_back`.
            self.taken_back = Some(step.number);
            self.held.forget_what_is_unwritten();
        }
        Ok(())
    }

    /// Takes back the updates of a step that guessed wrong, when all of them are written: its gradients
    /// will be applied to the state before it, which is the committed one.
    pub(super) fn take_back(&mut self) {
        let Some(number) = self.taken_back else { return };
        let front = self.steps.front_mut().filter(|step| step.number == number);
        let Some(step) = front.filter(|step| step.updates_left == 0) else { return };
        step.updates_left = schedule::chunks(&self.pieces, step.schedule.kept());
        self.working = Table::clone(&self.store.committed().table);
        self.held.back_to_the_last_commit();
        self.taken_back = None;
    }

    /// Commits the oldest step when all its writes have completed: the drain before the flush.
    pub(super) fn settle(&mut self) {
        let taken_back = self.taken_back;
        while self.running.is_none()
            && self.steps.front().is_some_and(|step| {
                step.ended && step.updates_left == 0 && taken_back != Some(step.number)
            })
        {
            match self.steps.front_mut().and_then(|step| step.commit.take()) {
                Some(blob) => match self.store.start_commit(self.working.clone(), &blob) {
                    Ok(sequence) => {
                        self.touched = false;
                        self.flights.commit = self.shared.events.now();
                        self.go_on(Running { sequence, commits: true });
                    }
                    Err(error) => return self.fail(error),
                },
                None => self.settle_front(),
            }
        }
    }

    pub(super) fn start_writing(&mut self) -> Result {
        let sequence = self.store.start_writing()?;
        self.go_on(Running { sequence, commits: false });
        Ok(())
    }

    /// Submits a sequence's next operations, or takes note of its end.
    pub(super) fn go_on(&mut self, mut running: Running) {
        loop {
            match self.store.next_operation(&mut running.sequence) {
                Ok(Next::Operation(Sequenced { operation, drive, offset, slot, bytes })) => {
                    let (again, work) = (false, Work::Sequence);
                    let file = Arc::clone(self.store.drives().file(drive));
                    self.submit(Pending { operation, file, offset, bytes, again, work }, slot);
                }
                Ok(Next::Wait) => return self.running = Some(running),
                Ok(Next::End) if running.commits => {
                    self.held.committed();
                    self.commit_ended();
                    return self.settle_front();
                }
                Ok(Next::End) => return,
                Err(error) => return self.fail(error),
            }
        }
    }

    fn settle_front(&mut self) {
        self.steps.pop_front();
        self.shared.lock().settled += 1;
        self.shared.changed.notify_all();
    }

    pub(super) fn fail(&mut self, error: Error) {
        self.failed = true;
        // What the next call would be told is told to the one that waits now, too.
        let error = self.store.check().err().unwrap_or(error);
        self.shared.lock().failure.get_or_insert(error);
        self.shared.changed.notify_all();
    }

    /// The step under way cannot go on; those before it are finished, until the caller aborts.
    fn refuse_step(&mut self, error: Error) {
        self.is_refused = true;
        self.drop_step_under_way();
        self.shared.lock().failure.get_or_insert(error);
        self.shared.changed.notify_all();
    }

    /// Forgets what was planned for a step that is dropped; what is applied on its way stays planned. Nobody
    /// takes weights any more: their buffers are free for that.
    fn drop_step_under_way(&mut self) {
        let Some(step) = self.steps.back().filter(|step| !step.ended) else { return };
        let number = step.number;
        self.planned.retain(|update| update.step != number);
        for loads in &mut self.loads {
            loads.retain(|load| load.applies || load.started > 0);
        }
        let mut state = self.shared.lock();
        state.forget_loads();
    }

    /// Back to the last commit, once nothing is in flight any more.
    pub(super) fn finish_abort(&mut self) {
        if self.touched && self.store.is_scratch() && (self.stopping || self.aborting.is_some()) {
            let _ = self.store.give_up();
        }
        let Some(reply) = self.aborting.take() else { return };
        self.touched = false;
        self.loads = Default::default();
        self.planned.clear();
        self.updates.clear();
        self.sources.iter_mut().for_each(|source| *source = None);
        self.on_their_way = 0;
        self.keeping.clear();
        self.kept.forget();
        self.taken_back = None;
        self.is_refused = false;
        self.steps.clear();
        self.scheduled.fill(0);
        self.on_disk.fill(0);
        self.held.back_to_the_last_commit();
        self.held.forget_what_is_unwritten();
        self.working = Table::clone(&self.store.committed().table);
        let outcome = self.store.check();
        self.failed = outcome.is_err();
        let mut state = self.shared.lock();
        state.forget_loads();
        state.ended = state.begun;
        state.settled = state.begun;
        state.waiting = None;
        state.is_uncommitted = false;
        state.failure = outcome.clone().err();
        drop(state);
        self.shared.changed.notify_all();
        let _ = reply.send(outcome);
    }
}
