"""How long a step takes, before it runs: the schedule of training, played at a machine's rates. Pure.

Four servers do one thing at a time: the drive reads, the drive writes, the workers check and update, and compute
computes. Drive and cores are shared by those of them that are busy. What they do and what they wait for is what the
pipeline does and waits for: buffers of the pool, the gate of a commit, bytes that are still to be written.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

from megatrain_io.planning.timeline import Load, Stage, StageKey, Timeline, Update
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.pool import PoolSizes
from megatrain_io.store.schedule import Phase, Residents, Schedule

__all__ = ["Rates", "SimulatedStep", "StandstillError", "simulate"]

_SERVERS = ("read", "write", "work", "compute")
# What is waited for where a gradient buffer is, by the server that is busy.
_CAUSES = {"work": "update", "read": "read", "write": "write"}


class StandstillError(RuntimeError):
    """The simulation cannot go on, because all in it wait for each other: a bug in it, and no reason not to train."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, when it does nothing else.

    Attributes:
        read: bytes read, from all drives together.
        write: bytes written, to all drives together.
        side_by_side: what reading and writing together reach, as a multiple of taking turns.
        check: bytes whose checksums are compared.
        update: parameters that AdamW updates, with the checksums of what is written.
        shares_cores: whether compute runs on the cores that check and update.
        commit: seconds (not a rate) of a commit, from the last write to the durable superblock.
    """

    read: float
    write: float
    side_by_side: float = 1.0
    check: float = inf
    update: float = inf
    shares_cores: bool = False
    commit: float = 0.0


@dataclass(frozen=True)
class SimulatedStep:
    """Seconds of one simulated step.

    Attributes:
        seconds: from its beginning to that of the next.
        phases: seconds by phase; they add up to ``seconds``.
        busy: seconds that each server is busy; more than one can be at a time.
        waits: seconds that compute waits, by cause: ``read``, ``pool``, ``update``, ``write``.
    """

    seconds: float
    phases: Mapping[str, float]
    busy: Mapping[str, float]
    waits: Mapping[str, float]


@dataclass
class _Job:
    """A piece of work of one server, and what to do when it is done."""

    seconds: float
    done: Callable[[], None]


def simulate(  # noqa: PLR0913 - each with a meaning of its own
    steps: Sequence[tuple[Schedule, bool]],
    layout: ModelLayout,
    pool: PoolSizes,
    compute: Mapping[StageKey, float],
    rates: Rates,
    *,
    residents: Residents = Residents(),  # noqa: B008 - it never changes
    inputs: Mapping[int, float] | None = None,
    behind: int = 0,
) -> list[SimulatedStep]:
    """Play steps one after the other.

    The first one finds everything on the drive and nothing under way: look at a later one for the steady state.

    Args:
        steps: schedule of each, and whether it commits.
        layout: of the store.
        pool: sizes and numbers of the buffers.
        compute: seconds of each stage, all micro-batches, when nothing else runs.
        rates: of the machine.
        residents: what stays in RAM.
        inputs: bytes of activation checkpoints that go to the drive and come back, by stop.
        behind: chunks of gradients that RAM holds between pool and update or drive, where the pool is a device's.

    Raises:
        StandstillError: all wait for each other.
    """
    timeline = Timeline(layout, pool, residents)
    for schedule, commits in steps:
        timeline.add(schedule, compute, inputs or {}, commits=commits)
    return _Simulation(timeline, layout, pool, rates, behind).run()


@dataclass
class _Gradient:
    """A gradient that was handed over, until it is updated with or written.

    Attributes:
        updates: parts that are still to be updated, before the next step.
        writes: parts that are still to be written, as it waits for its norm.
        part: bytes of each part that is written.
        has_weights: whether the weights of its record are still with it.
        is_written: whether writing has begun.
        has_left: whether RAM holds it, and the pool has its buffers back.
    """

    updates: int
    writes: int
    part: float
    has_weights: bool
    is_written: bool = False
    has_left: bool = False


class _Simulation:
    def __init__(
        self, timeline: Timeline, layout: ModelLayout, pool: PoolSizes, rates: Rates, behind: int
    ) -> None:
        self._timeline, self._layout, self._rates, self._behind = timeline, layout, rates, behind
        self._queues: dict[str, deque[_Job]] = {name: deque() for name in _SERVERS}
        self._free = {
            "slots": pool.chunk_slots[1],
            **{f"weights {number}": kind.count for number, kind in enumerate(pool.weights)},
            **{f"gradients {number}": kind.count for number, kind in enumerate(pool.gradients)},
        }
        self._out: set[tuple[str, int]] = set()
        """Buffers of residents that are not in their place."""
        self._loads, self._planned = timeline.loads, timeline.updates
        self._stages, self._left, self._commits = timeline.stages, timeline.left, timeline.commits
        self._granted: list[Update] = []
        self._on_disk: dict[tuple[int, int], int] = {}
        self._sources: dict[int, int] = {}
        """Records whose gradient is there to be used, and parts of them that are not updated."""
        self._gradients: dict[int, _Gradient] = {}
        """Gradients by record, in the order in which they were handed over."""
        self._read_inputs: set[int] = set()
        self._ended: set[int] = set()
        self._durable = -1
        self._is_committing = False
        self._figures: list[dict[str, dict[str, float]]] = [
            {"phases": {}, "busy": dict.fromkeys(_SERVERS, 0.0), "waits": {}} for _ in range(timeline.count)
        ]
        self._computing: Stage | None = None

    # --------------------------------------------------------------------------------------------- playing

    def run(self) -> list[SimulatedStep]:
        """Play all steps, until compute has done the last one and everything is written."""
        while True:
            self._grant()
            busy = [name for name in _SERVERS if self._queues[name]]
            if not busy:
                break
            speeds = self._speeds(busy)
            elapsed = min(self._queues[name][0].seconds / speeds[name] for name in busy)
            self._note(busy, elapsed)
            for name in busy:
                job = self._queues[name][0]
                job.seconds -= elapsed * speeds[name]
                if job.seconds <= 1e-12:  # noqa: PLR2004 - rounding
                    self._queues[name].popleft()
                    job.done()
        if self._stages:
            raise StandstillError(f"the schedule came to a standstill before {self._stages[0]}")
        return [self._figure(number) for number in range(self._timeline.count)]

    def _speeds(self, busy: Sequence[str]) -> dict[str, float]:
        speeds = dict.fromkeys(busy, 1.0)
        if "read" in busy and "write" in busy:
            speeds["read"] = speeds["write"] = self._rates.side_by_side / 2
        if self._rates.shares_cores and "work" in busy and "compute" in busy:
            speeds["work"] = speeds["compute"] = 0.5
        return speeds

    def _note(self, busy: Sequence[str], elapsed: float) -> None:
        """Add elapsed seconds to the phase that is under way, to the cause of its wait, and to the busy servers."""
        stage: Stage | None
        if self._queues["compute"]:
            stage, cause = self._computing, None
        elif self._stages:
            stage, cause = self._stages[0], self._cause(self._stages[0])
        else:
            stage, cause = None, None
        number = stage.step if stage is not None else self._timeline.count - 1
        figures = self._figures[number]
        if stage is not None:
            figures["phases"][stage.phase] = figures["phases"].get(stage.phase, 0.0) + elapsed
        if cause is not None:
            figures["waits"][cause] = figures["waits"].get(cause, 0.0) + elapsed
        for name in busy:
            figures["busy"][name] += elapsed

    def _figure(self, number: int) -> SimulatedStep:
        figures = self._figures[number]
        seconds = sum(figures["phases"].values())
        return SimulatedStep(
            seconds=seconds, phases=figures["phases"], busy=figures["busy"], waits=figures["waits"]
        )

    def _cause(self, stage: Stage) -> str:
        """What compute waits for before a stage: ``read``, ``pool``, ``update`` or ``write``."""
        for load in stage.loads:
            if not load.is_ready:
                return self._load_cause(load)
        if stage.phase is Phase.BACKWARD and stage.inputs and stage.stop not in self._read_inputs:
            return "read"
        busy = (cause for name, cause in _CAUSES.items() if self._queues[name])
        return next(busy, "write")

    def _load_cause(self, load: Load) -> str:
        if load.applies and load.missing == 0:
            return "update"
        if not load.has_buffer:
            return "pool"
        if not load.pending:
            return "read"
        part = load.pending[0][0]
        is_behind = self._on_disk.get((load.record, part), 0) < load.needs[part]
        return "write" if is_behind else "read"

    # -------------------------------------------------------------------------------------------- granting

    def _grant(self) -> None:
        """Start every load, update, stage and commit that has what it needs."""
        for kind in self._loads:
            self._grant_loads(kind)
        self._grant_planes()
        self._start_updates()
        self._start_compute()
        self._start_commit()

    def _grant_loads(self, kind: str) -> None:
        queue = self._loads[kind]
        for load in list(queue):
            if not self._has_begun(load.begun):
                return
            if not load.has_buffer:
                if not self._take(kind, load.record):
                    return
                load.has_buffer = True
            while load.pending:
                part, nbytes = load.pending[0]
                if self._on_disk.get((load.record, part), 0) < load.needs[part]:
                    return
                load.pending.popleft()
                self._read(nbytes, partial(self._loaded, load))
            queue.remove(load)

    def _has_begun(self, step: int) -> bool:
        """Whether a step's schedule is known: it begins when compute has ended the one before."""
        return step == 0 or step - 1 in self._ended

    def _loaded(self, load: Load) -> None:
        load.missing -= 1
        if load.missing == 0 and not load.applies:
            load.is_ready = True
        elif load.missing == 0:
            self._sources[load.record] = len(load.needs)

    def _grant_planes(self) -> None:
        while self._planned:
            update = self._planned[0]
            if not self._has_begun(update.begun):
                return
            if self._on_disk.get((update.record, update.part), 0) < update.needs:
                return
            if update.applies and update.record in self._gradients:
                return
            if update.has_slot:
                if self._free["slots"] == 0:
                    return
                self._free["slots"] -= 1
            self._planned.popleft()
            self._granted.append(update)

            def read(update: Update = update) -> None:
                update.is_read = True

            self._read(update.read, read)

    def _start_updates(self) -> None:
        """Queue the updates whose planes and gradients are here, of the oldest step that is not durable."""
        for update in list(self._granted):
            is_open = update.step == self._durable + 1 and not self._is_committing
            if not (update.is_read and is_open and self._sources.get(update.record)):
                continue
            self._granted.remove(update)
            seconds = update.parameters / self._rates.update
            self._queues["work"].append(_Job(seconds, partial(self._updated, update)))

    def _updated(self, update: Update) -> None:
        record = update.record
        self._sources[record] -= 1
        if self._sources[record] == 0:
            del self._sources[record]
            if update.load is not None:
                update.load.is_ready = True
                if self._timeline.gradient_kind(record) == "resident gradient":
                    self._give(self._timeline.gradient_kind(record), record)
        if update.load is None:
            self._gradients[record].updates -= 1
            self._used(record)

        def written() -> None:
            self._on_disk[record, update.part] = self._on_disk.get((record, update.part), 0) + 1
            self._left[update.step] -= 1
            if update.has_slot:
                self._free["slots"] += 1

        self._write(update.written, written)

    def _hand_over(self, stage: Stage, record: int) -> None:
        """Take the gradient that a stage has made: it is updated with, or waits in RAM or on the drive, or both."""
        parts, nbytes = self._timeline.parts_of(record), stage.defers.get(record, 0.0)
        is_updated = record in stage.updates
        if is_updated:
            self._sources[record] = parts
        else:
            self._give(self._timeline.kind_of(record), record)
        if is_updated or nbytes:
            writes = parts if nbytes else 0
            self._gradients[record] = _Gradient(
                parts if is_updated else 0, writes, nbytes / parts, has_weights=is_updated
            )
            self._used(record)
        elif not self._timeline.gradient_kind(record).startswith("resident"):
            self._give(self._timeline.gradient_kind(record), record)

    def _used(self, record: int) -> None:
        """Give the buffers of a gradient back to the pool, once; a resident one is back when it was updated with."""
        gradient = self._gradients[record]
        self._leave()
        if gradient.updates == 0:
            if gradient.has_weights:
                gradient.has_weights = False
                self._give(self._timeline.kind_of(record), record)
            self._write_gradient(record, gradient)
        if gradient.updates == gradient.writes == 0:
            del self._gradients[record]
            if not gradient.has_left or self._timeline.gradient_kind(record).startswith("resident"):
                self._give(self._timeline.gradient_kind(record), record)
            self._leave()

    def _leave(self) -> None:
        """Let gradients that RAM has room for leave the pool, with their weights, in order."""
        chunks = 0
        for record, gradient in self._gradients.items():
            parts, all_chunks = self._timeline.parts_of(record), len(self._layout.chunks_of(record))
            chunks += -(-max(gradient.updates, gradient.writes) * all_chunks // parts)
            if chunks > self._behind:
                return
            if gradient.has_left:
                continue
            gradient.has_left = True
            kind = self._timeline.kind_of(record)
            if gradient.has_weights and not kind.startswith("resident"):
                gradient.has_weights = False
                self._give(kind, record)
            kind = self._timeline.gradient_kind(record)
            if not kind.startswith("resident"):
                self._give(kind, record)
            self._write_gradient(record, gradient)

    def _write_gradient(self, record: int, gradient: _Gradient) -> None:
        """Queue the writes of a gradient that waits for its norm, part by part."""
        if gradient.is_written:
            return
        gradient.is_written = True

        def written() -> None:
            gradient.writes -= 1
            self._used(record)

        for _ in range(gradient.writes):
            self._write(gradient.part, written)

    def _start_compute(self) -> None:
        if self._queues["compute"] or not self._stages:
            return
        stage = self._stages[0]
        if not all(load.is_ready for load in stage.loads):
            return
        if stage.phase is Phase.BACKWARD and stage.inputs and stage.stop not in self._read_inputs:
            return
        for record in stage.gradients:
            key = ("gradient", record)
            if key not in self._out:
                if not self._take(self._timeline.gradient_kind(record), record):
                    return
                self._out.add(key)
        self._stages.popleft()
        self._computing = stage
        self._move_inputs(stage)
        self._queues["compute"].append(_Job(stage.seconds, lambda: self._computed(stage)))

    def _move_inputs(self, stage: Stage) -> None:
        """Queue the inputs of blocks: to the drive behind the forward pass, and back one block ahead."""
        if stage.phase is Phase.FORWARD and stage.inputs:
            self._write(stage.inputs, lambda: None)
        following = self._stages[0] if self._stages else None
        if following is not None and following.phase is Phase.BACKWARD and following.inputs:
            stop = following.stop
            self._read(following.inputs, lambda: self._read_inputs.add(stop))

    def _computed(self, stage: Stage) -> None:
        if stage.phase is Phase.BACKWARD:
            self._read_inputs.discard(stage.stop)
        # A tied table's gradient is carried on to the end of the step.
        submitted = [
            record
            for record in stage.gradients
            if stage.phase is not Phase.HEAD or record in stage.updates or record in stage.defers
        ]
        for load in stage.leaves:
            if load.record not in submitted:
                self._give(load.kind, load.record)
        for record in submitted:
            self._out.discard(("gradient", record))
            self._hand_over(stage, record)
        if not self._stages or self._stages[0].step != stage.step:
            self._ended.add(stage.step)

    def _start_commit(self) -> None:
        step = self._durable + 1
        waits = any(stage.step == step for stage in self._stages) or step not in self._ended
        if self._is_committing or waits or self._left.get(step, 0) > 0:
            return

        def committed() -> None:
            self._durable, self._is_committing = step, False

        self._is_committing = True
        self._queues["write"].append(_Job(self._rates.commit if self._commits[step] else 0.0, committed))

    # -------------------------------------------------------------------------------------------- resources

    def _take(self, kind: str, record: int) -> bool:
        """Take a buffer of this kind for a record; False if none is free."""
        if kind.startswith("resident"):
            if (kind, record) in self._out:
                return False
            self._out.add((kind, record))
            return True
        if self._free[kind] == 0:
            return False
        self._free[kind] -= 1
        return True

    def _give(self, kind: str, record: int) -> None:
        if kind.startswith("resident"):
            self._out.discard((kind, record))
        else:
            self._free[kind] += 1

    def _read(self, nbytes: float, done: Callable[[], None]) -> None:
        """Queue reading some bytes, then comparing their checksums; ``done`` is called at the end."""

        def check() -> None:
            self._queues["work"].append(_Job(nbytes / self._rates.check, done))

        if nbytes:
            self._queues["read"].append(_Job(nbytes / self._rates.read, check))
        else:
            done()

    def _write(self, nbytes: float, done: Callable[[], None]) -> None:
        if nbytes:
            self._queues["write"].append(_Job(nbytes / self._rates.write, done))
        else:
            done()
