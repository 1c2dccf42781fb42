"""The comparisons in `benches`: what decides a goal, on made-up figures, and one round of what is always here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benches.harness.comparison import child
from benches.io import compare

ROOT = Path(__file__).parents[3]


def rounds(*gb_per_s, cpu=0.01):
    """A round each, with this rate of each kind."""
    one = {"read": 10**9, "written": 0, "cpu_seconds": cpu}
    return [{kind: {**one, "seconds": 1 / rate} for kind in ("read", "write", "mixed")} for rate in gb_per_s]


def met(results):
    """Goal to whether it is met, for reads."""
    goals = compare.goals(results)
    return {each["goal"]: each["met"] for each in goals if each["goal"].startswith("read: ")}


def test_goals_are_decided_by_the_fastest_contender_of_each_group():
    results = {
        "fio 1M qd32": rounds(2.0, 2.0, 2.0),
        "fio 8M qd4": rounds(1.0, 1.0, 9.0),
        "uring 4M qd8": rounds(1.92, 1.92, 1.0),
        "uring 1M qd32": rounds(0.5, 0.5, 0.5),
        "threads 4M qd8": rounds(1.7, 1.7, 1.7),
        "DeepNVMe 1M qd32": rounds(1.5, 1.5, 0.9),
        "DeepNVMe 8M qd32": rounds(1.6, 1.4, 0.8),
    }
    found = met(results)
    assert found["read: uring at least 95 % of fio's best"] is True
    assert found["read: threads at least 90 % of uring"] is False
    assert found["read: uring above DeepNVMe in every round"] is True
    assert found["read: CPU s/GB of uring within 1.2 x fio's"] is True
    assert found["read: TensorStore uring at least 95 % of fio's best"] is None


def test_one_round_below_deepnvme_is_enough_to_fail():
    results = {"uring 4M qd8": rounds(3.0, 3.0, 1.0), "DeepNVMe 1M qd32": rounds(1.0, 1.0, 1.1)}
    assert met(results)["read: uring above DeepNVMe in every round"] is False


def test_the_store_may_take_the_checksums_time_on_top():
    sums = [{"checksum": {"read": 10**9, "written": 0, "seconds": 1.0, "cpu_seconds": 0.05}}]
    results = {"fio 1M qd32": rounds(2.0, cpu=0.01), "TensorStore uring": rounds(2.0, cpu=0.06)}
    goal = "read: CPU s/GB of TensorStore uring within 1.2 x fio's + checksums"
    assert met(results)[goal] is None, "without the checksums nothing can be said"
    assert met({**results, "checksums alone": sums})[goal] is True
    results["TensorStore uring"] = rounds(2.0, cpu=0.07)
    assert met({**results, "checksums alone": sums})[goal] is False


@pytest.mark.slow
def test_a_round_of_our_own_contenders_writes_its_figures_and_leaves_nothing(tmp_path):
    output = tmp_path / "figures.json"
    folder = tmp_path / "drive"
    folder.mkdir()
    options = ["--rounds", "1", "--mib", "48", "--folder", folder, "--only", "threads 4M,checksums"]
    command = [sys.executable, "-m", "benches.io.compare", *options, "--json", output]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(output.read_text())
    (figures,) = found["results"]["threads 4M qd8"]
    assert figures["read"]["read"] == figures["write"]["written"] == 3 * (48 << 20), "in three passes"
    assert found["machine"]["kernel"]
    assert "| threads 4M qd8 |" in done.stdout
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_the_bits_of_adamw_are_compared(tmp_path):
    output = tmp_path / "figures.json"
    options = ["--rounds", "1", "--parameters", "65536", "--only", "io f32", "--json", output]
    command = [sys.executable, "-m", "benches.step.adamw", *options]
    subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    found = json.loads(output.read_text())
    assert found["same_bits"] is True
    assert found["results"]["megatrain-io f32"][0]["parameters_per_s"] > 0


def test_a_contender_that_the_system_ends_says_by_what(tmp_path):
    (tmp_path / "ends.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(SystemExit, match=r"ended by SIGKILL$"):
        child("ends", sys.executable, [], {"PYTHONPATH": str(tmp_path)})
