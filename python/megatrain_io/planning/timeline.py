"""The schedule as the simulator plays it: stages of compute, loads and updates, each in order. Pure."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.pool import PoolSizes, kind_for
from megatrain_io.store.schedule import ChunkOp, Phase, Residents

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
        schedule: Sequence[ChunkOp],
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
        for (kind, record, phase), run in groupby(schedule, lambda op: (op.kind, op.chunk.record, op.phase)):
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
            self._add_run(stage, kind, record, list(run), commits=commits)
        self._finish(stages)

    def _add_run(self, stage: Stage, kind: str, record: int, run: list[ChunkOp], *, commits: bool) -> None:
        layout, residents = self._layout, self._residents
        parts = _parts(run, self._parts_max)
        if kind == "defer":
            stage.defers[record] = sum(op.written_bytes(layout, residents) for op in run)
            return
        load = None
        if kind in {"load", "apply"}:
            weights = [(index, self._weight_bytes(part)) for index, part in enumerate(parts)]
            load = Load(
                begun=stage.step,
                record=record,
                pending=deque(weights),
                kind=self.kind_of(record),
                needs=[self._scheduled.get((record, index), 0) for index in range(len(parts))],
                applies=kind == "apply",
                missing=len(parts),
            )
            stage.loads.append(load)
            self.loads[load.kind].append(load)
        if kind in {"update", "apply"}:
            step = stage.step - (kind == "apply")
            if kind == "update":
                stage.updates.append(record)
            for index, part in enumerate(parts):
                read: float = sum(op.read_bytes(layout, residents) for op in part)
                written = sum(
                    op.written_bytes(layout, residents, commits=self.commits.get(step, commits))
                    for op in part
                )
                if load is not None:
                    read -= self._weight_bytes(part)
                key = (record, index)
                parameters = sum(op.chunk.parameters for op in part)
                needs = self._scheduled.get(key, 0)
                self._scheduled[key] = needs + 1
                self.left[step] += 1
                applies = load is not None
                # What stays is updated in place; what is applied goes to compute, and is written from elsewhere.
                has_slot = (
                    record not in residents.records
                    or any(op.chunk.index not in residents.chunks for op in part)
                    or (applies and self.commits.get(step, commits))
                )
                self.updates.append(
                    Update(
                        begun=stage.step,
                        step=step,
                        record=record,
                        part=index,
                        parameters=parameters,
                        read=read,
                        written=written,
                        needs=needs,
                        applies=applies,
                        load=load,
                        has_slot=has_slot,
                    )
                )

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

    def _weight_bytes(self, part: Sequence[ChunkOp]) -> float:
        """Bytes read for the weights of some chunks; 0 where they stay in RAM."""
        if part[0].chunk.record in self._residents.records:
            return 0.0
        return sum(self._layout.weight_extent_bytes(op.chunk) for op in part)

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


def _parts(run: Sequence[ChunkOp], most: int) -> list[list[ChunkOp]]:
    """Cut the chunks of a record into at most ``most`` parts, which are played one by one."""
    count = min(most, len(run))
    borders = [len(run) * index // count for index in range(count + 1)]
    return [list(run[start:stage]) for start, stage in pairwise(borders)]
