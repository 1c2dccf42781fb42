"""Paged training has the bits of stock training in memory: losses, weights, masters and both moments."""

import pytest
import torch

from paged import DRIVES, Case, all_planes, differing, expected_planes, in_memory, make_store, opened, train

FP32, BF16 = torch.float32, torch.bfloat16


def check(case, path, *, chunk_parameters=None, engine="auto", drives=DRIVES, commit_every=1, **how):
    make_store(path, case, chunk_parameters, engine, drives)
    with opened(path, case, engine=engine, drives=drives, **how) as model:
        losses = train(model, case, commit_every=commit_every)
        planes = all_planes(model.state)
    expected = in_memory(case)
    assert losses == expected.losses
    assert differing(planes, expected_planes(expected)) == []


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(1,) * 20, (4,) * 6], ids=["twenty steps", "six steps of four"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_training_equals_stock_training(tmp_path, family, tied, dtype, counts):
    check(Case(family, tied, dtype, counts), tmp_path / "store")


@pytest.mark.parametrize(
    "how",
    [
        {"chunk_parameters": 4096},
        {"chunk_parameters": 12288},
        {"chunk_parameters": 1 << 21},
        {"small_pool": True},
        {"small_pool": True, "chunk_parameters": 4096},
        {"engine": "uring"},
        {"engine": "threads"},
        {"threads": 1},
        {"threads": 2},
        {"drives": 2},
        {"drives": 3, "chunk_parameters": 4096, "engine": "threads"},
        {"resident_share": 0.1, "small_pool": True},
        {"resident_share": 0.5, "chunk_parameters": 4096},
        {"resident_share": 0.5, "commit_every": 3},
        {"resident_share": 1.0},
        {"resident_share": 1.0, "commit_every": 2, "small_pool": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_how_bytes_move_changes_no_bit(tmp_path, tied, how):
    check(Case(tied=tied, dtype=BF16, counts=(1, 4, 2)), tmp_path / "store", **how)
