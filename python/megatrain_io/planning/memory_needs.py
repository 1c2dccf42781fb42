"""What a step of a model needs, and how RAM and VRAM are divided for it, before anything is read or written."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatrain_io.data.batch import MicroBatch
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.activations import ActivationBudget, activation_nbytes, least_activations
from megatrain_io.paging.device.pool import CONTEXT_NBYTES, VramPlan, gathered_chunks, slot_nbytes
from megatrain_io.paging.device.vram_budget import divide_vram, least_vram
from megatrain_io.paging.step import LOGITS_BYTES, hidden_nbytes, slice_tokens
from megatrain_io.planning.dry_run import dry_run
from megatrain_io.planning.ram_budget import RamPlan, StepNeeds, divide_ram
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.schedule import build_schedule

__all__ = ["activation_budget_of", "gathered_nbytes", "least_vram_for", "plan_ram", "plan_vram", "step_needs"]

# Most bytes a chunk of the table that the pipeline has of chunks, where it moves them one by one.
_BY_CHUNK_TABLES = 96
# Workspaces of cuBLAS and its like.
_WORKSPACES = 64 << 20


def step_needs(
    partition: PartitionedModel, layout: ModelLayout, micro_batches: Sequence[MicroBatch], tables: int
) -> StepNeeds:
    """What a training step needs besides pool and residents, in bytes.

    Args:
        partition: the model without its parameters.
        layout: of its store.
        micro_batches: of the step.
        tables: bytes of RAM that the open store takes for its tables.
    """
    per_block = activation_nbytes(hidden_nbytes(partition, micro_batches))
    compute = dry_run(partition, layout, micro_batches, slice_tokens=slice_tokens(partition, LOGITS_BYTES))
    return StepNeeds(
        tables=tables,
        compute=compute or 0,
        activations=layout.blocks * per_block,
        activations_least=least_activations(layout.blocks, per_block),
        activations_per_block=per_block,
        is_known=compute is not None,
    )


def plan_vram(
    partition: PartitionedModel, layout: ModelLayout, needs: StepNeeds, *, vram: int
) -> tuple[VramPlan, StepNeeds]:
    """Divide the memory of a device for steps that need ``needs``.

    Args:
        partition: the model without its parameters.
        layout: of its store.
        needs: what a step needs, by ``step_needs``.
        vram: bytes of the device's memory that may be taken.

    Returns:
        How it is divided, and what RAM must still hold.

    Raises:
        DoesNotFitError: ``vram`` is too small; the message has the least that is enough.
    """
    per_block, tied = needs.activations_per_block, bool(partition.tied_parameters)
    plan = divide_vram(
        layout,
        tied_embeddings=tied,
        vram=vram,
        context=CONTEXT_NBYTES,
        compute=_compute_nbytes(needs),
        activations_per_block=per_block,
    )
    slot = slot_nbytes(per_block)
    left = needs.activations - (plan.activations // slot * per_block if slot else 0)
    return plan, replace(
        needs,
        tables=needs.tables + _BY_CHUNK_TABLES * len(layout.chunks),
        compute=0,
        activations=left,
        activations_least=least_activations(left // per_block if per_block else 0, per_block),
        unit="chunk",
        gathered=gathered_chunks(layout, tied_embeddings=tied) if plan.pool.gathers else 0,
    )


def least_vram_for(partition: PartitionedModel, layout: ModelLayout, needs: StepNeeds) -> int:
    """The least bytes of VRAM that steps which need ``needs`` can be done in."""
    return least_vram(
        layout,
        tied_embeddings=bool(partition.tied_parameters),
        context=CONTEXT_NBYTES,
        compute=_compute_nbytes(needs),
        activations_per_block=needs.activations_per_block,
    )


def gathered_nbytes(
    partition: PartitionedModel, layout: ModelLayout, micro_batches: Sequence[MicroBatch]
) -> int:
    """Bytes to and from a device in a step whose gradients gather in RAM.

    For each native gradient a sum comes in and goes out, and for the first one of a step it only goes out. Blocks and
    embeddings have one a micro-batch, the head one a slice of tokens.
    """
    tokens = slice_tokens(partition, LOGITS_BYTES)
    shapes = [batch.input_ids.shape for batch in micro_batches]
    slices = sum(-(-length // max(1, tokens // rows)) for rows, length in shapes)
    moved = 0
    for number, record in enumerate(layout.records):
        for place in record.tensors if record.is_trained else ():
            count = slices if layout.stop_of[number] == layout.head else len(shapes)
            if place.name in partition.tied_parameters:
                count += slices
            moved += 4 * place.elements * (2 * count - 1)
    return moved


def _compute_nbytes(needs: StepNeeds) -> int:
    """Bytes that torch's allocator takes for compute: tensors, the gaps between them, and workspaces of libraries."""
    return needs.compute + needs.compute // 16 + _WORKSPACES


def plan_ram(
    partition: PartitionedModel, layout: ModelLayout, needs: StepNeeds, *, ram: int, defers: bool = False
) -> RamPlan:
    """Divide RAM for steps that need ``needs``.

    Args:
        partition: the model without its parameters.
        layout: of its store.
        needs: what a step needs, by ``step_needs``, or what ``plan_vram`` left of it.
        ram: bytes of RAM that may be taken.
        defers: whether gradients wait until the norm over all of them is known.

    Raises:
        DoesNotFitError: ``ram`` is too small; the message has the least that is enough.
    """
    tied = bool(partition.tied_parameters)
    schedule = build_schedule(layout, tied_embeddings=tied, training=True)
    return divide_ram(layout, schedule, needs, tied_embeddings=tied, ram=ram, defers=defers)


def activation_budget_of(plan: RamPlan, scratch: Sequence[Path]) -> ActivationBudget:
    """How much RAM the activation checkpoints may take by a plan, and where the rest goes.

    Args:
        plan: how RAM is divided.
        scratch: paths of the file for what does not fit in RAM, one for each drive.
    """
    return ActivationBudget(plan.activations if plan.is_spilled else None, scratch)
