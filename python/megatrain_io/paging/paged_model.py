"""Training steps and losses of a model that passes through RAM block by block.

Layer-major: each block meets all micro-batches of the step before the next block is needed, so the bytes
moved do not depend on the number of micro-batches.
"""

import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import (
    MegatrainIoError,
    NotFiniteError,
    TrainingDivergedError,
    UnsupportedModelError,
)
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.activations import ActivationBudget, SavedActivations
from megatrain_io.paging.clipping import Speculation, clip_coefficient
from megatrain_io.paging.device.activations import DeviceActivations
from megatrain_io.paging.device.base import Device, out_of_memory
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.device.pool import VramPlan, device_pool, gathered_chunks
from megatrain_io.paging.device.records import DeviceRecords, TransferPlan, transfer_plan_of
from megatrain_io.paging.ranks import OneRank, Ranks
from megatrain_io.paging.step import LOGITS_BYTES, Step, hidden_nbytes, slice_tokens
from megatrain_io.paging.tensor_meter import TensorMeter
from megatrain_io.paging.trace import Trace
from megatrain_io.store.paged_store import AdamWStep, CheckedSchedule, Engine, PagedStore
from megatrain_io.store.pool import PoolSizes, Unit, pool_sizes
from megatrain_io.store.schedule import ChunkOp, Residents, UpdatePolicy, build_schedule, flush_schedule

__all__ = ["PagedPartition", "StepLoss", "clear_frames"]

# Hyperparameters of a step that updates nothing with gradients of its own.
_NO_UPDATE = AdamWStep(1, 0.0)
# Schedules that are kept: a run that updates all records needs four or five.
_SCHEDULES = 8

_Key = tuple[frozenset[int] | None, UpdatePolicy, frozenset[int]]
"""Records that wait for their update, what becomes of a step's gradients, and the records that it updates."""


@dataclass(frozen=True)
class _Prepared:
    """A schedule that was checked, and what it moves to a device, if there is one."""

    checked: CheckedSchedule
    transfer_plan: TransferPlan


@dataclass(frozen=True)
class StepLoss:
    """The loss of a step, and the norm of its gradients.

    Attributes:
        loss: mean over the trained tokens of all micro-batches (a float that is exact as fp32).
        trained_tokens: number of tokens with a label.
        grad_norm: norm over the gradients of all parameters, before clipping; None where none were made.
        clip_coefficient: what the gradients were multiplied by (exact as fp32); 1 where they were not clipped.
    """

    loss: float
    trained_tokens: int
    grad_norm: float | None = None
    clip_coefficient: float = 1.0


@dataclass
class _UnderWay:
    """A training step between its begin and its end."""

    step: Step
    adamw: AdamWStep
    number: int
    policy: UpdatePolicy
    commits: bool
    updates: frozenset[int]
    loss: float = 0.0
    result: StepLoss | None = None


def clear_frames(error: BaseException | None) -> None:
    """Drop the locals of all frames that an error has left, and those that led to it."""
    cleared: set[int] = set()
    waiting = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and id(found) not in cleared:
            cleared.add(id(found))
            traceback.clear_frames(found.__traceback__)
            waiting += [found.__cause__, found.__context__]


class PagedPartition:
    """A partitioned model over a paged store: training steps and losses.

    Args:
        partition: the model without its parameters.
        state: the store that holds them.
        seed: of all random numbers of training (dropout).
        logits_bytes: bound on the fp32 logits of one slice of tokens. A micro-batch within it is one
            slice, and then every bit is that of stock training.
        activations: RAM for the activation checkpoints, and the file for what is beyond it; None = all in RAM.
        max_grad_norm: gradients with a larger norm over all parameters are scaled down to it; None = never.
        policy: what a step does with its gradients where there is a limit: they are "deferred" until their norm is
            known and the next step applies them, or "speculative": it updates at once, and takes that back if the
            norm is too large.
            None = what promises to be faster. No bit depends on it.
        device: what computes; None = the CPU.
        vram: how its memory is divided, if it has any; None = as much as overlaps best, and all activation checkpoints.
        ranks: processes that train the model together; None = this one alone.
    """

    def __init__(  # noqa: PLR0913 - each with a meaning of its own
        self,
        partition: PartitionedModel,
        state: PagedStore,
        *,
        seed: int = 0,
        logits_bytes: int = LOGITS_BYTES,
        activations: ActivationBudget | None = None,
        max_grad_norm: float | None = None,
        policy: Literal["deferred", "speculative"] | None = None,
        device: Device | None = None,
        vram: VramPlan | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or OneRank()
        self.partition = partition
        self.state = state
        self.seed = seed
        self.tied_embeddings = bool(partition.tied_parameters)
        self.device = device or Cpu()
        engine: Engine = "uring" if state.engine[0] == "uring" else "threads"
        saved = SavedActivations(state.ledger, activations, engine)
        self.saved: SavedActivations | DeviceActivations = saved
        self._on_device: DeviceRecords | None = None
        self._gathered = 0
        if self.device.has_own_memory:
            partition.to(self.device.torch_device)
            layout, tied = state.layout, self.tied_embeddings
            pool = vram.pool if vram else device_pool(layout, tied_embeddings=tied, training=True)
            self._on_device = DeviceRecords(state, self.device, pool)
            if pool.gathers:
                self._gathered = gathered_chunks(layout, tied_embeddings=tied)
            self.saved = DeviceActivations(
                saved, self.device, self._on_device, vram.activations if vram else None
            )
        self._trace: Trace | None = None
        self.slice_tokens = slice_tokens(partition, logits_bytes)
        tied = self.tied_embeddings
        self.training_schedule = build_schedule(state.layout, tied_embeddings=tied, training=True)
        self.forward_schedule = build_schedule(state.layout, tied_embeddings=tied, training=False)
        self.max_grad_norm = max_grad_norm
        self._speculation = Speculation()
        self._policy = policy
        self._schedules: dict[_Key, _Prepared] = {}
        self._waiting: frozenset[int] | None = None
        self._in_ram: frozenset[int] = frozenset()
        self._was_committed = True
        self._under_way: _UnderWay | None = None
        self._metered_size = (False, 0, 0)
        self.compute_nbytes = 0
        """Bytes of tensors that the largest step so far needed at once, wherever it computes."""
        self._forward = self._prepared(self.forward_schedule)

    @property
    def unit(self) -> Unit:
        """What a buffer holds: a chunk on its way to a device with memory of its own, else a record."""
        return "record" if self._on_device is None else "chunk"

    def pool_sizes(
        self,
        *,
        training: bool,
        residents: Residents = Residents(),  # noqa: B008 - it never changes
        block_buffers: int = 3,
        chunk_slots: int = 4,
        block_gradients: int = 2,
    ) -> PoolSizes:
        """Sizes and numbers of buffers of a pool for this model; see ``store.pool.pool_sizes``."""
        return pool_sizes(
            self.state.layout,
            tied_embeddings=self.tied_embeddings,
            training=training,
            residents=residents,
            defers=training and self.max_grad_norm is not None,
            unit=self.unit,
            block_buffers=block_buffers,
            chunk_slots=chunk_slots,
            block_gradients=block_gradients,
            gathered=self._gathered,
        )

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        adamw: AdamWStep,
        blob: Callable[[float], bytes] | None,
        *,
        number: int | None = None,
        updated: Collection[int] | None = None,
    ) -> StepLoss:
        """Make one optimizer step. With ``blob`` it is committed while the next step begins.

        With ``max_grad_norm`` its update may be made by the next step, or by ``flush``.

        Args:
            micro_batches: each goes through the model as a whole; at least one token must be trained.
            adamw: hyperparameters of the update.
            blob: makes the trainer's state after this step from the step's loss; None = the step becomes
                durable with the next commit.
            number: of the step, from which random numbers follow; None = that of ``adamw``.
            updated: records that this step updates; None = all that are trained.

        Raises:
            TrainingDivergedError: the loss is not finite. Nothing of the step remains.
            NotFiniteError: a gradient is not finite. Nothing remains of what was not committed.
            ConfigError, NoSpaceError: the inputs of its blocks do not fit the RAM that they may take, or the drive.
                Nothing was begun.
            CorruptionError: an input came back from the drive with other bytes. Nothing of the step remains.
        """
        number, commits = adamw.step if number is None else number, blob is not None
        with self.training_step(micro_batches, adamw, number=number, commits=commits, updated=updated):
            loss = self.forward()
            self.backward()
            return self.end_step(None if blob is None else blob(loss))

    @contextmanager
    def training_step(
        self,
        micro_batches: Sequence[MicroBatch],
        adamw: AdamWStep,
        *,
        number: int,
        commits: bool,
        updated: Collection[int] | None = None,
    ) -> Iterator[None]:
        """Begin an optimizer step for the context; in it ``forward``, ``backward`` and ``end_step``, once each.

        An error inside goes back to the last commit. The arguments are those of ``train_step``.

        Args:
            micro_batches: each goes through the model as a whole; at least one token must be trained.
            adamw: hyperparameters of the update.
            number: of the step, from which random numbers follow.
            commits: whether ``end_step`` will get a blob.
            updated: records that this step updates, by index; None = all that are trained. The others stay as they are,
                their t of AdamW, too, and of them weights alone are read.

        Raises:
            MegatrainIoError: there is nothing to update; a record is not trained; the store has one t for all
                records, and some are left out. Nothing was begun.
        """
        layout = self.state.layout
        if layout.is_frozen:
            raise MegatrainIoError("all weights of this store are frozen: there is nothing to update")
        chosen = self._chosen(updated)
        carried = self._in_ram - chosen if commits else frozenset()
        self.partition.train()
        micro_batches = self.ranks.share(micro_batches)
        self.saved.reserve(layout.blocks, hidden_nbytes(self.partition, micro_batches))
        policy = self._choose_policy(commits=commits)
        schedule = self._schedule(policy, chosen | carried)
        with self._step(
            micro_batches, schedule, adamw, number, commits=commits, updated=chosen, carried=carried
        ) as step:
            self._under_way = _UnderWay(step, adamw, number, policy, commits, chosen | carried)
            try:
                yield
            finally:
                self._under_way = None

    def forward(self) -> float:
        """Compute the loss of the step that was begun; the head's gradients with it.

        Raises:
            TrainingDivergedError: it is not finite. Nothing was written of the step.
        """
        begun = self._begun_step()
        begun.step.embedding()
        begun.step.forward(saving=True)
        loss = begun.step.head(training=True)
        self._wait_for_compute()
        begun.loss = loss.item()
        if not loss.isfinite():
            # Before anything is updated: nothing was written of this step.
            raise TrainingDivergedError(
                f"the loss of step {begun.number} is {begun.loss}. The step was dropped; the last committed step "
                f"stands. Lower the learning rate (it was {begun.adamw.learning_rate:g}) or look at the data of this "
                "step"
            )
        return begun.loss

    def backward(self) -> StepLoss:
        """Make all other gradients of the step, and hand them over for the update.

        Raises:
            NotFiniteError: a gradient is not finite.
        """
        begun = self._begun_step()
        try:
            begun.step.leave_head()
            begun.step.backward()
            begun.step.embedding_backward()
            if self._on_device is not None:
                self._on_device.finish()
            norm = self.ranks.norm(self.state.gradient_norm())
        except NotFiniteError as error:
            error.loss = begun.loss
            raise
        coefficient = 1.0 if self.max_grad_norm is None else clip_coefficient(norm, self.max_grad_norm)
        begun.result = StepLoss(begun.loss, begun.step.num_items, norm, coefficient)
        return begun.result

    def end_step(self, blob: bytes | None) -> StepLoss:
        """End the step after ``backward``; with a blob it is committed while the next one begins."""
        begun = self._begun_step()
        made = begun.result
        if made is None:
            raise MegatrainIoError("the step has no gradients yet: backward comes before its end")
        coefficient = made.clip_coefficient
        stands = begun.policy == "immediate" or (begun.policy == "speculative" and coefficient == 1.0)
        self.state.end(blob, None if stands else coefficient)
        self._waiting, self._was_committed = None if stands else begun.updates, begun.commits
        self._in_ram = frozenset() if begun.commits else self._in_ram | self._kept_of(begun.updates)
        self._speculation.learn(is_clipped=coefficient < 1.0)
        return made

    def _begun_step(self) -> "_UnderWay":
        if self._under_way is None:
            raise MegatrainIoError("no training step was begun")
        return self._under_way

    def pass_gradients(
        self, micro_batches: Sequence[MicroBatch], *, number: int = 1
    ) -> tuple[StepLoss, list[Tensor]]:
        """Pass forward and backward through frozen weights: nothing of the store changes.

        Args:
            micro_batches: each goes through the model as a whole.
            number: of the step, from which random numbers follow.

        Returns:
            The loss, and its gradient [B, T, H] with respect to the first hidden state of each micro-batch, in the
            dtype and on the device that compute.

        Raises:
            MegatrainIoError: the weights are not frozen.
            ConfigError, NoSpaceError, CorruptionError: as ``train_step``.
        """
        layout = self.state.layout
        if self.partition.spec.sides.arguments:
            raise UnsupportedModelError(
                f"{self.partition.spec.model_type}: its embedding hands blocks more than the first hidden state, "
                "and the gradient of that would be lost: take a model of another architecture for passes through "
                "frozen weights"
            )
        if not layout.is_frozen:
            raise MegatrainIoError(
                "weights of this store are trained: a step of it makes their gradients, too"
            )
        self.partition.train()
        micro_batches = self.ranks.share(micro_batches)
        self.saved.reserve(layout.blocks, hidden_nbytes(self.partition, micro_batches))
        schedule = self._schedule("immediate", frozenset())
        with self._step(micro_batches, schedule, _NO_UPDATE, number, commits=False) as step:
            step.embedding()
            step.forward(saving=True)
            loss = step.head(training=True)
            step.leave_head()
            step.backward()
            self._wait_for_compute()
            self.state.end(None)
            gradients = step.first_gradients()
        return StepLoss(loss.item(), step.num_items), gradients

    def flush(self) -> None:
        """Make the update of the last step, if its gradients still wait."""
        waiting = self._waiting
        if waiting is None:
            return
        layout = self.state.layout
        # Nothing is computed: no device sees it.
        schedule = _Prepared(self._checked(flush_schedule(layout, waiting)), transfer_plan_of(()))
        with self._begun(schedule, _NO_UPDATE, commits=False), self.span("flush"):
            for record in sorted(waiting):
                if self._on_device is None:
                    self.state.weights(record).give_back()
                else:
                    self._on_device.pass_by(record)
            self.state.end(None)

    def wait_durable(self) -> None:
        """Make the update that still waits; wait until finished steps are written, and durable where they commit."""
        self.flush()
        self.state.wait_durable()

    def skip(self, blob: bytes) -> None:
        """Commit the trainer's state alone: nothing else changes."""
        self.flush()
        self.state.begin(self._checked(()), _NO_UPDATE, commits=True)
        self.state.end(blob)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> StepLoss:
        """Measure the loss alone, without dropout; nothing is written but an update that waits."""
        self.flush()
        self.partition.train(False)
        micro_batches = self.ranks.share(micro_batches)
        with self._step(micro_batches, self._forward, _NO_UPDATE, 1, commits=False) as step:
            step.embedding()
            step.forward(saving=False)
            loss = step.head(training=False)
            step.leave_head()
            self._wait_for_compute()
            self.state.end(None)
        return StepLoss(loss.item(), step.num_items)

    def begin_forward(self) -> PagedStore | DeviceRecords:
        """Begin a pass forward of the caller's own; weights come from what is returned, in the schedule's order."""
        self.state.begin(self._forward.checked, _NO_UPDATE)
        if self._on_device is None:
            return self.state
        self._on_device.begin(self._forward.transfer_plan)
        return self._on_device

    def end_forward(self) -> None:
        """End the pass forward, after all its weights were given back."""
        self._wait_for_compute()
        self.state.end(None)

    def abort(self) -> None:
        """Drop a step or a pass under way, and with it everything since the last commit."""
        try:
            if isinstance(self.saved, DeviceActivations):
                self.saved.abort()
            if self._on_device is not None:
                self._on_device.abort()
        finally:
            self.state.abort()

    def _choose_policy(self, *, commits: bool) -> UpdatePolicy:
        """What this step does with its gradients; it updates at once only if it can go back to a committed state."""
        if self.max_grad_norm is None:
            return "immediate"
        can_speculate = self._was_committed and commits and self.state.layout.durability == "step"
        wants = self._policy or ("speculative" if self._speculation.is_worth_it else "deferred")
        return wants if can_speculate else "deferred"

    def _wait_for_compute(self) -> None:
        """Wait until the device has computed all that is queued; copies go on meanwhile."""
        if self._on_device is not None:
            self._on_device.wait_for_compute()

    def _checked(self, schedule: Sequence[ChunkOp]) -> CheckedSchedule:
        return self.state.check(schedule, unit=self.unit)

    def _prepared(self, schedule: Sequence[ChunkOp]) -> _Prepared:
        return _Prepared(self._checked(schedule), transfer_plan_of(schedule))

    def _chosen(self, updated: Collection[int] | None) -> frozenset[int]:
        """The records that a step updates."""
        trained = frozenset(self.state.layout.trained)
        chosen = trained if updated is None else frozenset(updated)
        if not chosen:
            raise MegatrainIoError("the step updates no record: there is nothing to train")
        if others := sorted(chosen - trained):
            raise MegatrainIoError(
                f"the step is to update record {others[0]}, which is not trained; those that are: {sorted(trained)}"
            )
        return chosen

    def _kept_of(self, records: frozenset[int]) -> frozenset[int]:
        """Those of some records of which anything stays in RAM."""
        kept, layout = self.state.residents, self.state.layout
        has_planes = {chunk.record for chunk in layout.chunks if chunk.index in kept.chunks}
        return records & (kept.records | has_planes)

    def _schedule(self, policy: UpdatePolicy, updated: frozenset[int]) -> _Prepared:
        """The schedule of a training step, built and checked once for each of the last kinds of step."""
        key = (self._waiting, policy, updated)
        prepared = self._schedules.pop(key, None)
        if prepared is None:
            operations = build_schedule(
                self.state.layout,
                tied_embeddings=self.tied_embeddings,
                training=True,
                applies=self._waiting is not None,
                policy=policy,
                updated=updated,
                applied=self._waiting,
            )
            prepared = self._prepared(operations)
            if len(self._schedules) >= _SCHEDULES:
                # Those of large models take much RAM, and sets of records may come once only.
                del self._schedules[next(iter(self._schedules))]
        self._schedules[key] = prepared
        return prepared

    def trace_into(self, trace: Trace) -> None:
        """Note what runs when from now on, on the CPU, the drives and the device; ``flush_trace`` writes it.

        Args:
            trace: gets a span for each step, phase, block and micro-batch, too.
        """
        self._trace = trace
        self.state.record_events()
        self.record_device_events()

    def flush_trace(self) -> None:
        """Append what was noted since the last call to the trace, if there is one."""
        if self._trace is None:
            return
        self._trace.extend(*self.state.take_events())
        self._trace.extend(self.take_device_events(), 0)
        self._trace.flush()

    def record_device_events(self) -> None:
        """Note when copies and compute happen on the device from now on, for ``take_device_events``."""
        if self._on_device is not None:
            self._on_device.events.record()

    def take_device_events(self) -> list[tuple[str, str, int | None, int, int]]:
        """Lane, name, chunk, start and end (ns) of what has happened on the device since the last call."""
        return [] if self._on_device is None else self._on_device.events.take()

    def close(self) -> None:
        """Give back what activation checkpoints take in RAM and on the drive. The store stays open."""
        self.saved.close()

    def span(self, name: str) -> AbstractContextManager[None]:
        """Trace what is done inside the context, if there is a trace."""
        return nullcontext() if self._trace is None else self._trace.span(name)

    @contextmanager
    def _step(
        self,
        micro_batches: Sequence[MicroBatch],
        schedule: _Prepared,
        adamw: AdamWStep,
        number: int,
        *,
        commits: bool,
        updated: frozenset[int] | None = None,
        carried: frozenset[int] = frozenset(),
    ) -> Iterator[Step]:
        step = Step(
            self.partition,
            self._on_device or self.state,
            self.saved,
            self._moved(micro_batches),
            slice_tokens=self.slice_tokens,
            number=number,
            seed=self.seed,
            span=self.span,
            device=self.device,
            ranks=self.ranks,
            updated=updated,
            carried=carried,
        )
        trains = schedule is not self._forward
        name = f"step {number}" if trains else "evaluation"
        begun = self._begun(schedule, adamw, commits=commits)
        with (
            self.device.random_state(),
            begun,
            self._metered(micro_batches, trains=trains),
            self.device.computing(),
            self.span(name),
        ):
            yield step

    def _moved(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Copy micro-batches to the device that computes."""
        try:
            return [batch.to(self.device.torch_device) for batch in micro_batches]
        except RuntimeError as error:
            if (full := out_of_memory(self.device, error)) is not None:
                raise full from error
            raise

    @contextmanager
    def _begun(self, schedule: _Prepared, adamw: AdamWStep, *, commits: bool) -> Iterator[None]:
        """Begin a step of the store for the context; after an error inside, go back to the last commit."""
        is_refused = False
        try:
            try:
                self.state.begin(schedule.checked, adamw, commits=commits)
            except MegatrainIoError:
                is_refused = True  # nothing was begun: what waits goes on waiting
                raise
            if self._on_device is not None:
                self._on_device.begin(schedule.transfer_plan)
            self._waiting = None
            yield
        except BaseException as error:
            # Tensors in the frames of the failed step would keep their buffers from the next one.
            clear_frames(error)
            if is_refused:
                raise
            self._waiting, self._was_committed, self._in_ram = None, True, frozenset()
            try:
                self.abort()
            except (MegatrainIoError, RuntimeError) as refused:
                # The first error is the one to tell; this says what became of the state.
                error.add_note(str(refused))
            if (full := out_of_memory(self.device, error)) is not None:
                raise full from error
            raise

    @contextmanager
    def _metered(self, micro_batches: Sequence[MicroBatch], *, trains: bool) -> Iterator[None]:
        """Measure the memory that compute needs, if the step is larger than all before."""
        largest = max(batch.input_ids.numel() for batch in micro_batches)
        size = (trains, largest, sum(batch.input_ids.numel() for batch in micro_batches))
        if size <= self._metered_size:
            yield
            return
        with TensorMeter() as meter:
            yield
        self._metered_size = size
        self.compute_nbytes = max(self.compute_nbytes, meter.peak_nbytes)
        if self._on_device is None:
            self.state.ledger.set("compute", self.compute_nbytes)
