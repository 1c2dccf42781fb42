"""What training a model needs, and how a budget of RAM is divided for it: known before anything is read or written."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatrain_io.data.batch import MicroBatch
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.activations import ActivationBudget, activation_nbytes, least_activations
from megatrain_io.paging.device.pool import CONTEXT_NBYTES, VramPlan, gathered_chunks, slot_nbytes
from megatrain_io.paging.step import LOGITS_BYTES, hidden_nbytes, slice_tokens
from megatrain_io.planning.dry_run import dry_run
from megatrain_io.planning.ram_budget import RamPlan, StepNeeds, divide_ram
from megatrain_io.planning.vram_budget import divide_vram, least_vram
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.schedule import build_schedule

__all__ = ["activation_budget_of", "gathered_nbytes", "least_vram_for", "plan_ram", "plan_vram", "step_needs"]

# Of the table that the pipeline has of chunks, where it moves them one by one: the most, a chunk.
_BY_CHUNK_TABLES = 96
# Of cuBLAS and its like.
_WORKSPACES = 64 << 20


def step_needs(
    partition: PartitionedModel, layout: ModelLayout, micro_batches: Sequence[MicroBatch], tables: int
) -> StepNeeds:
    """What a training step on ``micro_batches`` needs besides pool and residents; ``tables`` bytes are the store's."""
    per_block = activation_nbytes(hidden_nbytes(partition, layout, micro_batches))
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
    """Divide ``vram`` bytes for steps that need ``needs``; and what RAM is left to hold.

    Raises:
        DoesNotFitError: it is too small; says what would do.
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
    """The least VRAM that steps which need ``needs`` can be done in."""
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
    found = 0
    for number, record in enumerate(layout.records):
        for place in record.tensors:
            count = slices if number == layout.head else len(shapes)
            if place.name in partition.tied_parameters:
                count += slices
            found += 4 * place.elements * (2 * count - 1)
    return found


def _compute_nbytes(needs: StepNeeds) -> int:
    """What torch's allocator takes for compute: tensors, what lies between them, and workspaces of the libraries."""
    return needs.compute + needs.compute // 16 + _WORKSPACES


def plan_ram(
    partition: PartitionedModel, layout: ModelLayout, needs: StepNeeds, *, ram: int, defers: bool = False
) -> RamPlan:
    """Divide ``ram`` bytes for steps that need ``needs``.

    Raises:
        DoesNotFitError: it is too small; says what would do.
    """
    tied = bool(partition.tied_parameters)
    schedule = build_schedule(layout, tied_embeddings=tied, training=True)
    return divide_ram(layout, schedule, needs, tied_embeddings=tied, ram=ram, defers=defers)


def activation_budget_of(plan: RamPlan, scratch: Sequence[Path]) -> ActivationBudget:
    """The part of activations in a plan; ``scratch`` is the file for what does not fit, one for each drive."""
    return ActivationBudget(plan.activations if plan.is_spilled else None, scratch)
