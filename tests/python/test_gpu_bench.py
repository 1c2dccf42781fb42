"""What `benches/gpu.md` asks for, without a GPU: losses on a device that is made up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paged import Case, expected_planes
from reference.reference import train

BENCHES = Path(__file__).parents[2] / "benches"
# Threads that spin slow a busy machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _benches(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)


def run(script, *options):
    command = [sys.executable, BENCHES / script, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout


@pytest.mark.slow
@pytest.mark.timeout(300)  # processes that import torch and transformers, beside other work
def test_losses_through_a_device_are_those_in_memory(tmp_path):
    output = tmp_path / "losses.json"
    said = run("gpu_losses.py", "--device", "simulated", "--folder", tmp_path, "--json", output)
    rows = json.loads(output.read_text())
    assert [(row["dtype"], row["tied"]) for row in rows] == [
        ("float32", False),
        ("float32", True),
        ("bfloat16", False),
        ("bfloat16", True),
    ]
    for row in rows:
        assert row["losses"] == row["expected"]
        assert (row["weights"], row["optimizer"]) == (0, 0)
        assert min(row["of_weights"], row["of_optimizer"]) > 100_000
    assert said.count("| yes | 0 | 0 of ") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["losses.json"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_with_masters_on_the_cpu_is_that_of_the_reference(dtype):
    import gpu_losses

    case = Case(tied=True, dtype=dtype, counts=(2, 1, 3))
    found = gpu_losses.train_in_memory(case, torch.device("cpu"))
    expected = train(case.model, case.steps, case.hyperparameters, dtype)
    assert found.losses == expected.losses
    differing = gpu_losses.differences(expected_planes(found), expected_planes(expected))
    assert (differing["weights"], differing["optimizer"]) == (0, 0)


def test_every_bit_that_differs_is_counted():
    import gpu_losses

    one, zeros = torch.ones(4, dtype=torch.bfloat16), torch.zeros(3)
    expected = {("x", "weight"): one, ("x", "master"): zeros}
    other = {("x", "weight"): one * torch.tensor([1, 1, 2, 3]).bfloat16(), ("x", "master"): -zeros}
    assert gpu_losses.differences(other, expected) == {
        "weights": 2,
        "of_weights": 4,
        "optimizer": 3,
        "of_optimizer": 3,
    }
    assert gpu_losses.largest_difference([2.0, 3.0], [2.0, 4.0]) == 0.25


@pytest.mark.parametrize("changed", [{"losses": [1.5]}, {"weights": 1}, {"optimizer": 1}], ids=str)
def test_bits_that_differ_on_the_simulated_device_fail_the_command(monkeypatch, capsys, changed):
    import gpu_losses

    row = {"device": "a device", "dtype": "float32", "tied": False, "losses": [1.0], "expected": [1.0]}
    row |= {"weights": 0, "of_weights": 9, "optimizer": 0, "of_optimizer": 27, **changed}
    monkeypatch.setattr(gpu_losses, "child", lambda *_: [row])
    monkeypatch.setattr(sys, "argv", ["gpu_losses.py", "--device", "cuda"])
    gpu_losses.main()
    assert f"| {'NO' if 'losses' in changed else 'yes'} | " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu_losses.py", "--device", "simulated"])
    with pytest.raises(SystemExit, match="differs from training in memory"):
        gpu_losses.main()
