"""Gradients of a record: summed over micro-batches with the bits of a plain sum, and no copy of them in fp32."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatrain_io.paging.gradient import Gradient
from megatrain_io.paging.ranks import OneRank
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import BorrowedRecord

SHAPES = [(), (0, 3), (7,), (3, 5), (2_500_000,), (1_500, 1_000), (2, 3, 700_000)]


class State:
    """Lends one buffer."""

    def __init__(self, shape):
        self.layout = ModelLayout.build([("embedding", [("weight", shape)])], 0, "f32")
        self.total = torch.full(shape, float("nan"))

    def gradient(self, _record):
        borrowed = BorrowedRecord.__new__(BorrowedRecord)
        borrowed.tensors = {"weight": self.total}
        return borrowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_have_the_bits_of_the_whole(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    natives = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    if len(shape) > 1:
        # As the gradient of a matrix that is used transposed.
        natives[1] = natives[1].mT.contiguous().mT
    state = State(shape)
    gradient = Gradient(state, OneRank(), 0)
    for native in natives:
        gradient.add(["weight"], [native])
    expected = natives[0].float() + natives[1].float() + natives[2].float()
    assert torch.equal(state.total, expected)


@pytest.mark.parametrize("shape", [(3_000_000,), (3_000, 1_000)], ids=str)
def test_a_sum_makes_no_copy_of_the_gradient(shape):
    gradient, native = Gradient(State(shape), OneRank(), 0), torch.ones(shape, dtype=torch.bfloat16)
    gradient.add(["weight"], [native])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        gradient.add(["weight"], [native])
    assert 0 < max(event.cpu_memory_usage for event in made.events()) <= 4 << 20
