"""The memory of steps whose size is known only when they come: what they need, and how RAM and VRAM are divided."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

from megatrain_io.data.batch import MicroBatch, blank_micro_batch
from megatrain_io.errors import DoesNotFitError
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.device.pool import VramPlan
from megatrain_io.planning.memory_needs import least_vram_for, plan_vram, step_needs
from megatrain_io.planning.ram_budget import RamPlan, StepNeeds, divide_ram, least_ram
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.schedule import build_schedule
from megatrain_io.text import mib

__all__ = ["StepSize"]


@dataclass(frozen=True)
class StepSize:
    """What a step's memory depends on.

    Attributes:
        tokens: of all micro-batches together, padding included.
        largest: tokens of the largest micro-batch.
        length: tokens of the longest row.
        has_positions: whether micro-batches have position ids.
        has_mask: whether micro-batches have an attention mask.
    """

    tokens: int
    largest: int
    length: int
    has_positions: bool
    has_mask: bool

    @classmethod
    def of(cls, batches: Sequence[MicroBatch]) -> "StepSize":
        """Size of a step with these micro-batches."""
        shapes = [batch.input_ids.shape for batch in batches]
        return cls(
            tokens=sum(map(math.prod, shapes)),
            largest=max(map(math.prod, shapes)),
            length=max(length for _, length in shapes),
            has_positions=any(batch.position_ids is not None for batch in batches),
            has_mask=any(batch.attention_mask is not None for batch in batches),
        )

    @classmethod
    def of_largest(cls, batches: Sequence[MicroBatch]) -> "StepSize":
        """Size of a step with the largest of these micro-batches alone."""
        size = cls.of(batches)
        return replace(size, tokens=size.largest)

    def times(self, count: int) -> "StepSize":
        """Size of so many steps in one."""
        return replace(self, tokens=count * self.tokens)

    def covers(self, other: "StepSize") -> bool:
        """Whether memory for this one is enough for the other."""
        return self.with_room_for(other) == self

    def with_room_for(self, other: "StepSize") -> "StepSize":
        """A size that covers both."""
        return StepSize(*map(max, astuple(self), astuple(other)))

    def needs(self, partition: PartitionedModel, layout: ModelLayout, tables: int) -> StepNeeds:
        """What a step of this size needs, in bytes.

        Args:
            partition: the model without its parameters.
            layout: of its store.
            tables: bytes of RAM that the open store takes.
        """
        return step_needs(partition, layout, self._micro_batches(packs=partition.spec.packs), tables)

    def divide(
        self,
        partition: PartitionedModel,
        layout: ModelLayout,
        needs: StepNeeds,
        *,
        ram: int,
        device: Device,
        defers: bool,
    ) -> tuple[RamPlan, VramPlan | None]:
        """Divide RAM and the device's memory for steps of this size.

        Args:
            partition: the model without its parameters.
            layout: of its store.
            needs: what such a step needs, by ``needs``.
            ram: bytes of RAM that may be taken.
            device: what computes.
            defers: whether gradients wait until the norm over all of them is known.

        Raises:
            DoesNotFitError: one is too small; the message has the least that is enough.
        """
        vram: VramPlan | None = None
        if device.has_own_memory:
            try:
                vram, needs = plan_vram(partition, layout, needs, vram=device.vram)
            except DoesNotFitError as error:
                least = least_vram_for(partition, layout, needs)
                raise DoesNotFitError(
                    f"{device.name} has {mib(device.vram)} for this, and a step of {self} needs {mib(least)} at least: "
                    "make a step smaller, or use a GPU with more memory"
                ) from error
        tied = bool(partition.tied_parameters)
        schedule = build_schedule(layout, tied_embeddings=tied, training=True)
        try:
            return divide_ram(layout, schedule, needs, tied_embeddings=tied, ram=ram, defers=defers), vram
        except DoesNotFitError as error:
            least = least_ram(layout, needs, tied_embeddings=tied, defers=defers)
            refusal = DoesNotFitError(
                f"ram is {mib(ram)}, and a step of {self} needs {mib(least)} at least: give more, or make a step "
                "smaller (fewer rows or tokens in a micro-batch, then fewer micro-batches)"
            )
            refusal.least = least
            raise refusal from error

    def _micro_batches(self, *, packs: bool) -> list[MicroBatch]:
        """Micro-batches that take as much memory, all of them the same one.

        Args:
            packs: whether position ids that restart keep documents apart: then they do.
        """
        rows, length = -(-self.largest // self.length), self.length
        batch = blank_micro_batch(rows, length, packed=packs and self.has_positions)
        shape = batch.input_ids.shape
        positions = batch.position_ids
        if self.has_positions and positions is None:
            positions = torch.arange(shape[1]).expand(shape)
        mask = torch.ones_like(batch.input_ids) if self.has_mask else None
        if mask is not None:
            mask[0, -1] = 0
        batch = MicroBatch(batch.input_ids, batch.shift_labels, positions, mask)
        return [batch] * -(-self.tokens // shape.numel())

    def __str__(self) -> str:
        rows = -(-self.largest // self.length)
        count = -(-self.tokens // (rows * self.length))
        extras = [
            *(["position ids"] if self.has_positions else []),
            *(["an attention mask"] if self.has_mask else []),
        ]
        text = f"{count} micro-batches with {rows} rows of {self.length} tokens"
        return f"{text} ({' and '.join(extras)})" if extras else text
