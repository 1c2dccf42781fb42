"""What `benches/gpu` measures, without a GPU: peers beside ours on the CPU, losses on a device that is made up."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benches.gpu import contenders, losses, peers
from benches.gpu.contenders import DEEPSPEED, OFFLOAD, OURS, WARM_UP
from benches.harness.comparison import SkippedError
from benches.step import contenders as step_contenders
from paged import Case, expected_planes
from reference.reference import train

ROOT = Path(__file__).parents[3]
# Threads that spin slow a busy machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
MIB = 1 << 20


def run(module, *options):
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=ENVIRONMENT
    ).stdout


@pytest.mark.slow
@pytest.mark.timeout(300)  # processes that import torch and transformers, beside other work
def test_ours_and_the_peers_train_the_same_and_leave_nothing(tmp_path):
    output, folder = tmp_path / "figures.json", tmp_path / "drive"
    folder.mkdir()
    options = ["--sizes", "tiny", "--device", "cpu", "--tokens", "64", "--micro-batches", "2", "--steps", "2"]
    options += ["--rounds", "1", "--vram", "1GiB", "--ram", "20MiB", "--folder", folder, "--json", output]
    said = run("benches.gpu.peers", *options)
    found = json.loads(output.read_text())["runs"]["tiny"]
    ours, offload = (found["results"][name][0] for name in (OURS, OFFLOAD))
    for figures in (ours, offload):
        assert len(figures["seconds"]) == 2
        assert len(figures["losses"]) == 2 + WARM_UP
        assert figures["losses"][-1] < figures["losses"][0]
        assert figures["vram_peak"] is None
        assert figures["peak_rss"] > 50 * MIB
    assert offload["losses"] == pytest.approx(ours["losses"], rel=1e-4), (
        "the same weights, tokens and updates"
    )
    assert min(ours["by_engine"]) > 10 * MIB, "weights and moments do not fit the budget"
    assert f"losses of {OFFLOAD} and ours, over 4 steps: equal to" in said
    if find_spec("deepspeed") is None:
        assert "deepspeed is not installed" in found["skipped"][DEEPSPEED]
        assert f"{DEEPSPEED} was skipped: deepspeed is not installed" in said
    assert list(folder.iterdir()) == []


@pytest.mark.timeout(300)
def test_what_does_not_fit_the_vram_is_skipped_with_its_reason(tmp_path):
    job = {"size": "tiny", "device": "cpu", "tokens": 64, "micro_batches": 1, "steps": 1}
    job |= {"folder": str(tmp_path), "vram": 601 * MIB, "ram": 64 * MIB}
    step_contenders.make_store(job)
    with pytest.raises(SkippedError, match="it does not fit: "):
        contenders.ours(job)


def options_of(**changed):
    known = {"device": "cpu", "tokens": 64, "micro_batches": 1, "steps": 1, "rounds": 2}
    return Namespace(**{**known, "vram": MIB, "ram": MIB, "peer_python": sys.executable, **changed})


def test_what_does_not_fit_the_ram_is_not_even_started(tmp_path):
    with pytest.raises(SkippedError, match=r"it needs 1099\d\.\d GB of RAM, and"):
        peers.run(peers.OURS, "tiny", options_of(ram=10 << 40), tmp_path)


def test_a_contender_that_fails_is_skipped_and_the_others_go_on(tmp_path, monkeypatch):
    def child(_module, _python, arguments, *_):
        job = json.loads(arguments[0])
        if job["contender"] == OFFLOAD:
            raise SystemExit("benches.gpu.contenders failed:\nTraceback\nended by SIGKILL")
        return {"losses": [2.0, 1.0], "seconds": [1.0]}

    def absent(*_):
        raise SkippedError("deepspeed is\nnot installed")

    monkeypatch.setattr(peers, "child", child)
    monkeypatch.setattr(peers, "deepspeed_child", absent)
    results, skipped = peers.measure("tiny", options_of(), tmp_path)
    assert [figures["round"] for figures in results.pop(OURS)] == [0, 1]
    assert results == {}
    assert skipped == {OFFLOAD: "it fails: ended by SIGKILL", DEEPSPEED: "deepspeed is not installed"}
    assert list(tmp_path.iterdir()) == []


def test_ratios_are_of_the_same_round_and_vram_is_shown_where_it_is_known():
    def rounds(*seconds, vram):
        return [
            {"round": number, "seconds": [each] * 3, "losses": [2.0, 1.0], "vram_peak": vram}
            | dict.fromkeys(("peak_rss", "read", "written"), 5e6)
            for number, each in enumerate(seconds)
        ]

    results = {OURS: rounds(1.0, 2.0, vram=None), OFFLOAD: rounds(3.0, 6.0, vram=7e6)}
    *_, ours, offload = peers.table(results, 100)
    assert "| 1.00 (1.00 to 1.00) | 75 (50 to 100) | - | 5 (5 to 5) |" in ours
    assert "| 3.00 (3.00 to 3.00) | 25 (17 to 33) | 7 (7 to 7) |" in offload
    assert offload.endswith("| 2.000000 1.000000 |")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_losses_through_a_device_are_those_in_memory(tmp_path):
    output = tmp_path / "losses.json"
    said = run("benches.gpu.losses", "--device", "simulated", "--folder", tmp_path, "--json", output)
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
    case = Case(tied=True, dtype=dtype, counts=(2, 1, 3))
    found = losses.train_in_memory(case, torch.device("cpu"))
    expected = train(case.model, case.steps, case.hyperparameters, dtype)
    assert found.losses == expected.losses
    differing = losses.differences(expected_planes(found), expected_planes(expected))
    assert (differing["weights"], differing["optimizer"]) == (0, 0)


def test_every_bit_that_differs_is_counted():
    one, zeros = torch.ones(4, dtype=torch.bfloat16), torch.zeros(3)
    expected = {("x", "weight"): one, ("x", "master"): zeros}
    other = {("x", "weight"): one * torch.tensor([1, 1, 2, 3]).bfloat16(), ("x", "master"): -zeros}
    assert losses.differences(other, expected) == {
        "weights": 2,
        "of_weights": 4,
        "optimizer": 3,
        "of_optimizer": 3,
    }
    assert losses.largest_difference([2.0, 3.0], [2.0, 4.0]) == 0.25


@pytest.mark.parametrize("changed", [{"losses": [1.5]}, {"weights": 1}, {"optimizer": 1}], ids=str)
def test_bits_that_differ_on_the_simulated_device_fail_the_command(monkeypatch, capsys, changed):
    row = {"device": "a device", "dtype": "float32", "tied": False, "losses": [1.0], "expected": [1.0]}
    row |= {"weights": 0, "of_weights": 9, "optimizer": 0, "of_optimizer": 27, **changed}
    monkeypatch.setattr(losses, "child", lambda *_: [row])
    monkeypatch.setattr(sys, "argv", ["losses", "--device", "cuda"])
    losses.main()
    assert f"| {'NO' if 'losses' in changed else 'yes'} | " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["losses", "--device", "simulated"])
    with pytest.raises(SystemExit, match="differs from training in memory"):
        losses.main()
