"""RAM: what grows with the model, and whether the ledger knows all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memory_of_training
from memory_of_training import shape
from paged import DRIVES, PROFILE, Case, files, make_store

pytestmark = pytest.mark.slow

TOKENS = 32  # more would be products in bf16, which are slow on many processors, and hardly more RAM


def measure(folder: Path, layers: int, hidden: int) -> dict:
    """The least of three processes, each with large blocks of its heap mapped one by one.

    A heap keeps freed blocks and leaves holes between them: how many is chance, and none of it is asked here.
    """
    case = Case(dtype=torch.bfloat16, overrides=shape(layers, hidden))
    store = folder / f"{layers}x{hidden}"
    make_store(store, case)
    script = Path(memory_of_training.__file__)
    command = [sys.executable, str(script), str(store), str(layers), str(hidden), "bfloat16", str(TOKENS)]
    surroundings = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PATH": "",
        PROFILE: str(DRIVES),
        "MALLOC_MMAP_THRESHOLD_": str(64 * 1024),
    }
    measured = []
    for _ in range(3):
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=surroundings)
        measured.append(json.loads(done.stdout))
    for file in files(store):
        file.unlink()
    return min(measured, key=lambda each: each["growth"])


@pytest.mark.timeout(300)
def test_ram_does_not_grow_with_depth_and_the_ledger_knows_all_of_it(tmp_path):
    small, large = measure(tmp_path, 10, 384), measure(tmp_path, 30, 384)
    saved = large["accounts"]["activations"] - small["accounts"]["activations"]
    added = large["parameters"] - small["parameters"]
    assert large["ledger"] - small["ledger"] <= saved + 0.002 * added, (small, large)
    # Not with what the smaller one's process took: which buffers a short run ever fills is a matter of timing.
    assert large["growth"] - small["ledger"] <= saved + 0.1 * added, (small, large)
    for measured in (small, large):
        assert measured["growth"] <= 1.05 * measured["ledger"], measured
