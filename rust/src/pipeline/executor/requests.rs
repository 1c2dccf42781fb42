//! The requests in flight: what each is for, and where a trace shows it.

use std::collections::HashMap;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::io::engine::{self, Completion, Operation};
use crate::io::file::DirectFile;
use crate::memory::slot::Slot;
use crate::pipeline::events::Lane;
use crate::pipeline::executor::context::Context;
use crate::store::ReadPlan;
use crate::units::Group;

/// An operation to perform, or in flight.
pub(super) struct Request {
    pub(super) operation: Operation,
    pub(super) file: Arc<DirectFile>,
    pub(super) offset: u64,
    pub(super) bytes: usize,
    pub(super) work: Work,
    /// Whether this is the second attempt; there is no third.
    pub(super) again: bool,
}

/// What an operation is for.
pub(super) enum Work {
    Load {
        number: u64,
        chunk: usize,
        plan: ReadPlan,
    },
    Planes {
        chunk: usize,
        plan: ReadPlan,
        rest: Slot,
    },
    Write {
        chunk: usize,
        group: Group,
    },
    /// A deferred gradient, from the drive and to it.
    ReadGradient {
        chunk: usize,
        step: u64,
    },
    WriteGradient {
        chunk: usize,
    },
    Sequence,
}

impl Work {
    /// The chunk that it is about, if one.
    pub(super) fn chunk(&self) -> Option<usize> {
        match self {
            Self::Load { chunk, .. }
            | Self::Planes { chunk, .. }
            | Self::Write { chunk, .. }
            | Self::ReadGradient { chunk, .. }
            | Self::WriteGradient { chunk } => Some(*chunk),
            Self::Sequence => None,
        }
    }
}

pub(super) struct Requests {
    /// By tag; those that are traced with lane and start.
    in_flight: HashMap<u64, (Request, Option<(usize, u64)>)>,
    next_tag: u64,
    reply: Sender<Completion>,
    completions: Receiver<Completion>,
    /// Whether each lane of a trace is taken, of reads and of writes.
    lanes: [Vec<bool>; 2],
}

impl Requests {
    pub(super) fn new() -> Self {
        let (reply, completions) = unbounded();
        Self {
            in_flight: HashMap::new(),
            next_tag: 0,
            reply,
            completions,
            lanes: Default::default(),
        }
    }

    pub(super) fn are_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// What has completed; each is to be given to [`Self::landed`].
    pub(super) fn completions(&self) -> &Receiver<Completion> {
        &self.completions
    }

    /// Reads `bytes` at drive and offset.
    pub(super) fn read(
        &mut self,
        cx: &Context,
        (drive, offset): (usize, u64),
        bytes: usize,
        slot: Slot,
        work: Work,
    ) {
        let (operation, again) = (Operation::Read, false);
        let file = Arc::clone(cx.store.drives().file(drive));
        self.start(cx, Request { operation, file, offset, bytes, work, again }, Some(slot));
    }

    /// Starts an operation, or completes it at once when there is nothing on disk.
    pub(super) fn start(&mut self, cx: &Context, request: Request, slot: Option<Slot>) {
        let tag = self.next_tag;
        self.next_tag += 1;
        let traced = self.take_lane(cx, &request);
        let Request { operation, offset, bytes, .. } = request;
        let file = Arc::clone(&request.file);
        self.in_flight.insert(tag, (request, traced));
        let reply = self.reply.clone();
        if bytes == 0 && operation == Operation::Read {
            // Through the same channel, so that there is one way only.
            let _ = reply.send(Completion { tag, slot, result: Ok(()) });
            return;
        }
        let request = engine::Request { operation, file, offset, slot, bytes, tag, reply };
        cx.store.engine().0.submit(request);
    }

    /// Takes an operation out that has completed, whatever came of it.
    pub(super) fn landed(&mut self, cx: &Context, tag: u64) -> Option<Request> {
        let (request, traced) = self.in_flight.remove(&tag)?;
        if let Some((lane, start)) = traced {
            self.lanes[direction(&request)][lane] = false;
            if let Some((lane, name)) = shown(&request.work, lane) {
                cx.events().record(lane, name, request.work.chunk(), Some(start));
            }
        }
        Some(request)
    }

    /// The lowest lane that is free, and the time, while events are recorded; nothing on disk, nothing to
    /// record.
    fn take_lane(&mut self, cx: &Context, request: &Request) -> Option<(usize, u64)> {
        let now = cx.events().now()?;
        if request.bytes == 0 || matches!(request.work, Work::Sequence) {
            return None;
        }
        let lanes = &mut self.lanes[direction(request)];
        let lane = lanes.iter().position(|taken| !taken).unwrap_or(lanes.len());
        lanes.resize(lanes.len().max(lane + 1), false);
        lanes[lane] = true;
        Some((lane, now))
    }
}

fn direction(request: &Request) -> usize {
    usize::from(request.operation != Operation::Read)
}

/// How a trace shows an operation.
fn shown(work: &Work, lane: usize) -> Option<(Lane, &'static str)> {
    Some(match work {
        Work::Load { .. } => (Lane::Read(lane), "read weights"),
        Work::Planes { .. } => (Lane::Read(lane), "read planes"),
        Work::ReadGradient { .. } => (Lane::Read(lane), "read gradient"),
        Work::Write { group: Group::Weight, .. } => (Lane::Write(lane), "write weights"),
        Work::Write { group: Group::Update, .. } => (Lane::Write(lane), "write planes"),
        Work::WriteGradient { .. } => (Lane::Write(lane), "write gradient"),
        Work::Sequence => return None,
    })
}
