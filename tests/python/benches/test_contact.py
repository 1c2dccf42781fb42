"""First contact with a GPU, on the simulated device: it runs where all is well, and notices what is not."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benches.gpu import contact
from megatrain_io.paging.device.simulated import SimulatedDevice
from paged import PLANES
from reference.reference import Result

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PLACEMENTS = ("roomy", "inputs in RAM", "least", "gathered")
SCRIPT = ROOT / "benches" / "gpu" / "first_contact.sh"


def run(what, *options):
    contact.main([what, "--device", "simulated", *options])


def test_bytes_go_there_and_back(capsys):
    run("device", "--mib", "1")
    assert re.findall(r"round trip, (.*): yes", capsys.readouterr().out) == [
        "never registered",
        "registered",
        "no longer registered",
    ]


def test_the_link_is_measured_both_ways_and_registered_or_not(capsys):
    run("link", "--mib", "2", "--chunks", "1", "--copies", "2")
    rates = re.findall(r"(ring|registered) +1 MiB (\S+) +([\d.]+) GB/s", capsys.readouterr().out)
    assert [rate[:2] for rate in rates] == [
        (memory, ways) for memory in ("ring", "registered") for ways in ("in", "out", "in+out")
    ]
    assert all(float(rate[2]) > 0 for rate in rates)


def test_every_placement_has_the_bits_of_training_in_memory(tmp_path, capsys):
    before = torch.are_deterministic_algorithms_enabled()
    sizes = ["--dtypes", "float32", "--heads", "tied", "--counts", "1", "--layers", "3"]
    run("bits", *sizes, "--folder", str(tmp_path))
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "all placements have the same bits"
    assert [re.match(r"float32 +tied +(.*?) +(?:registered|pageable) ", line)[1] for line in lines] == [
        placement for placement in PLACEMENTS for _ in range(2)
    ]
    assert all("unlike the first 0, unlike in memory 0; losses differ by 0" in line for line in lines)
    assert list(tmp_path.iterdir()) == []
    assert torch.are_deterministic_algorithms_enabled() == before


def test_steps_from_a_store_say_what_they_took(tmp_path, capsys):
    options = ["--vram", "1GiB", "--ram", "64MiB", "--tokens", "16", "--micro-batches", "1", "--steps", "1"]
    run(
        "step",
        "tiny",
        *options,
        "--no-commit",
        "--folder",
        str(tmp_path),
        "--json",
        str(tmp_path / "step.json"),
    )
    said = capsys.readouterr().out
    assert "tiny, VRAM 1GiB, RAM 64MiB, 1 micro-batches of 16 tokens, no commits\nVRAM: " in said
    assert "\nstep " in said
    assert json.loads((tmp_path / "step.json").read_text())["tokens"] == 16
    with pytest.raises(SystemExit):
        run("step", "tiny", *options, "--vram", "1MiB", "--folder", str(tmp_path))
    assert "FAILED, DoesNotFitError: training may take 1 MiB of VRAM" in capsys.readouterr().out


def test_a_byte_that_does_not_arrive_is_noticed(monkeypatch):
    copy_in = SimulatedDevice.copy_in

    def damaged(device, to, content):
        copy_in(device, to, content ^ (torch.arange(content.numel()) == 7))

    monkeypatch.setattr(SimulatedDevice, "copy_in", damaged)
    with pytest.raises(SystemExit, match=r"^WRONG\nbytes are equal after a round trip, never registered\n"):
        run("device", "--mib", "1")


def test_a_bit_that_differs_and_a_training_that_fails_are_noticed(monkeypatch):
    planes = {plane: {"x": torch.zeros(3)} for plane in PLANES}
    stock = Result(losses=[2.0], **planes)
    endings = iter(["equal", "fails", "equal", "other plane", "equal", "other loss", "fails", "equal"])

    def ended(*_, **__):
        ending = next(endings)
        if ending == "fails":
            raise OSError("no room")
        found = {("x", plane): torch.zeros(3) for plane in PLANES}
        if ending == "other plane":
            found["x", "master"][1] = 1.0
        return [2.5 if ending == "other loss" else 2.0], found

    monkeypatch.setattr(contact, "train_in_memory", lambda *_: stock)
    monkeypatch.setattr(contact, "train_placed", ended)
    with pytest.raises(SystemExit) as found:
        run("bits", "--dtypes", "float32", "--heads", "own", "--counts", "1")
    assert [re.split(" {2,}|: ", line)[-1] for line in found.value.code.splitlines()] == [
        "WRONG", "OSError", "OSError", "other bits", "other bits",
    ]  # fmt: skip


def test_what_the_script_starts_is_there():
    text = SCRIPT.read_text(encoding="utf-8")
    modules = set(re.findall(r"python3 -m (benches\.[\w.]+)", text))
    assert modules >= {"benches.gpu.contact", "benches.gpu.losses", "benches.gpu.peers"}
    assert [module for module in modules if find_spec(module) is None] == []
    files = re.findall(r"\btests/\S+\.py", text)
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []
    whats = set(re.findall(r"\bcontact \d+ (\w+)", text)) | set(
        re.findall(r'contact "\$seconds" (\w+)', text)
    )
    assert whats == {"device", "link", "bits", "step"}
