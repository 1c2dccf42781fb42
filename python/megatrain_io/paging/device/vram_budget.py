"""The memory of a device, divided before the run: buffers for weights, gradients, activation checkpoints. Pure."""

from megatrain_io.errors import DoesNotFitError
from megatrain_io.paging.device.pool import DevicePool, VramPlan, device_pool, slot_nbytes
from megatrain_io.store.layout import ModelLayout
from megatrain_io.text import whole_mib

__all__ = ["divide_vram", "least_vram"]

# Block buffers for weights and for gradients, from what overlaps best to what a step cannot do without.
_POOLS = ((2, 2), (2, 1), (1, 1), (2, 0), (1, 0), (2, None), (1, None))
_INPUT_SLOTS_MIN = 2


def _pools(layout: ModelLayout, *, tied_embeddings: bool, training: bool) -> list[DevicePool]:
    """The pools to choose from, the one that overlaps best first, the smallest last."""
    return [
        device_pool(
            layout,
            tied_embeddings=tied_embeddings,
            training=training,
            block_weights=block_weights,
            block_gradients=block_gradients,
        )
        for block_weights, block_gradients in _POOLS
        # The gradient of a tied table is there while those of all blocks come and go.
        if block_gradients != 0 or not tied_embeddings
    ]


def divide_vram(
    layout: ModelLayout,
    *,
    tied_embeddings: bool,
    vram: int,
    context: int,
    compute: int,
    activations_per_block: int,
    training: bool = True,
) -> VramPlan:
    """Divide ``vram`` bytes: as many buffers as overlap best, then activation checkpoints.

    Args:
        layout: of the store.
        tied_embeddings: whether the head needs the embedding's weights, too; see ``device_pool``.
        vram: bytes that may be taken.
        context: bytes that the driver and its libraries take.
        compute: bytes that compute needs at once.
        activations_per_block: bytes of the inputs of one block, all micro-batches.
        training: False: no activations are saved, and there are no gradients.

    Raises:
        DoesNotFitError: ``vram`` is too small; the message has the least that is enough.
    """
    slot = slot_nbytes(activations_per_block)
    inputs = layout.blocks * slot if training else 0
    least = min(layout.blocks, _INPUT_SLOTS_MIN) * slot if training else 0
    always = context + compute
    pools = _pools(layout, tied_embeddings=tied_embeddings, training=training)
    fits = [pool for pool in pools if always + pool.nbytes + least <= vram]
    if not fits:
        pool = pools[-1]
        raise DoesNotFitError(
            f"training may take {whole_mib(vram)} of VRAM, and needs "
            f"{whole_mib(always + least + pool.nbytes)} at least: weights of one block, embeddings and head, and "
            f"pieces of gradients {whole_mib(pool.nbytes)}, activations of two blocks {whole_mib(least)}, compute "
            f"{whole_mib(compute)}, driver and libraries {whole_mib(context)}. Give more, "
            "or make a step smaller: train.per_device_train_batch_size, data.max_length, "
            "train.gradient_accumulation_steps"
        )
    pool = fits[0]
    slots = layout.blocks
    if activations_per_block and training:
        slots = min(slots, (vram - always - pool.nbytes) // slot)
    return VramPlan(vram, context, compute, pool, slots * slot if training else 0, inputs)


def least_vram(
    layout: ModelLayout, *, tied_embeddings: bool, context: int, compute: int, activations_per_block: int
) -> int:
    """The least bytes of VRAM that a training step can be done in; the arguments are those of ``divide_vram``."""
    pool = _pools(layout, tied_embeddings=tied_embeddings, training=True)[-1]
    least = min(layout.blocks, _INPUT_SLOTS_MIN) * slot_nbytes(activations_per_block)
    return context + compute + pool.nbytes + least
