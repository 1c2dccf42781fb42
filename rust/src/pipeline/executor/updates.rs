//! Updates: chunk by chunk, once planes and gradient are here, and written behind.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Select;

use crate::error::{Error, Result};
use crate::io::engine::Operation;
use crate::memory::pool::Pool;
use crate::memory::slot::Slot;
use crate::pipeline::events::Lane;
use crate::pipeline::executor::context::Context;
use crate::pipeline::executor::deferred_gradients::DeferredGradients;
use crate::pipeline::executor::loads::Loaded;
use crate::pipeline::executor::requests::{Request, Requests, Work};
use crate::pipeline::executor::steps::{Step, Steps};
use crate::pipeline::executor::working_state::WorkingState;
use crate::pipeline::memory::deferred_bytes;
use crate::pipeline::stalls::{Cause, Timings};
use crate::pipeline::update::{Weights, update_chunk};
use crate::store::checksum;
use crate::store::layout::Chunk;
use crate::store::{Entry, WritePlan};
use crate::units::{Group, to_usize};

/// A chunk's update that has not got a chunk slot yet.
struct Planned {
    step: u64,
    chunk: usize,
    needs: u64,
    applies: bool,
}

/// A chunk's update that has all memory it needs.
struct Update {
    step: u64,
    chunk: usize,
    /// `None` where the unit's weights stay in RAM: they are updated in place.
    weight_out: Option<Slot>,
    planes: Option<Slot>,
    is_read: bool,
    gradient: Gradient,
    /// Whether its gradient was deferred by the step, and its weights are on their way to the caller.
    applies: bool,
    /// How often its chunk was updated when it is done.
    updates: u32,
    /// Table entries of the writes in flight.
    written: Vec<(Group, Entry, Vec<u32>)>,
    writes_left: usize,
}

/// Where the gradient of a chunk is.
enum Gradient {
    /// The source has that of the whole unit.
    OfUnit,
    /// Coming from the drive, where it was deferred.
    Coming,
    Here(Slot),
}

/// A unit's gradient and the weights it belongs to.
struct Source {
    /// The weights of each chunk: those that were not updated yet, or where they are handed over, all.
    weights: Vec<Option<Slot>>,
    /// `None` where it comes from the drive, chunk by chunk.
    gradient: Option<Slot>,
    chunks_left: usize,
    /// The number of the load that gets the weights when all are updated.
    hand_over: Option<u64>,
    /// The step that defers the gradient when all are updated, where that is on the drive.
    deferred_by: Option<u64>,
    /// Whether there is none: nothing is computed, and what is in RAM alone is written if the step commits.
    is_skipped: bool,
}

pub(super) struct Updates {
    planned: VecDeque<Planned>,
    active: Vec<Update>,
    /// By unit.
    sources: Vec<Option<Source>>,
    /// How many of them are handed over when they are updated.
    on_their_way: usize,
    /// Whether the last round lacked a chunk slot.
    lacks_slot: bool,
    /// Whether the last round has moved on in RAM alone: no completion will tell of it.
    has_moved_on: bool,
}

impl Updates {
    pub(super) fn new(units: usize) -> Self {
        Self {
            planned: VecDeque::new(),
            active: Vec::new(),
            sources: std::iter::repeat_with(|| None).take(units).collect(),
            on_their_way: 0,
            lacks_slot: false,
            has_moved_on: false,
        }
    }

    /// Plans an update of a chunk by `step`.
    pub(super) fn plan(
        &mut self,
        working: &mut WorkingState,
        step: u64,
        chunk: usize,
        applies: bool,
    ) {
        let needs = working.scheduled(chunk);
        working.schedule_update(chunk);
        self.planned.push_back(Planned { step, chunk, needs, applies });
    }

    /// Takes a unit's gradient with the weights that it was computed from. `deferred_by` says which step
    /// wants it on the drive after that.
    pub(super) fn submit(
        &mut self,
        cx: &Context,
        unit: usize,
        weights: Slot,
        gradient: Slot,
        deferred_by: Option<u64>,
    ) {
        let weights = cx.cut_at_chunks(unit, weights);
        let (chunks_left, gradient) = (weights.len(), Some(gradient));
        let (hand_over, is_skipped) = (None, false);
        let source = Source { weights, gradient, chunks_left, hand_over, deferred_by, is_skipped };
        self.sources[unit] = Some(source);
    }

    /// Takes note that a unit got no gradient. Weights that stay in RAM come back in their own buffer.
    pub(super) fn skip(&mut self, cx: &Context, unit: usize, weights: Option<Slot>) {
        let chunks_left = cx.units.records()[unit].len();
        let weights = match weights {
            Some(weights) => cx.cut_at_chunks(unit, weights),
            None => std::iter::repeat_with(|| None).take(chunks_left).collect(),
        };
        let (gradient, hand_over, deferred_by, is_skipped) = (None, None, None, true);
        let source = Source { weights, gradient, chunks_left, hand_over, deferred_by, is_skipped };
        self.sources[unit] = Some(source);
        self.has_moved_on = true;
    }

    /// Takes weights on their way to the caller, to apply the gradient that was deferred; `None` where that
    /// comes from the drive, or where there is none.
    pub(super) fn apply(
        &mut self,
        cx: &Context,
        loaded: Loaded,
        gradient: Option<Slot>,
        is_skipped: bool,
    ) {
        let weights = cx.cut_at_chunks(loaded.unit, loaded.weights);
        let (chunks_left, hand_over) = (weights.len(), Some(loaded.number));
        let deferred_by = None;
        let source = Source { weights, gradient, chunks_left, hand_over, deferred_by, is_skipped };
        self.sources[loaded.unit] = Some(source);
        self.on_their_way += 1;
        // Residents are here at once.
        self.has_moved_on = true;
    }

    /// Gives updates their memory, in order, and reads the planes that are not in RAM.
    pub(super) fn start_reads(
        &mut self,
        cx: &Context,
        requests: &mut Requests,
        working: &mut WorkingState,
        steps: &mut Steps,
        deferred: &mut DeferredGradients,
    ) -> Result {
        while let Some(&Planned { step, chunk, needs, applies }) = self.planned.front() {
            if !working.has_written(chunk, needs) || !steps.may_update(step, applies) {
                return Ok(());
            }
            let place = &cx.units.chunks()[chunk];
            let own_weights = cx.pool.residents.weights_of(place.record).is_some();
            let own_planes = cx.pool.residents.planes_of(chunk);
            let is_skipped = steps.skips(step, place.record);
            let unwritten = working.residents.are_unwritten(place.record, chunk, &cx.pool);
            if is_skipped && !(steps.commits(step) && unwritten.contains(&true)) {
                if self.sources[place.record].is_none() {
                    return Ok(());
                }
                self.planned.pop_front();
                self.pass_by(cx, working, steps, deferred, (step, chunk));
                continue;
            }
            let on_drive = applies && !is_skipped && deferred.is_on_drive(chunk);
            if on_drive && !deferred.is_written(chunk) {
                return Ok(());
            }
            // The caller computes with weights that were updated on their way, while they are written.
            let has_out = !own_weights || (applies && steps.commits(step));
            let wanted = [has_out, own_planes.is_none(), on_drive];
            let Some([weight_out, mut planes, gradient]) = chunk_slot(&cx.pool, place, wanted)
            else {
                self.lacks_slot = true;
                return Ok(());
            };
            if let Some(list) = own_planes {
                // Free: the last update of the chunk has ended.
                planes = list.try_take();
            }
            let Some(planes) = planes else { return Ok(()) };
            let planes = planes.split_at(place.extent_bytes(Group::Update)).0;
            self.planned.pop_front();
            let is_read = working.residents.has_planes(chunk);
            let mut update = Update {
                step,
                chunk,
                weight_out,
                planes: None,
                is_read,
                gradient: if on_drive { Gradient::Coming } else { Gradient::OfUnit },
                applies,
                updates: working.updates(chunk),
                written: Vec::new(),
                writes_left: 0,
            };
            if let Some(slot) = gradient {
                deferred.read(cx, requests, chunk, step, slot)?;
            }
            if is_read {
                update.planes = Some(planes);
            } else {
                let plan = working.plan_read(&cx.store, chunk, Group::Update);
                let (front, rest) = planes.split_at(plan.bytes);
                let (place, bytes) = ((plan.drive, plan.offset), plan.bytes);
                requests.read(cx, place, bytes, front, Work::Planes { chunk, plan, rest });
            }
            self.active.push(update);
        }
        Ok(())
    }

    /// The planes of a chunk have been read and verified; `rest` is the memory behind them.
    pub(super) fn planes_landed(
        &mut self,
        cx: &Context,
        working: &mut WorkingState,
        chunk: usize,
        slot: Slot,
        mut rest: Slot,
    ) {
        rest.fill(0);
        if let Some(update) = self.active.iter_mut().find(|u| u.chunk == chunk && !u.is_read) {
            update.planes = Some(slot.join(rest));
            update.is_read = true;
            working.residents.read_planes(chunk, &cx.pool);
        }
    }

    /// The deferred gradient of a chunk has been read and verified.
    pub(super) fn gradient_landed(&mut self, chunk: usize, slot: Slot) {
        if let Some(update) = self.active.iter_mut().find(|u| u.chunk == chunk && u.applies) {
            update.gradient = Gradient::Here(slot);
        }
    }

    /// Whether there is an update to compute now.
    pub(super) fn are_ready(&self, cx: &Context, steps: &Steps) -> bool {
        self.ready(cx, steps).is_some()
    }

    /// An update whose planes and gradient are here and whose step may write: all steps before it
    /// are durable, so neither copy that it could overwrite is needed by a commit under way.
    fn ready(&self, cx: &Context, steps: &Steps) -> Option<usize> {
        let open = steps.open()?.number();
        self.active.iter().position(|update| {
            update.planes.is_some()
                && update.step == open
                && !matches!(update.gradient, Gradient::Coming)
                && self.sources[cx.unit_of(update.chunk)].is_some()
        })
    }

    /// Computes the next update and starts its writes.
    pub(super) fn update(
        &mut self,
        cx: &Context,
        requests: &mut Requests,
        working: &mut WorkingState,
        steps: &mut Steps,
        deferred: &mut DeferredGradients,
    ) -> Result {
        let Some(index) = self.ready(cx, steps) else { return Ok(()) };
        let (start, began) = (Instant::now(), cx.events().now());
        let missing = || Error::invalid("an update without its buffers");
        let step = steps.open().ok_or_else(missing)?;
        let update = &mut self.active[index];
        let chunk = update.chunk;
        let place = &cx.units.chunks()[chunk];
        let unit = place.record;
        let source = self.sources[unit].as_mut().ok_or_else(missing)?;
        let (slots, sums, plans);
        if source.is_skipped {
            plans = plan_carried(cx, working, step, chunk)?;
            (slots, sums) = carry(cx, update, source, &plans)?;
        } else {
            if cx.store.has_own_updates() {
                update.updates = working.updates(chunk).saturating_add(1);
            }
            plans = plan_writes(cx, working, step, update)?;
            working.residents.change(unit, chunk);
            (slots, sums) = compute(cx, working, step, update, source, &plans)?;
        }
        let is_last = source.chunks_left == 0;
        update.writes_left = plans.iter().flatten().count();
        for (((group, plan), sums), slot) in Group::ALL.into_iter().zip(plans).zip(sums).zip(slots)
        {
            let Some(plan) = plan else { continue };
            working.touch();
            update.written.push((group, plan.entry, sums));
            let slot = slot.ok_or_else(missing)?;
            let (offset, bytes) = (plan.offset, slot.len());
            let (operation, again, work) = (Operation::Write, false, Work::Write { chunk, group });
            let file = Arc::clone(cx.store.drives().file(plan.drive));
            requests.start(cx, Request { operation, file, offset, bytes, work, again }, Some(slot));
        }
        let writes_left = update.writes_left;
        if is_last {
            self.end_source(cx, deferred, unit);
        }
        Timings::add(&cx.shared.timings.update, start);
        cx.events().record(Lane::Update, "update", Some(chunk), began);
        if writes_left == 0 {
            self.end_update(cx, working, steps, index);
            self.has_moved_on = true;
        }
        Ok(())
    }

    /// All chunks of a unit are updated: its weights go to the caller or the pool, its gradient to the
    /// drive or the pool.
    fn end_source(&mut self, cx: &Context, deferred: &mut DeferredGradients, unit: usize) {
        let Some(source) = self.sources[unit].take() else { return };
        self.on_their_way -= usize::from(source.hand_over.is_some());
        if let (Some(step), Some(gradient)) = (source.deferred_by, source.gradient) {
            deferred.defer(step, unit, gradient);
            self.has_moved_on = true;
        }
        if let Some(number) = source.hand_over
            && let Some(weights) = source.weights.into_iter().flatten().reduce(Slot::join)
        {
            cx.hand_over(number, weights);
        }
    }

    /// A write of a chunk has completed.
    pub(super) fn wrote(
        &mut self,
        cx: &Context,
        working: &mut WorkingState,
        steps: &mut Steps,
        chunk: usize,
    ) {
        let position = self.active.iter().position(|u| u.chunk == chunk && u.writes_left > 0);
        let Some(position) = position else { return };
        self.active[position].writes_left -= 1;
        if self.active[position].writes_left == 0 {
            self.end_update(cx, working, steps, position);
        }
    }

    fn end_update(
        &mut self,
        cx: &Context,
        working: &mut WorkingState,
        steps: &mut Steps,
        position: usize,
    ) {
        let update = self.active.remove(position);
        working.updated(cx.store.layout(), update.chunk, &update.written, update.updates);
        steps.updated(update.step);
    }

    /// Ends the update of a chunk that got no gradient, and has nothing to be written.
    fn pass_by(
        &mut self,
        cx: &Context,
        working: &mut WorkingState,
        steps: &mut Steps,
        deferred: &mut DeferredGradients,
        (step, chunk): (u64, usize),
    ) {
        let unit = cx.unit_of(chunk);
        working.updated(cx.store.layout(), chunk, &[], working.updates(chunk));
        steps.updated(step);
        if let Some(source) = &mut self.sources[unit] {
            source.chunks_left -= 1;
            if source.chunks_left == 0 {
                self.end_source(cx, deferred, unit);
            }
        }
        self.has_moved_on = true;
    }

    /// Forgets what was planned for a step that is dropped.
    pub(super) fn drop_step(&mut self, number: u64) {
        self.planned.retain(|update| update.step != number);
    }

    pub(super) fn clear(&mut self) {
        self.planned.clear();
        self.active.clear();
        self.sources.fill_with(|| None);
        self.on_their_way = 0;
    }

    /// A new round begins: nothing is known to lack, and nothing has moved on.
    pub(super) fn begin_round(&mut self) {
        self.lacks_slot = false;
        self.has_moved_on = false;
    }

    /// Whether the last round lacked a chunk slot.
    pub(super) fn is_starved(&self) -> bool {
        self.lacks_slot
    }

    /// Whether the last round has moved on in RAM alone, so that the next one may find more to do.
    pub(super) fn has_moved_on(&self) -> bool {
        self.has_moved_on
    }

    /// Waits, with all that `select` waits for, for a chunk slot if the last round lacked one.
    pub(super) fn watch<'a>(&self, pool: &'a Pool, select: &mut Select<'a>) {
        if self.lacks_slot {
            select.recv(pool.chunk_slots.availability());
        }
    }

    /// Whether weights are updated on their way to the caller.
    pub(super) fn hold_weights(&self) -> bool {
        self.on_their_way > 0
    }

    pub(super) fn is_being_written(&self, chunk: usize) -> bool {
        self.active.iter().any(|update| update.chunk == chunk && update.writes_left > 0)
    }

    /// What the first update that has its gradient and was not computed waits for: what frees gradient
    /// buffers, and what comes before a write.
    pub(super) fn wait(&self, cx: &Context, working: &WorkingState, steps: &Steps) -> Cause {
        let has_gradient = |chunk: usize| self.sources[cx.unit_of(chunk)].is_some();
        let open = steps.open().map(Step::number);
        let mut with_memory = self.active.iter().filter(|update| update.writes_left == 0);
        // They get their memory in order: those that have it come first.
        if let Some(update) = with_memory.find(|update| has_gradient(update.chunk)) {
            return if update.planes.is_none() || matches!(update.gradient, Gradient::Coming) {
                Cause::Read
            } else if Some(update.step) == open && cx.store.is_writable() {
                Cause::Update
            } else {
                Cause::Write
            };
        }
        match self.planned.front() {
            Some(next) if !working.has_written(next.chunk, next.needs) => Cause::Write,
            _ => Cause::Pool,
        }
    }
}

/// The parts of a chunk slot that are wanted, for new weights, planes and gradient; `None` when none is
/// free.
fn chunk_slot(pool: &Pool, chunk: &Chunk, wanted: [bool; 3]) -> Option<[Option<Slot>; 3]> {
    let mut parts = [None, None, None];
    if !wanted.contains(&true) {
        return Some(parts);
    }
    let mut rest = pool.chunk_slots.try_take()?;
    let sizes = [
        chunk.extent_bytes(Group::Weight),
        chunk.extent_bytes(Group::Update),
        deferred_bytes(chunk.parameters),
    ];
    for ((part, size), is_wanted) in parts.iter_mut().zip(sizes).zip(wanted) {
        if is_wanted {
            let next = rest.split_off(size);
            *part = Some(std::mem::replace(&mut rest, next));
        }
    }
    Some(parts)
}

/// Where both groups of a chunk are written. What stays in RAM is written only for a commit.
fn plan_writes(
    cx: &Context,
    working: &WorkingState,
    step: &Step,
    update: &Update,
) -> Result<[Option<WritePlan>; 2]> {
    let chunk = update.chunk;
    let (place, residents) = (&cx.units.chunks()[chunk], &cx.pool.residents);
    let stays =
        [residents.weights_of(place.record).is_some(), residents.planes_of(chunk).is_some()];
    let plan = |group: Group, planes: usize| match stays[group as usize] && !step.commits() {
        true => Ok(None),
        false => working.plan_write(&cx.store, chunk, group, planes).map(Some),
    };
    let planes = place.format().planes(Group::Update).len();
    let update_plan = plan(Group::Update, planes)?.map(|plan| counted(plan, update.updates));
    Ok([plan(Group::Weight, 1)?, update_plan])
}

/// Where a chunk that got no gradient is written: what is in RAM alone, for a commit.
fn plan_carried(
    cx: &Context,
    working: &WorkingState,
    step: &Step,
    chunk: usize,
) -> Result<[Option<WritePlan>; 2]> {
    let place = &cx.units.chunks()[chunk];
    let unwritten = working.residents.are_unwritten(place.record, chunk, &cx.pool);
    let plan = |group: Group, planes: usize| match unwritten[group as usize] && step.commits() {
        true => working.plan_write(&cx.store, chunk, group, planes).map(Some),
        false => Ok(None),
    };
    let planes = place.format().planes(Group::Update).len();
    let updates = working.updates(chunk);
    let update_plan = plan(Group::Update, planes)?.map(|plan| counted(plan, updates));
    Ok([plan(Group::Weight, 1)?, update_plan])
}

/// The same, with an entry that says how often the chunk was updated.
fn counted(plan: WritePlan, updates: u32) -> WritePlan {
    WritePlan { entry: Entry { updates, ..plan.entry }, ..plan }
}

type Computed = ([Option<Slot>; 2], [Vec<u32>; 2]);

/// Updates a chunk; returns what is to be written of each group, and the checksums.
fn compute(
    cx: &Context,
    working: &WorkingState,
    step: &Step,
    update: &mut Update,
    source: &mut Source,
    plans: &[Option<WritePlan>; 2],
) -> Result<Computed> {
    let missing = || Error::invalid("an update without its buffers");
    let chunk = update.chunk;
    let place = &cx.units.chunks()[chunk];
    let spans = cx.settings.spans(&cx.store.layout().chunks()[chunk]);
    let (format, scale) = (place.format(), step.gradient_scale());
    let hyperparameters = match cx.store.has_own_updates() {
        true => step.hyperparameters().after(working.updates(chunk)),
        false => *step.hyperparameters(),
    };
    let optimizer = hyperparameters.over(format, place.parameters, scale, &spans)?;
    let mut planes = update.planes.take().ok_or_else(missing)?;
    let mut weight_out = update.weight_out.take();
    let part = std::mem::replace(&mut update.gradient, Gradient::OfUnit);
    let number = chunk - cx.units.records()[place.record].start;
    let mut weights = source.weights[number].take().ok_or_else(missing)?;
    let bytes = place.parameters * size_of::<f32>();
    let gradient = match (&part, &source.gradient) {
        (Gradient::Here(slot), _) => &slot[..bytes],
        (_, Some(whole)) => {
            let first = to_usize(place.start) * size_of::<f32>();
            &whole[first..first + bytes]
        }
        _ => return Err(missing()),
    };
    let bindings = plans.each_ref().map(|plan| plan.as_ref().map(|plan| &plan.binding));
    let sums = cx.workers.install(|| {
        let weights = match weight_out.as_mut() {
            Some(out) => Weights::Apart(&weights, out),
            None => Weights::InPlace(&mut weights),
        };
        update_chunk(cx.kernel, &*optimizer, place, weights, gradient, &mut planes, bindings)
    });
    let new_weights = if update.applies {
        // Compute has its own: what is in flight belongs to the engine.
        if let Some(out) = &weight_out {
            weights.copy_from_slice(out);
        }
        source.weights[number] = Some(weights);
        weight_out
    } else {
        Some(weight_out.unwrap_or(weights))
    };
    source.chunks_left -= 1;
    Ok(([new_weights, Some(planes)], sums))
}

/// The same of a chunk that got no gradient: nothing is computed.
fn carry(
    cx: &Context,
    update: &mut Update,
    source: &mut Source,
    plans: &[Option<WritePlan>; 2],
) -> Result<Computed> {
    let planes = update.planes.take();
    let mut weight_out = update.weight_out.take();
    let number = update.chunk - cx.units.records()[cx.unit_of(update.chunk)].start;
    let mut weights = source.weights[number].take();
    if update.applies {
        // Compute gets its own; what is in flight belongs to the engine.
        if let (Some(out), Some(weights)) = (&mut weight_out, &weights) {
            out.copy_from_slice(weights);
        }
        source.weights[number] = weights;
        weights = weight_out;
    }
    source.chunks_left -= 1;
    let slots = [weights, planes];
    let mut sums = [vec![], vec![]];
    for ((sums, slot), plan) in sums.iter_mut().zip(&slots).zip(plans) {
        let Some(plan) = plan else { continue };
        let missing = || Error::invalid("an update without its buffers");
        let slot = slot.as_ref().ok_or_else(missing)?;
        *sums = cx.workers.install(|| checksum::sums(&plan.binding, slot));
    }
    Ok((slots, sums))
}
