"""The schedule as the simulator plays it: stages of compute, loads and updates, each in order. Pure."""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megatrain_io.store.layout import Chunk, ModelLayout
from megatrain_io.store.pool import PoolSizes, kind_for
from megatrain_io.store.schedule import Phase, Residents, Schedule

__all__ = ["Load", "Stage", "StageKey", "Timeline", "Update"]

StageKey = tuple[Phase, int]
"""A part of a step that computes: its phase, and the stop of the layout whose records it computes with."""

# Chunks are put together until a record has no more parts than this, and fewer in a model of many: what is lost is
# less than a part's time.
_PARTS_MAX, _PARTS_OF_ALL = 32, 2000


@dataclass(kw_only=True)
class Load:
    """Weights of a record on their way to compute."""

    begun: int
    """The step whose schedule it is in."""
    record: int
    pending: deque[tuple[int, float]]
    """Parts whose reads were not started: index and bytes."""
    kind: str
    needs: list[int]
    applies: bool
    missing: int
    has_buffer: bool = False
    is_ready: bool = False


@dataclass(kw_only=True)
class Update:
    """Part of a record on its way through planes, AdamW and the drive."""

    begun: int
    """The step whose schedule it is in, and after it the one whose gradient it uses."""
    step: int
    record: int
    part: int
    parameters: float
    read: float
    written: float
    needs: int
    applies: bool
    load: Load | None
    has_slot: bool
    is_read: bool = False


@dataclass(kw_only=True)
class Stage:
    """What compute does without a break, and what it needs before it begins."""

    step: int
    phase: Phase
    stop: int
    seconds: float
    loads: list[Load] = field(default_factory=list)
    leaves: list[Load] = field(default_factory=list)
    """Loads whose weights are done with here, if they are not submitted."""
    gradients: list[int] = field(default_factory=list)
    """Records whose gradient is made here: a buffer for each is needed first."""
    updates: list[int] = field(default_factory=list)
    defers: dict[int, float] = field(default_factory=dict)
    """Records whose gradient is deferred, and the bytes of it that go to the drive."""
    inputs: float = 0.0


class Timeline:
    """What a simulation plays: some steps, one after the other.

    Attributes:
        stages: of compute, in order.
        loads: of weights, in order, by kind of buffer; see ``kind_of``.
        updates: of parts of records, in order.
        commits: whether each step commits, by its number.
        left: updates of each step that are still to be written, by its number.
        count: number of steps.
    """

    def __init__(self, layout: ModelLayout, pool: PoolSizes, residents: Residents) -> None:
        self._layout, self._pool, self._residents = layout, pool, residents
        self._resident_chunks = sorted(residents.chunks)
        self.stages: deque[Stage] = deque()
        kinds = [*(f"weights {number}" for number in range(len(pool.weights))), "resident"]
        self.loads: dict[str, deque[Load]] = {kind: deque() for kind in kinds}
        self.updates: deque[Update] = deque()
        self.commits: dict[int, bool] = {}
        self.left: dict[int, int] = {}
        self.count = 0
        self._parts_max = max(4, min(_PARTS_MAX, _PARTS_OF_ALL // len(layout.records)))
        self._scheduled: dict[tuple[int, int], int] = {}

    def add(
        self,
        schedule: Schedule,
        compute: Mapping[StageKey, float],
        inputs: Mapping[int, float],
        *,
        commits: bool,
    ) -> None:
        """Append a step.

        Args:
            schedule: its chunk operations.
            compute: seconds of each of its stages, all micro-batches.
            inputs: bytes of activation checkpoints that move to the drive and back, by stop of the block.
            commits: whether it is committed at its end.
        """
        number = self.count
        self.commits[number], self.left[number] = commits, 0
        self.left.setdefault(number - 1, 0)
        self.count += 1
        stages: dict[StageKey, Stage] = {}
        for kind, record, phase in schedule.passes:
            stop = self._layout.loss_stop if phase is Phase.HEAD else self._layout.stop_of[record]
            stage = stages.get((phase, stop))
            if stage is None:
                stage = stages[phase, stop] = Stage(
                    step=number,
                    phase=phase,
                    stop=stop,
                    seconds=compute.get((phase, stop), 0.0),
                    inputs=inputs.get(stop, 0.0),
                )
                self.stages.append(stage)
            self._add_pass(stage, kind, record, commits=commits)
        self._finish(stages)

    def _add_pass(self, stage: Stage, kind: str, record: int, *, commits: bool) -> None:
        layout, residents = self._layout, self._residents
        waits = record not in residents.gradients
        if kind == "defer":
            stage.defers[record] = layout.record_deferred_bytes(record) if waits else 0
            return
        parts = _parts(layout.chunks_of(record), self._parts_max)
        stays = record in residents.records
        weights = [_sum(layout.weight_extent_bytes, part) for part in parts]
        load = None
        if kind in {"load", "apply"}:
            load = Load(
                begun=stage.step,
                record=record,
                pending=deque((index, 0.0 if stays else nbytes) for index, nbytes in enumerate(weights)),
                kind=self.kind_of(record),
                needs=[self._scheduled.get((record, index), 0) for index in range(len(parts))],
                applies=kind == "apply",
                missing=len(parts),
            )
            stage.loads.append(load)
            self.loads[load.kind].append(load)
        if kind not in {"update", "apply"}:
            return
        applies = load is not None
        step = stage.step - applies
        is_written = self.commits.get(step, commits)
        if kind == "update":
            stage.updates.append(record)
        for index, part in enumerate(parts):
            planes, resident = _sum(layout.update_extent_bytes, part), self._resident_part(part)
            read: float = planes - _sum(layout.update_extent_bytes, resident)
            written = weights[index] * (is_written or not stays) + (planes if is_written else read)
            if applies and waits:
                read += _sum(layout.gradient_extent_bytes, part)
            key = (record, index)
            needs = self._scheduled.get(key, 0)
            self._scheduled[key] = needs + 1
            self.left[step] += 1
            # What stays is updated in place; what is applied goes to compute, and is written from elsewhere.
            has_slot = not stays or len(resident) < len(part) or (applies and is_written)
            self.updates.append(
                Update(
                    begun=stage.step,
                    step=step,
                    record=record,
                    part=index,
                    parameters=_sum(lambda chunk: chunk.parameters, part),
                    read=read,
                    written=written,
                    needs=needs,
                    applies=applies,
                    load=load,
                    has_slot=has_slot,
                )
            )

    def _resident_part(self, part: Sequence[Chunk]) -> list[Chunk]:
        """Those of the chunks, which follow each other, whose update planes stay in RAM."""
        numbers, first = self._resident_chunks, part[0].index
        found = numbers[bisect_left(numbers, first) : bisect_left(numbers, first + len(part))]
        return [part[number - first] for number in found]

    def _finish(self, stages: Mapping[StageKey, Stage]) -> None:
        """Set which stage makes which gradient, and which keeps its weights from the forward to the backward pass."""
        layout = self._layout
        last = layout.block(layout.blocks - 1)
        trains = any(stage.updates or stage.defers for stage in stages.values())
        for (phase, stop), stage in stages.items():
            # The last block's weights stay for the backward pass, or to where the loss is computed if nothing of it is
            # trained: its backward pass has no operation of its own then.
            later = stages.get((Phase.BACKWARD, last)) or stages.get((Phase.HEAD, layout.loss_stop))
            holds = phase is Phase.FORWARD and stop == last and trains
            (later if holds and later is not None else stage).leaves += stage.loads
            stage.gradients = list(dict.fromkeys([*stage.updates, *stage.defers]))
            is_tied = phase is Phase.HEAD and any(
                layout.stop_of[load.record] == layout.embedding for load in stage.loads
            )
            if is_tied and trains:
                of_table = layout.trained_of(layout.embedding)
                stage.gradients += [record for record in of_table if record not in stage.gradients]

    def kind_of(self, record: int) -> str:
        """Kind of the buffer that the weights of a record are in: ``weights`` and its number, or ``resident``."""
        if record in self._residents.records:
            return "resident"
        state_format, nbytes = self._layout.records[record].format, self._layout.record_weight_bytes(record)
        return f"weights {kind_for(self._pool.weights, state_format, nbytes)}"

    def gradient_kind(self, record: int) -> str:
        """Kind of the buffer that a record's gradient is in: ``gradients`` and its number, or ``resident gradient``."""
        if record in self._residents.gradients:
            return "resident gradient"
        state_format, nbytes = self._layout.records[record].format, self._layout.record_gradient_bytes(record)
        return f"gradients {kind_for(self._pool.gradients, state_format, nbytes)}"

    def parts_of(self, record: int) -> int:
        """Number of parts that a record is played in."""
        return min(self._parts_max, len(self._layout.chunks_of(record)))


def _parts(chunks: Sequence[Chunk], most: int) -> list[Sequence[Chunk]]:
    """Cut the chunks of a record into at most ``most`` parts, which are played one by one."""
    count = min(most, len(chunks))
    borders = [len(chunks) * index // count for index in range(count + 1)]
    return [chunks[start:stop] for start, stop in pairwise(borders)]


def _sum(of: Callable[[Chunk], int], chunks: Sequence[Chunk]) -> int:
    """The sum of ``of`` over chunks of one record in order, of which all but the last are equal."""
    return (len(chunks) - 1) * of(chunks[0]) + of(chunks[-1]) if chunks else 0
