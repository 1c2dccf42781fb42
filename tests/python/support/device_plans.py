"""Divisions of a device's memory for the reference's tiny models, down to the least that training runs with."""

from dataclasses import replace

from megatrain_io.models.partition import model_parts
from megatrain_io.paging.activations import activation_nbytes
from megatrain_io.paging.device.pool import device_pool
from megatrain_io.paging.device.vram_budget import divide_vram
from megatrain_io.store.layout import ModelLayout
from paged import FORMATS, partitioned

LEAST = {"block_weights": 1, "block_gradients": 1, "slots": 2}
GATHERED = LEAST | {"block_gradients": None}


def plan(case, *, vram=1 << 40, slots=None, chunk_parameters=None, **buffers):
    """A division by which the inputs of all but ``slots`` blocks go on to RAM, with other buffers if they are named."""
    partition = partitioned(case)
    state_format = case.format_of or FORMATS[case.dtype]
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), state_format, chunk_parameters)
    per_block = per_block_nbytes(case)
    made = divide_vram(
        layout,
        tied_embeddings=bool(partition.tied_parameters),
        vram=vram,
        context=0,
        compute=0,
        activations_per_block=per_block,
    )
    pool = made.pool
    if buffers:
        tied = bool(partition.tied_parameters)
        pool = device_pool(layout, tied_embeddings=tied, training=True, **buffers)
    inputs = made.activations if slots is None else slots * per_block
    return replace(made, pool=pool, activations=inputs)


def per_block_nbytes(case):
    """Bytes of the inputs of one block in the largest step."""
    width = case.config.hidden_size * case.dtype.itemsize
    return max(
        activation_nbytes([batch["input_ids"].numel() * width for batch in step]) for step in case.steps
    )
