"""Runs that version 0.1.0 left on a drive (commit b2b892d; ``golden/make.py`` made them) go on with the code of today.

Two: bf16 with tied embeddings, each step durable; fp32 without, scratch, over two drives. Of five steps three were
trained. ``golden/*.json`` has what that version said of them: of ``verify``, and SHA-256 of all files of an export.
How far a step gets is never compared with a stored figure, which another processor would round otherwise: in-memory
training begins with the planes of the store, on the machine of the test.
"""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import zstandard
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler
from typer.testing import CliRunner

from megatrain_io.cli.app import app
from megatrain_io.config.parse import load
from paged import differing
from reference.reference import accumulate, is_matrix, untie, write_weights
from runs import blob_of, metrics_of, planes_of

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module", params=DTYPES)
def unpacked(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with (
        zstandard.open(GOLDEN / f"{request.param}.tar.zst") as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def folder(unpacked, tmp_path, monkeypatch):
    """A copy; relative paths of its configuration are meant from it."""
    folder = Path(shutil.copytree(unpacked, tmp_path / unpacked.name))
    # Who moves a run together with its model says so: the one absolute path in a run folder.
    info = json.loads((folder / "run" / "run.json").read_text())
    info["source"] = str(folder / "model")
    (folder / "run" / "run.json").write_text(json.dumps(info))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def expected(unpacked):
    (name,) = (name for name in DTYPES if unpacked.name.startswith(name))
    return {"name": name, **json.loads((GOLDEN / f"{name}.json").read_text())}


def call(*arguments):
    """What a command prints with ``--json``."""
    result = CliRunner().invoke(app, [*arguments, "--json"], prog_name="megatrain-io")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_it_is_whole(folder, expected):
    found = call("verify", str(folder / "run"))
    assert {name: found[name] for name in expected["verify"]} == expected["verify"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_exported_to_the_same_bytes(folder, expected, dtype):
    out = folder / "out"
    call("export", str(folder / "run"), str(out), "--dtype", dtype)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    assert found == expected["export"][dtype]


def test_it_is_resumed_with_the_bits_of_training_in_memory(folder, expected):
    run = folder / "run"
    step = blob_of(run)["step"]
    losses, planes = train_in_memory(
        run / "model", planes_of(run), step, expected["micro_batches"], load(run / "config.yaml")[0].train
    )
    result = call("train", "--config", "run.yaml", "--resume")
    assert [line["loss"] for line in metrics_of(run)[step:]] == losses
    assert result["loss"] == losses[-1]
    assert differing(planes_of(run), planes) == []


def train_in_memory(folder, planes, step, steps, settings):
    """Losses and planes of stock training that came to ``planes`` after ``step`` steps, and goes on with ``steps``."""
    dtype = DTYPES[settings.precision]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).train()
    leaves = untie(model)
    masters = {name: torch.nn.Parameter(planes[name, "master"].clone()) for name in leaves}
    write_weights(leaves, masters, dict.fromkeys(leaves, dtype))
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [master for name, master in masters.items() if is_matrix(name, master) == decays],
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=True,
    )
    for name, master in masters.items():
        moments = {plane: planes[name, plane].clone() for plane in ("exp_avg", "exp_avg_sq")}
        optimizer.state[master] = {"step": torch.tensor(float(step)), **moments}
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, 0, settings.max_steps).lr_lambdas[0]
    losses = []
    for number, batches in enumerate(steps, start=step):
        tensors = [{name: torch.tensor(rows) for name, rows in batch.items()} for batch in batches]
        loss, gradients = accumulate(model, leaves, tensors)
        losses.append(loss)
        for name, master in masters.items():
            master.grad = gradients[name]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(number)
        optimizer.step()
        write_weights(leaves, masters, dict.fromkeys(leaves, dtype))
    after = {}
    for name, master in masters.items():
        after[name, "weight"] = leaves[name][0].detach()
        after[name, "master"] = master.detach()
        after |= {(name, plane): optimizer.state[master][plane] for plane in ("exp_avg", "exp_avg_sq")}
    return losses, after
