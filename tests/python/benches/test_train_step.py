"""`benches/step`: the bound and what decides a goal, on made-up figures, and one round of a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benches.step import bound, train_step
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.schedule import Residents, build_schedule, traffic

ROOT = Path(__file__).parents[3]
RATES = {"read": 2e9, "mixed": 3e9, "write": 4e9}
NOTHING = Residents()


@pytest.fixture
def layout():
    """Embedding, three blocks and head of 4096 parameters each: 2 and 10 pages."""
    names = ["embedding", "block 0", "block 1", "block 2", "head"]
    return ModelLayout.build([(name, [(f"{name}.x", (4096,))]) for name in names], 3, "bf16")


def test_a_phase_takes_the_longer_of_computing_and_moving():
    moved = {"forward": (4e9, 0.0), "backward": (14e9, 12e9)}
    by_drive = bound.bound(moved, {"forward": 1.0, "backward": 2.0}, RATES)
    assert by_drive == pytest.approx({"forward": 2.0, "backward": 26 / 3, "step": 2.0 + 26 / 3})
    by_both = bound.bound(moved, {"forward": 1.0, "backward": 20.0}, RATES)
    assert by_both == pytest.approx({"forward": 2.0, "backward": 20.0, "step": 22.0})


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ((0, 0), 0.0),
        ((2e9, 0), 1.0),
        ((0, 4e9), 1.0),
        ((14e9, 12e9), 26 / 3),
        ((20e9, 6e9), 26 * (1 / 2 + 1 / 3) / 2),
        ((7e9, 19e9), 26 * (1 / 3 + 1 / 4) / 2),
    ],
)
def test_the_drives_rate_depends_on_the_share_of_writes(moved, expected):
    assert bound.seconds_to_move(moved, RATES) == pytest.approx(expected)


def test_bytes_of_phases_are_those_of_the_schedule(layout):
    schedule = build_schedule(layout, tied_embeddings=False, training=True)
    found = bound.bytes_of_phases(schedule, layout, NOTHING, commits=True)
    page = 4096
    # Weights of embedding and blocks; then the head's, those of two blocks and the embedding again, all planes.
    assert found == {"forward": (8 * page, 0), "backward": ((8 + 50) * page, 60 * page)}
    sums = tuple(map(sum, zip(*found.values(), strict=True)))
    assert sums == traffic(schedule, layout)


def test_what_stays_in_ram_moves_with_commits_alone(layout):
    schedule = build_schedule(layout, tied_embeddings=False, training=True)
    stays = Residents(frozenset(range(5)), frozenset(range(5)))
    assert bound.bytes_of_phases(schedule, layout, stays, commits=False)["backward"] == (0, 0)
    found = bound.bytes_of_phases(schedule, layout, stays, commits=True)
    assert found == {"forward": (0, 0), "backward": (0, 60 * 4096)}


def runs(*seconds, moved=10**9, losses=(2.0, 1.0, 0.5), **more):
    """A round each: a slow first step, then steps of so many seconds."""
    return [
        {
            "round": number,
            "steps": [
                {"seconds": took, "read": moved, "written": moved, "loss": loss, "parts": {}}
                for took, loss in zip((100.0, each, each), losses, strict=True)
            ],
            **more,
        }
        for number, each in enumerate(seconds)
    ]


def met(found):
    return [each["met"] for each in train_step.goals(found)]


def test_goals_compare_within_a_round():
    one = {
        train_step.ON_NVME: runs(1.1, 2.2, 4.4),
        train_step.CHECKPOINTED: runs(1.0, 2.0, 4.0),
        train_step.DEEPSPEED: runs(5.0, 10.0),
        train_step.RESIDENT + train_step.SELDOM: runs(1.06, 2.12, 4.0),
    }
    for figures, step in zip(one[train_step.ON_NVME], (1.0, 2.0, 4.0), strict=True):
        figures["bound"] = {"step": step}
    assert met({("171M", 1): one}) == [True, True, False, None, None]
    four = {train_step.ON_NVME: runs(4.0, moved=1005 * 10**6), train_step.CHECKPOINTED: runs(3.6)}
    assert met({("171M", 1): one, ("171M", 4): four})[3:] == [True, False]
    assert met({("171M", 1): {}}) == [None] * 5, "what was not measured is not met"


def test_the_bound_is_that_of_the_same_round():
    compute = runs(1.0, 1.0)
    for figures in compute:
        for step in figures["steps"]:
            step["parts"] = {"forward": figures["round"] + 1.0, "backward": 1.0}
    scheduled = {"forward": [0, 0], "backward": [0, 8e9]}
    results = {
        train_step.FIO: [{"round": 1, **RATES}],
        train_step.COMPUTE: compute,
        train_step.ON_NVME: runs(5.0, 8.0, scheduled=scheduled),
    }
    train_step.add_bounds(results)
    first, second = results[train_step.ON_NVME]
    assert "bound" not in first, "fio did not run in that round"
    assert second["bound"] == pytest.approx({"forward": 2.0, "backward": 2.0, "step": 4.0})
    assert train_step.of_bound(results[train_step.ON_NVME]) == [2.0]


def test_losses_are_compared_between_placements_and_with_torch():
    results = {train_step.ON_NVME: runs(1.0), train_step.RESIDENT: runs(1.0)}
    assert train_step.same_losses(results)
    results[train_step.RESIDENT] += runs(1.0, losses=(2.0, 1.0, 0.5000001))
    assert not train_step.same_losses(results)
    assert train_step.equal_digits([2.0, 1.0], [2.0, 1.0]) is None
    assert train_step.equal_digits([2.0, 1.00002], [2.0, 1.0]) == 4


@pytest.mark.slow
@pytest.mark.timeout(300)  # three processes that import torch and transformers, beside other work
def test_a_round_of_a_tiny_model_writes_its_figures_and_leaves_nothing(tmp_path):
    output, folder = tmp_path / "figures.json", tmp_path / "drive"
    folder.mkdir()
    options = ["--sizes", "tiny", "--rounds", "1", "--steps", "4", "--folder", folder]
    options += ["--only", "checkpointing,all on", "--mib", "96", "--json", output]
    command = [sys.executable, "-m", "benches.step.train_step", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    (found,) = json.loads(output.read_text())["runs"]
    names = {"torch, activation checkpointing", "megatrain-io, all on NVMe"}
    assert set(found["results"]) == names
    (paged,) = found["results"]["megatrain-io, all on NVMe"]
    assert len(paged["steps"]) == 4
    assert "equal bit for bit: yes" in done.stdout
    assert list(folder.iterdir()) == []
