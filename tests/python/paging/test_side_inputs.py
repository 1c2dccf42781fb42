"""Side inputs: what blocks take besides the hidden state has its gradient, and training the bits of memory.

Gemma 4 and Gemma 3n: per-layer inputs that the embedding makes, keys and values that blocks leave for later ones; the
hidden state of Gemma 3n is several.
"""

import pytest
import torch

from megatrain_io.errors import UnsupportedModelError
from megatrain_io.paging.activations import ActivationBudget
from megatrain_io.paging.device.simulated import SimulatedDevice
from paged import (
    SIDE_INPUTS,
    Case,
    all_planes,
    differing,
    expected_planes,
    facts_of,
    in_memory,
    make_store,
    opened,
    train,
)
from reference.reference import train as train_in_memory

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", SIDE_INPUTS)
def test_training_with_side_inputs_equals_stock_training(tmp_path, family, dtype):
    case = Case(family, tied=True, dtype=dtype, counts=(2, 3))
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case, small_pool=True) as model:
        losses = train(model, case)
        planes = all_planes(model.state)
    expected = in_memory(case)
    assert losses == expected.losses
    assert differing(planes, expected_planes(expected)) == []


@pytest.mark.parametrize("place", ["drive", "device"])
def test_where_inputs_of_blocks_lie_changes_no_bit(tmp_path, place):
    case = Case("gemma3n_text", counts=(2, 3))
    make_store(tmp_path / "store", case)
    how = {"device": SimulatedDevice()} if place == "device" else {}
    if place == "drive":
        how["activations"] = ActivationBudget(1 << 17, [tmp_path / "inputs"], 4096)
    with opened(tmp_path / "store", case, **how) as model:
        losses = train(model, case)
        planes = all_planes(model.state)
        assert place == "device" or model.saved.io_bytes()[1] > 0
    expected = in_memory(case)
    assert losses == expected.losses
    assert differing(planes, expected_planes(expected)) == []


def frozen_table(name):
    """The first hidden state has no gradient, and what is made of it for the blocks has one."""
    return "raw32" if name == "model.embed_tokens.weight" else "f32"


@pytest.mark.parametrize("family", SIDE_INPUTS)
def test_side_inputs_are_trained_beside_a_table_that_is_not(tmp_path, family):
    case = Case(family, counts=(2, 1), format_of=frozen_table)
    stock = case.model
    stock.get_input_embeddings().weight.requires_grad_(False)
    expected = train_in_memory(stock, case.steps, case.hyperparameters, case.dtype)
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        assert train(model, case) == expected.losses
        planes = all_planes(model.state)
    wanted = expected_planes(expected) | {(name, "weight"): value for name, value in expected.weight.items()}
    assert differing(planes, wanted) == []


@pytest.mark.parametrize("family", SIDE_INPUTS)
def test_the_probe_tells_what_blocks_take(family):
    spec = facts_of(family, tied=True)
    assert len(spec.sides.arguments) == 1
    assert spec.sides.mappings == {"shared_kv_states"}
    assert spec.axes == ("ABTH" if family == "gemma3n_text" else "BTH")


def test_a_pass_through_frozen_weights_that_would_lose_a_gradient_is_refused(tmp_path):
    case = Case("gemma4_text", counts=(1,), is_frozen=True)
    make_store(tmp_path / "store", case)
    with (
        opened(tmp_path / "store", case) as model,
        pytest.raises(UnsupportedModelError, match="more than the first hidden state"),
    ):
        model.pass_gradients([])
