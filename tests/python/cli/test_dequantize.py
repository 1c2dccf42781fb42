"""Weights in fp8 with scales by blocks: imported as the numbers that they stand for, trained and exported as such."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import PROMPT, run, stock_text
from small_models import make_source, small_config

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [16, 32]}
COMMON = ("--precision", "fp32", "--io-backend", "threads", "--json")


def quantise(folder):
    """Turn projections into fp8 with scales by blocks, and return what all tensors mean."""
    path = folder / "model.safetensors"
    tensors, meant = load_file(path), {}
    for name, tensor in list(tensors.items()):
        meant[name] = tensor
        if "_proj" not in name:
            continue
        rows, columns = tensor.shape
        grid = (-(-rows // 16), -(-columns // 32))
        scales = torch.rand(grid, generator=torch.Generator().manual_seed(len(name))) + 0.5
        by_element = scales.repeat_interleave(16, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
        tensors[name] = (tensor / by_element).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        meant[name] = tensors[name].float() * by_element
    save_file(tensors, path, metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": FP8}))
    return meant


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama whose projections are in fp8, and what they stand for."""
    here = tmp_path_factory.mktemp("fp8")
    make_source(here, small_config("llama"))
    return here, quantise(here / "model")


def message_of(result):
    return json.loads(result.stdout)["error"]["message"]


def test_fp8_weights_are_refused_with_the_option_that_imports_them(source, tmp_path):
    (folder, meant), here = source, tmp_path / "run"
    refused = run("import", folder / "model", here, *COMMON)
    assert refused.exit_code == 5
    assert "import --dequantize" in message_of(refused)
    planned = run("plan", folder / "model", "precision=fp32", "device=cpu", "max_length=32", "--json")
    assert planned.exit_code == 0, planned.stdout
    assert "import --dequantize" in " ".join(json.loads(planned.stdout)["notes"])
    assert run("import", folder / "model", here, "--dequantize", *COMMON).exit_code == 0
    assert run("export", here, tmp_path / "out").exit_code == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == meant.keys()
    assert all(torch.equal(exported[name], meant[name]) for name in meant)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    settings = (
        f"model={folder / 'model'}", f"output_dir={here}", f"data.train={folder / 'train.jsonl'}", "max_length=32",
        "max_steps=1", "gradient_accumulation_steps=1", "device=cpu", "memory.io_backend=threads", "memory.ram=64MiB",
    )  # fmt: skip
    trained = run("train", *settings, "--json")
    assert trained.exit_code == 0, trained.stdout
    assert run("export", here, tmp_path / "trained").exit_code == 0
    said = run("generate", here, "--prompt", PROMPT, "--max-new-tokens", 8, "--json")
    assert json.loads(said.stdout)["text"] == stock_text(tmp_path / "trained")


def test_another_quantisation_is_refused_with_where_an_original_is_found(source, tmp_path):
    folder = Path(shutil.copytree(source[0] / "model", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    refused = run("import", folder, tmp_path / "run", "--dequantize", *COMMON)
    assert refused.exit_code == 5
    assert "GPTQ 4-bit" in message_of(refused)
    assert "BF16" in message_of(refused)


def test_saved_buffers_of_an_fp8_model_are_made_again_from_its_files(tmp_path):
    make_source(tmp_path, small_config("deepseek_v3"))
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:
        tensors[name] += torch.arange(tensors[name].numel())
    save_file(tensors, path, metadata={"format": "pt"})
    quantise(tmp_path / "model")
    here = tmp_path / "run"
    made = run("import", tmp_path / "model", here, "--dequantize", *COMMON)
    assert made.exit_code == 0, made.output
    kept = here / "model" / "buffers.safetensors"
    before = kept.read_bytes()
    kept.unlink()
    again = run("export", here, tmp_path / "out")
    assert again.exit_code == 0, again.output
    assert kept.read_bytes() == before
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], tensors[name]) for name in biases)


def test_layers_that_are_only_carried_have_their_scales_applied(tmp_path):
    """They were exported in fp8 without their scales: other matrices than the source's."""
    make_source(tmp_path, small_config("deepseek_v3"))
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.61.eh_proj.weight"
    tensors[name] = torch.randn(40, 70, generator=torch.Generator().manual_seed(5))
    tensors["model.layers.61.enorm.weight"] = torch.ones(7)
    save_file(tensors, path, metadata={"format": "pt"})
    meant = quantise(tmp_path / "model")
    here = tmp_path / "run"
    assert run("import", tmp_path / "model", here, "--dequantize", *COMMON).exit_code == 0
    kept = here / "model" / "carried.safetensors"
    before = kept.read_bytes()
    kept.unlink()
    assert run("export", here, tmp_path / "out").exit_code == 0
    assert kept.read_bytes() == before
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == meant.keys()
    assert exported[name].dtype == torch.bfloat16
    assert torch.equal(exported[name], meant[name].bfloat16())
    assert torch.equal(exported["model.layers.61.enorm.weight"], torch.ones(7))


def test_an_fp8_architecture_is_verified_by_its_configuration(source, tmp_path):
    """It was refused with an option that verify has not, although no weights are read."""
    shutil.copy(source[0] / "model" / "config.json", tmp_path)
    result = run("verify", "--model", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["equal"]
