"""What ranks add up, each once: two ranks that pass the same micro-batches have the bits of one."""

import pytest
import torch

from megatrain_io.paging.ranks import OneRank
from paged import Case, all_planes, differing, expected_planes, in_memory, make_store, opened, train


class Twins(OneRank):
    """This rank and another one that has the same micro-batches: all sums are twice what is here."""

    rank = 1
    world = 2

    def __init__(self):
        self.calls = []

    def share(self, micro_batches):
        self.calls.append("share")
        return micro_batches

    def sum_tokens(self, count):
        self.calls.append("tokens")
        return 2 * count

    def sum_loss(self, loss):
        self.calls.append("loss")
        return 2 * loss

    def sum_gradient(self, record, gradient):
        self.calls.append(record)
        for tensor in gradient.tensors.values():
            tensor.mul_(2)

    def norm(self, norm):
        self.calls.append("norm")
        return norm


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twins_have_the_bits_of_one(tmp_path, tied, dtype):
    """A token's loss is divided by twice as many, and everything is added twice: exact, by powers of two."""
    case = Case(tied=tied, dtype=dtype, counts=(2, 1))
    expected, ranks = in_memory(case), Twins()
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case, ranks=ranks) as model:
        losses = train(model, case)
        layout = model.state.layout
        assert losses == expected.losses
        assert differing(all_planes(model.state), expected_planes(expected)) == []
    # In the order in which the schedule submits them: head, blocks from last to first, embedding.
    head = [] if layout.head is None else [layout.stops[layout.head][0]]
    blocks = [layout.stops[layout.block(index)][0] for index in reversed(range(layout.blocks))]
    step = ["share", "tokens", "loss", *head, *blocks, layout.stops[layout.embedding][0], "norm"]
    assert ranks.calls == 2 * step
