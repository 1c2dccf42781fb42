"""The job: a run with everything settled that its configuration leaves open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatrain_io.data.batch import MicroBatch, blank_micro_batch
from megatrain_io.machine.hardware import Hardware
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.planning.memory_needs import step_needs
from megatrain_io.planning.ram_budget import StepNeeds
from megatrain_io.planning.timeline import StageKey
from megatrain_io.store.layout import ModelLayout, Precision

__all__ = ["TrainingJob"]


@dataclass(frozen=True)
class TrainingJob:
    """A run with everything settled that its configuration leaves open; ``planning.resolve`` makes it.

    Planning and training hold the job. What lies below takes its parts, never the job itself.

    Attributes:
        hardware: the machine that the run is for.
        precision: compute dtype.
        partition: the model without its parameters.
        layout: of the store, which need not be there.
        micro_batch: the largest of the run.
        accumulation: micro-batches of a step.
        max_length: tokens that a row may have.
        max_grad_norm: norm that gradients are clipped to; None = never.
        commit_every: steps between two commits.
        max_tbw: terabytes (10^12 bytes) that the run may write; None = no limit.
        ram: bytes of RAM that training may take.
        vram: bytes of a device's memory that training may take; None where the CPU computes.
        is_vram_asked: whether ``vram`` is what the person allowed, and not what the device has.
        needs: what a step needs besides pool and residents.
        seconds: measured seconds of each stage of one micro-batch; None where they follow from FLOPs.
        steps: optimizer steps of the run; None where their number is not known.
        is_made: whether the store is there already.
    """

    hardware: Hardware
    precision: Precision
    partition: PartitionedModel
    layout: ModelLayout
    micro_batch: MicroBatch
    accumulation: int
    max_length: int
    ram: int
    needs: StepNeeds
    max_grad_norm: float | None = None
    commit_every: int = 1
    max_tbw: float | None = None
    vram: int | None = None
    is_vram_asked: bool = False
    seconds: Mapping[StageKey, float] | None = None
    steps: int | None = None
    is_made: bool = False

    @property
    def micro_batches(self) -> Sequence[MicroBatch]:
        """Those of the largest step."""
        return [self.micro_batch] * self.accumulation

    @property
    def tokens(self) -> int:
        """Tokens that go through the model in a step, padding included."""
        return self.accumulation * self.micro_batch.input_ids.numel()

    @property
    def defers(self) -> bool:
        """Whether gradients wait until the norm over all of them is known (``train.max_grad_norm``)."""
        return self.max_grad_norm is not None

    @property
    def commits_at_once(self) -> bool:
        """Whether every step is committed: only then may a step update before its norm is known."""
        return self.commit_every == 1 and self.layout.durability == "step"

    @property
    def steps_to_a_commit(self) -> int:
        """Steps from one commit to the next, as they are trained: a scratch store's commits cost nothing."""
        return 1 if self.layout.durability == "scratch" else self.commit_every

    def with_accumulation(self, count: int) -> "TrainingJob":
        """The same job with ``count`` micro-batches a step."""
        return self._with_step(self.micro_batch, count)

    def with_rows(self, batch: int, length: int, tokens: int) -> "TrainingJob":
        """The same job with ``tokens`` a step or a few more: micro-batches of ``batch`` rows of ``length`` tokens."""
        packed = self.micro_batch.position_ids is not None
        rows = blank_micro_batch(batch, length, packed=packed)
        smaller = self._with_step(rows, max(1, -(-tokens // (batch * length))))
        return replace(smaller, max_length=length)

    def of_store(self, tables: int) -> "TrainingJob":
        """The same job, now that its store is open and takes ``tables`` bytes of RAM."""
        return replace(self, is_made=True, needs=replace(self.needs, tables=tables))

    def _with_step(self, micro_batch: MicroBatch, count: int) -> "TrainingJob":
        if micro_batch is self.micro_batch and count == self.accumulation:
            return self
        needs = step_needs(self.partition, self.layout, [micro_batch] * count, self.needs.tables)
        return replace(self, micro_batch=micro_batch, accumulation=count, needs=needs)
