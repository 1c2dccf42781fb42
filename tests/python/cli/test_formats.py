"""Tensors of several formats in one store, by the command line: the bits are those of stock training in memory.

Routers that architectures keep in fp32 beside bf16, parameters that they do not train, and those that no gradient
reaches: each lies in a record of its format, and everything that reads or writes weights goes by that.
"""

import json
import os
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from families import PROMPT, run, stock_text
from megatrain_io.data.batch import IGNORE_INDEX
from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.planning import resolve
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.open_store import open_store
from reference.reference import Hyperparameters, train
from small_models import make_source, small_config

PLANES = ("weight", "master", "exp_avg", "exp_avg_sq")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KEPT, FROZEN, UNREACHED = r"mlp\.gate\.weight", "e_score_correction_bias", r"\.indexer\."
CLIPPED = ("train.max_grad_norm=0.7",)
# Architecture, precision, further settings; what is in a record of f32, and what is frozen.
OF_FAMILIES = pytest.mark.skipif(not os.environ.get("MEGATRAIN_FAMILIES"), reason="make families runs it")
CASES = {
    "deepseek_v3 bf16": ("deepseek_v3", "bf16", CLIPPED, KEPT, None),
    "ernie4_5_moe bf16": ("ernie4_5_moe", "bf16", (), KEPT, FROZEN),
    "deepseek_v32 fp32": ("deepseek_v32", "fp32", (), None, UNREACHED),
}
SWEEP = {
    "deepseek_v3 fp32": ("deepseek_v3", "fp32", (), None, None),
    "glm4_moe bf16": ("glm4_moe", "bf16", (), KEPT, None),
    "glm4_moe fp32": ("glm4_moe", "fp32", CLIPPED, None, None),
    "ernie4_5_moe fp32": ("ernie4_5_moe", "fp32", CLIPPED, None, FROZEN),
    "deepseek_v32 bf16": ("deepseek_v32", "bf16", CLIPPED, KEPT, UNREACHED),
    "afmoe bf16": ("afmoe", "bf16", (), None, r"\.expert_bias"),
    "nemotron_h bf16": ("nemotron_h", "bf16", (), r"mixer\.gate\.weight", None),
}

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(resolve, "calibrate", lambda _job: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def steps(monkeypatch):
    """The micro-batches and the AdamW of each step that is trained; the first time, step 3 is interrupted."""
    seen, done = {}, PagedPartition.train_step

    def watched(model, micro_batches, adamw, *args, **how):
        if adamw.step == 3 and 3 not in seen:
            seen[3] = None
            raise KeyboardInterrupt
        seen[adamw.step] = (list(micro_batches), adamw)
        return done(model, micro_batches, adamw, *args, **how)

    monkeypatch.setattr(PagedPartition, "train_step", watched)
    return seen


def as_stock_loops_have_it(micro_batch):
    ignored = torch.full_like(micro_batch.shift_labels[:, :1], IGNORE_INDEX)
    labels = torch.cat([ignored, micro_batch.shift_labels[:, :-1]], dim=1)
    optional = {name: getattr(micro_batch, name) for name in ("position_ids", "attention_mask")}
    given = {name: value for name, value in optional.items() if value is not None}
    return {"input_ids": micro_batch.input_ids, "labels": labels, **given}


def in_memory(source, dtype, steps, coefficients):
    """What stock training makes of the model, and the stock model with its weights."""
    load = partial(AutoModelForCausalLM.from_pretrained, source)
    stock, whole = load(dtype=dtype), load(dtype=torch.float32).train()
    kept = [name for name, parameter in stock.named_parameters() if parameter.dtype == torch.float32]
    adamws = [adamw for _, adamw in steps]
    how = Hyperparameters(
        [a.learning_rate for a in adamws], adamws[0].beta1, adamws[0].beta2, adamws[0].eps, 0.1
    )
    batches = [[as_stock_loops_have_it(batch) for batch in micro_batches] for micro_batches, _ in steps]
    result = train(whole, batches, how, dtype, clip_coefficients=coefficients, keep_in_fp32=kept)
    for name, parameter in stock.named_parameters():
        assert parameter.dtype == result.weight[name].dtype, name
        parameter.data = result.weight[name]
    return result, stock


def files_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def check_files(folder, stock, tmp_path):
    """Names, dtypes and bits of an exported folder are those that stock transformers writes."""
    stock.save_pretrained(tmp_path / "expected")
    found, expected = files_of(folder), files_of(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if tensor.dtype != expected[name].dtype] == []
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=OF_FAMILIES) for name in SWEEP)])
def test_the_bits_are_those_of_stock_training(tmp_path, steps, name):
    family, precision, options, in_f32, frozen = (CASES | SWEEP)[name]
    make_source(tmp_path, small_config(family))
    source, here, out = tmp_path / "model", tmp_path / "run", tmp_path / "out"
    settings = [
        f"model={source}", f"output_dir={here}", f"data.train={tmp_path / 'train.jsonl'}", "data.max_length=32",
        "train.max_steps=3", "train.gradient_accumulation_steps=2", "train.learning_rate=1.0e-3",
        "train.weight_decay=0.1", f"train.precision={precision}", "train.device=cpu", "memory.io_backend=threads",
        "memory.threads=1", "memory.ram=1GiB", *options,
    ]  # fmt: skip
    assert run("train", *settings, "--json").exit_code == 130
    resumed = run("train", *settings, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert run("export", here, out, "--json").exit_code == 0

    metrics = [json.loads(line) for line in (here / "metrics.jsonl").read_text().splitlines()]
    coefficients = [line["clip_coefficient"] for line in metrics]
    assert (min(coefficients) < 1) == bool(options)
    made = [steps[number] for number in (1, 2, 3)]
    result, stock = in_memory(source, DTYPES[precision], made, coefficients)
    assert [line["loss"] for line in metrics] == result.losses
    with open_store(RunFolder(here), engine="threads") as state:
        layout = state.layout
        formats = {place.name: layout.records[place.record].format for place in layout.tensors()}
        trained = {name for name, each in formats.items() if not each.startswith("raw")}
        untouched = result.master.keys() - trained
        assert trained <= result.master.keys()
        assert not any(result.exp_avg_sq[name].any() for name in untouched)
        found = {
            (place.name, plane): state.read_tensor(place, plane)
            for place in layout.tensors()
            for plane in (PLANES if place.name in trained else PLANES[:1])
        }
    expected = {
        (name, plane): value
        for plane in PLANES
        for name, value in getattr(result, plane).items()
        if plane == "weight" or name in trained
    }
    assert found.keys() == expected.keys()
    assert [key for key, value in found.items() if not torch.equal(value, expected[key])] == []
    dtype_of = {"bf16": torch.bfloat16, "raw16": torch.bfloat16, "f32": torch.float32, "raw32": torch.float32}
    assert {name: dtype_of[each] for name, each in formats.items()} == {
        name: weight.dtype for name, weight in result.weight.items()
    }
    for pattern, kinds in ((in_f32, {"f32"} if precision == "bf16" else set()), (frozen, {"raw16", "raw32"})):
        of_kind = {name for name, each in formats.items() if each in kinds}
        assert of_kind == {name for name in formats if pattern and re.search(pattern, name)}

    check_files(out, stock, tmp_path)
    said = json.loads(run("generate", here, "--prompt", PROMPT, "--max-new-tokens", 8, "--json").stdout)[
        "text"
    ]
    assert stock_text(out) in (None, said)
    assert ("parameters stay as they are" in " ".join(resumed.output.split())) == bool(frozen)
