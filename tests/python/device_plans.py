"""Divisions of a device's memory for the reference's tiny models, down to the least that training runs with."""

from dataclasses import replace

from megatrain_io.checkpoint import input_nbytes
from megatrain_io.layout import ModelLayout
from megatrain_io.stream import model_parts
from megatrain_io.vram import device_pool, divide_vram
from paged import FORMATS, cut_model

LEAST = {"block_weights": 1, "block_gradients": 1, "slots": 2}
GATHERED = LEAST | {"block_gradients": None}


def plan(case, *, vram=1 << 40, slots=None, chunk_parameters=None, **buffers):
    """A division by which the inputs of all but ``slots`` blocks go on to RAM, with other buffers if they are named."""
    cut = cut_model(case)
    layout = ModelLayout.build(model_parts(cut), len(cut.blocks), FORMATS[case.dtype], chunk_parameters)
    per_block = per_block_nbytes(case)
    made = divide_vram(
        layout,
        borrows_prologue=bool(cut.epilogue_borrowed),
        vram=vram,
        context=0,
        activations=0,
        inputs_per_block=per_block,
    )
    pool = made.pool
    if buffers:
        borrows = bool(cut.epilogue_borrowed)
        pool = device_pool(layout, borrows_prologue=borrows, training=True, **buffers)
    inputs = made.saved_inputs if slots is None else slots * per_block
    return replace(made, pool=pool, saved_inputs=inputs)


def per_block_nbytes(case):
    """Bytes of the inputs of one block in the largest step."""
    width = case.config.hidden_size * case.dtype.itemsize
    return max(input_nbytes([batch["input_ids"].numel() * width for batch in step]) for step in case.steps)
