"""Liger-kernel's cross entropy in place of torch's: the same numbers, and only where it belongs.

Its kernels run in Triton's interpreter, which a process has from its beginning or not at all: in one of their own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from test_partition import leaves_of, partition_of, stock_of, tokens
from test_partition import shifted as shifted_labels
from transformers.loss.loss_utils import ForCausalLMLoss

from megatrain_io.models import liger_loss as module
from megatrain_io.models.liger_loss import Loss, liger_version
from paged import DEVICE
from runs import blob_of, configured, metrics_of, start

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Untied and tied, and one whose logits are bent by a tanh of its own first.
FAMILIES = ("llama", "llama tied", "gemma2")
ITEMS = 13
IMPORTS = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional")

needs_liger = pytest.mark.skipif(
    find_spec("liger_kernel") is None, reason="liger-kernel is not installed; it is in the extra dev"
)


def results_of_all_losses(cross_entropy=None):
    """Losses, with and without a gradient, and gradients of hidden states and parameters behind the blocks."""
    found = {}
    for family in FAMILIES:
        for name, dtype in DTYPES.items():
            stock, partition = stock_of(family, dtype), partition_of(family, dtype)
            if cross_entropy is not None:
                partition._lm._loss = module.partial(module.liger_loss, cross_entropy)
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(2, 11, 32, generator=generator).to(dtype).requires_grad_()
            labels = shifted_labels(tokens(2, 11, seed=1)[1])
            leaves = leaves_of(stock)
            names = [name for name, _ in partition.head_parameters] + list(partition.tied_parameters)
            # A slice of tokens is no contiguous piece of its labels; nothing of the second is trained.
            for part, begin, end in (("some", 2, 11), ("none", 0, 2)):
                key = f"{family}/{name}/{part}"
                loss = partition.loss(leaves, hidden[:, begin:end], labels[:, begin:end], torch.tensor(ITEMS))
                gradients = torch.autograd.grad(loss, [hidden, *(leaves[each] for each in names)])
                found[f"{key}/loss"] = loss.detach()
                for each, gradient in zip(["hidden", *names], gradients, strict=True):
                    found[f"{key}/{each}"] = gradient.contiguous()
                with torch.no_grad():
                    found[f"{key}/evaluated"] = partition.loss(
                        leaves, hidden[:, begin:end], labels[:, begin:end], ITEMS
                    )
    return found


IN_THE_INTERPRETER = """
import sys
import torch
torch.set_num_threads(1)
from liger_kernel.transformers.functional import liger_cross_entropy
from safetensors.torch import save_file
import test_liger_loss
written = []

def cross_entropy(logits, *arguments, **keywords):
    assert logits.dtype == torch.float32
    before = logits.detach().clone()
    loss = liger_cross_entropy(logits, *arguments, **keywords)
    written.append(not torch.equal(before, logits))
    return loss

save_file(test_liger_loss.results_of_all_losses(cross_entropy), sys.argv[1])
assert written and all(written), "no copy of the logits was made for the gradient"
"""


@pytest.mark.slow
@needs_liger
def test_loss_and_gradients_are_those_of_torch(tmp_path):
    folders = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", IN_THE_INTERPRETER, str(tmp_path / "found")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    found, expected = load_file(tmp_path / "found"), results_of_all_losses()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Of fp32 a few last bits; a gradient in bf16 is rounded once more, and may fall to the other side.
        is_rounded = value.dtype == torch.bfloat16
        tolerance = {"rtol": 2**-7, "atol": 1e-5} if is_rounded else {"rtol": 2e-6, "atol": 1e-7}
        torch.testing.assert_close(found[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
        assert value.any() != ("none" in key), "nothing is compared with nothing"


@pytest.fixture
def made_up(monkeypatch):
    """A liger-kernel that is installed and computes what torch does."""
    called = []

    def liger_cross_entropy(logits, target, **how):
        called.append(how)
        return torch.nn.functional.cross_entropy(logits, target, **how)

    for name in IMPORTS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[IMPORTS[-1]].liger_cross_entropy = liger_cross_entropy
    monkeypatch.setattr(module, "version", lambda _name: "0.8.5")
    return called


@pytest.fixture
def blocked(monkeypatch):
    """Installed, but to import it is an error."""
    for name in IMPORTS:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(module, "version", lambda _name: "0.8.5")


def test_on_cuda_it_takes_the_place_of_the_loss_of_transformers_and_says_so(made_up):
    loss = Loss(ForCausalLMLoss, CUDA)
    assert loss.notes == ["liger-kernel 0.8.5 computes the cross entropy"]
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[1, -100, 3, 4, -100]] * 2)
    arguments = (logits, None, 7)
    how = {"shift_labels": labels, "num_items_in_batch": 6}
    assert torch.equal(loss(*arguments, **how), ForCausalLMLoss(*arguments, **how))
    assert made_up == [{"ignore_index": -100, "reduction": "sum"}]


def test_a_loss_of_another_kind_is_left_alone(made_up):
    def other(*_arguments, **_keywords):
        return torch.ones(())

    loss = Loss(other, CUDA)
    assert loss() == 1
    assert (loss.notes, made_up) == ([], [])


@pytest.mark.usefixtures("blocked")
def test_what_cannot_be_imported_is_not_used():
    loss = Loss(ForCausalLMLoss, CUDA)
    (note,) = loss.notes
    assert "liger-kernel 0.8.5 cannot be imported" in note
    assert loss._chosen[0] is ForCausalLMLoss


def test_what_is_not_installed_is_not_missed(monkeypatch):
    def version(name):
        raise module.PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", version)
    loss = Loss(ForCausalLMLoss, CUDA)
    assert loss.notes == []
    assert loss._chosen[0] is ForCausalLMLoss


@pytest.mark.usefixtures("blocked")
def test_a_cpu_never_imports_it_and_a_device_gets_it_with_the_model():
    partition = partition_of("llama")
    assert partition.loss_notes == []
    assert liger_version(CPU) is None
    partition.to(torch.device("meta"))
    assert partition._lm._loss._device.type == "meta"
    assert partition.loss_notes == []
    # Nothing is imported before it is asked for: generating computes no loss.
    partition._lm._loss = Loss(partition._lm._own_loss, CUDA)
    assert "_chosen" not in vars(partition._lm._loss)
    assert len(partition.loss_notes) == 1


@pytest.mark.skipif(DEVICE != "cpu", reason="compares with a run on the CPU")
def test_a_run_with_it_says_so_at_its_start(source, whole, tmp_path, made_up, monkeypatch):
    monkeypatch.setattr(module, "liger_version", lambda _device: "0.8.5")
    result, reporter = start(configured(source, tmp_path / "run", max_steps=1))
    assert "liger-kernel 0.8.5 computes the cross entropy" in reporter.starts[0][2]
    assert made_up
    assert result.loss == metrics_of(whole[0])[0]["loss"]
    assert "liger-kernel" in blob_of(tmp_path / "run")["environment"]


def test_logits_that_somebody_keeps_are_not_changed_behind_his_back(made_up):
    del made_up
    kept = torch.randn(3, 7, requires_grad=True)
    logits = kept.tanh()  # its gradient is made from its result
    how = {"shift_labels": torch.tensor([1, 2, 3]), "num_items_in_batch": 3}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Loss(ForCausalLMLoss, CUDA)(logits, None, 7, **how).backward()
