//! Loads: weights on their way from the drives into buffers, ahead of the caller who will take them.

use std::collections::VecDeque;
use std::ops::Range;

use crossbeam_channel::Select;

use crate::error::{Error, Result};
use crate::memory::pool::Pool;
use crate::memory::slot::{Slot, SlotList};
use crate::pipeline::executor::context::Context;
use crate::pipeline::executor::requests::{Requests, Work};
use crate::pipeline::executor::working_state::WorkingState;
use crate::pipeline::memory::weights_kind;
use crate::store::ReadPlan;
use crate::units::{Group, Unit};

/// By chunk, loads of residents that are looked at though they wait: there may be thousands. They are taken
/// in order, so none waits for one behind it.
const RESIDENTS_AHEAD: usize = 8;

/// A unit's weights on their way into a buffer.
struct Load {
    /// Number among all loads since the pipeline's start.
    number: u64,
    chunks: Range<usize>,
    /// Updates of each chunk that must have been written first.
    needs: Vec<u64>,
    /// Chunks whose reads were started.
    started: usize,
    /// The part of the buffer that no read was started for yet.
    unread: Option<Slot>,
    /// Parts that were read, by chunk.
    parts: Vec<Option<Slot>>,
    missing: usize,
    /// The step whose deferred gradient updates them on the way, if one does.
    applies: Option<u64>,
}

/// A unit's weights that are all here.
pub(super) struct Loaded {
    pub(super) number: u64,
    pub(super) unit: usize,
    pub(super) applies: Option<u64>,
    pub(super) weights: Slot,
}

/// What the first load that is not complete waits for.
pub(super) enum LoadWait {
    Read,
    Buffer,
    /// An update of this chunk is to be written.
    Update(usize),
}

pub(super) struct Loads {
    /// By kind of buffer of the pool, in the schedule's order.
    queues: Vec<VecDeque<Load>>,
    /// Those of units that have a buffer of their own, in the schedule's order.
    residents: VecDeque<Load>,
    /// What the last round lacked: buffers of each kind, and those of units that have their own, which are
    /// lent, or on their way to the drive.
    lacks: Vec<bool>,
    lent: Vec<usize>,
}

impl Loads {
    /// Loads into so many kinds of buffer.
    pub(super) fn new(kinds: usize) -> Self {
        let queues = (0..kinds).map(|_| VecDeque::new()).collect();
        let (residents, lent) = (VecDeque::new(), Vec::new());
        Self { queues, residents, lacks: vec![false; kinds], lent }
    }

    /// Plans to load a unit.
    pub(super) fn plan(
        &mut self,
        cx: &Context,
        working: &WorkingState,
        number: u64,
        unit: usize,
        applies: Option<u64>,
    ) -> Result {
        let chunks = cx.units.records()[unit].clone();
        let queue = match weights_kind(&cx.pool.sizes, &cx.units, unit) {
            _ if cx.pool.residents.weights_of(unit).is_some() => Some(&mut self.residents),
            kind => kind.and_then(|kind| self.queues.get_mut(kind)),
        };
        let Some(queue) = queue else {
            let name = cx.units.unit_name(unit);
            return Err(Error::invalid(format!("the pool has no buffer for weights of {name}")));
        };
        queue.push_back(Load {
            number,
            needs: chunks.clone().map(|chunk| working.scheduled(chunk)).collect(),
            started: 0,
            unread: None,
            parts: chunks.clone().map(|_| None).collect(),
            missing: chunks.len(),
            chunks,
            applies,
        });
        Ok(())
    }

    /// Starts reads, in order, as far as buffers and the drives allow, and returns what is here at once.
    pub(super) fn start(
        &mut self,
        cx: &Context,
        requests: &mut Requests,
        working: &WorkingState,
    ) -> Vec<Loaded> {
        for kind in 0..self.queues.len() {
            self.start_kind(cx, requests, working, kind);
        }
        self.start_residents(cx, requests, working)
    }

    fn start_kind(
        &mut self,
        cx: &Context,
        requests: &mut Requests,
        working: &WorkingState,
        kind: usize,
    ) {
        for load in &mut self.queues[kind] {
            if load.started == load.chunks.len() {
                continue;
            }
            if load.unread.is_none() {
                let Some(buffer) = cx.pool.weights[kind].try_take() else {
                    self.lacks[kind] = true;
                    return;
                };
                let bytes = cx.units.record_weight_bytes(cx.unit_of(load.chunks.start));
                load.unread = Some(buffer.split_at(bytes).0);
            }
            if !load.read(cx, requests, working) {
                return;
            }
        }
    }

    /// Serves the loads of units that stay in RAM: without I/O, once they were read. A unit whose
    /// buffer is out waits alone; loads of the same unit keep their order.
    fn start_residents(
        &mut self,
        cx: &Context,
        requests: &mut Requests,
        working: &WorkingState,
    ) -> Vec<Loaded> {
        let (mut loaded, mut waiting) = (Vec::new(), Vec::new());
        let mut position = 0;
        let ahead = if cx.units.unit() == Unit::Chunk { RESIDENTS_AHEAD } else { usize::MAX };
        while position < ahead
            && let Some(load) = self.residents.get_mut(position)
        {
            let unit = cx.unit_of(load.chunks.start);
            let is_written = load.first_unwritten(working).is_none();
            position += 1;
            if load.started > 0 || !is_written || waiting.contains(&unit) {
                waiting.push(unit);
                continue;
            }
            let list = cx.pool.residents.weights_of(unit);
            let Some(slot) = list.and_then(SlotList::try_take) else {
                self.lent.push(unit);
                waiting.push(unit);
                continue;
            };
            if working.residents.has_weights(unit) {
                position -= 1;
                if let Some(Load { number, applies, .. }) = self.residents.remove(position) {
                    loaded.push(Loaded { number, unit, applies, weights: slot });
                }
            } else {
                load.unread = Some(slot.split_at(cx.units.record_weight_bytes(unit)).0);
                load.read(cx, requests, working);
                waiting.push(unit);
            }
        }
        loaded
    }

    /// A chunk of a load has been read and verified; returns the load when it is the last one.
    pub(super) fn landed(
        &mut self,
        cx: &Context,
        number: u64,
        chunk: usize,
        plan: &ReadPlan,
        mut slot: Slot,
    ) -> Option<Loaded> {
        slot[plan.bytes..].fill(0);
        let is_it = |load: &Load| load.number == number;
        let mut queues = self.all_mut();
        let (queue, position) =
            queues.find_map(|queue| queue.iter().position(is_it).map(|at| (queue, at)))?;
        let load = &mut queue[position];
        load.parts[chunk - load.chunks.start] = Some(slot);
        load.missing -= 1;
        if load.missing > 0 {
            return None;
        }
        let Load { parts, applies, .. } = queue.remove(position)?;
        let unit = cx.unit_of(chunk);
        let weights = parts.into_iter().flatten().reduce(Slot::join)?;
        Some(Loaded { number, unit, applies, weights })
    }

    /// Nobody takes weights of the pending step any more; what is applied on its way stays planned.
    pub(super) fn drop_what_nobody_takes(&mut self) {
        for queue in self.all_mut() {
            queue.retain(|load| load.applies.is_some() || load.started > 0);
        }
    }

    pub(super) fn clear(&mut self) {
        self.all_mut().for_each(VecDeque::clear);
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut VecDeque<Load>> {
        self.queues.iter_mut().chain([&mut self.residents])
    }

    /// A new round begins: nothing is known to lack.
    pub(super) fn begin_round(&mut self) {
        self.lacks.fill(false);
        self.lent.clear();
    }

    /// Whether the last round lacked a buffer.
    pub(super) fn is_starved(&self) -> bool {
        self.lacks.contains(&true) || !self.lent.is_empty()
    }

    /// Waits, with all that `select` waits for, for the buffers that the last round lacked.
    pub(super) fn watch<'a>(&self, pool: &'a Pool, select: &mut Select<'a>) {
        for (list, is_lacking) in pool.weights.iter().zip(&self.lacks) {
            if *is_lacking {
                select.recv(list.availability());
            }
        }
        for list in self.lent.iter().filter_map(|unit| pool.residents.weights_of(*unit)) {
            select.recv(list.availability());
        }
    }

    /// What the first load that is not complete waits for.
    pub(super) fn wait(&self, working: &WorkingState) -> LoadWait {
        let resident = self.residents.front().map(|load| (load, true));
        let fronts = self.queues.iter().filter_map(|queue| Some((queue.front()?, false)));
        let Some((load, stays)) = fronts.chain(resident).min_by_key(|(load, _)| load.number) else {
            return LoadWait::Read;
        };
        let has_buffer = load.started > 0 || load.unread.is_some();
        // Of what stays in RAM the buffer is free only when it was written.
        let unwritten = load.first_unwritten(working).filter(|_| has_buffer || stays);
        match unwritten {
            Some(chunk) => LoadWait::Update(chunk),
            None if has_buffer => LoadWait::Read,
            None => LoadWait::Buffer,
        }
    }
}

impl Load {
    /// The first chunk whose read was not started that an update is still to be written of.
    fn first_unwritten(&self, working: &WorkingState) -> Option<usize> {
        let mut rest = self.chunks.clone().zip(&self.needs).skip(self.started);
        Some(rest.find(|(chunk, needs)| !working.has_written(*chunk, **needs))?.0)
    }

    /// Starts the reads, once there is a buffer; `false` when a chunk is still to be written.
    fn read(&mut self, cx: &Context, requests: &mut Requests, working: &WorkingState) -> bool {
        while self.started < self.chunks.len() {
            let chunk = self.chunks.start + self.started;
            if !working.has_written(chunk, self.needs[self.started]) {
                return false;
            }
            let Some(unread) = self.unread.take() else { return false };
            let bytes = cx.units.chunks()[chunk].extent_bytes(Group::Weight);
            let (part, unread) = unread.split_at(bytes);
            self.started += 1;
            self.unread = (self.started < self.chunks.len()).then_some(unread);
            let plan = working.plan_read(&cx.store, chunk, Group::Weight);
            let (place, bytes, number) = ((plan.drive, plan.offset), plan.bytes, self.number);
            requests.read(cx, place, bytes, part, Work::Load { number, chunk, plan });
        }
        true
    }
}
