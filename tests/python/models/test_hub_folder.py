"""Model folders that cannot be imported: each is refused with what is wrong, and nothing is left behind."""

import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatrain_io.errors import (
    ModelFilesError,
    UnsupportedModelError,
)
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.runs.folder import RunFolder
from model_sources import NORM, TABLE, bring_in, check_refused, edit, rewrite, save
from reference.reference import tiny_config


@pytest.fixture
def source(tmp_path):
    """A sound model folder with one file of weights."""
    return save(tmp_path / "source", tiny_config("llama", tied=True))


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


# -------------------------------------------------------------------------------------- wrong input


def only_config(folder):
    (folder / "model.safetensors").unlink()


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def gguf(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "tiny.Q4.gguf")


def adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def lfs(folder, name="model.safetensors"):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n"
    (folder / name).write_text(text)


def truncated(folder):
    os.truncate(folder / "model.safetensors", 200_000)


def cut_in_header(folder):
    os.truncate(folder / "model.safetensors", 100)


def longer(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")


def quantised(**config):
    return lambda folder: edit(folder / "config.json", quantization_config=config)


def of_dtype(dtype):
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))


def config(text):
    return lambda folder: (folder / "config.json").write_text(text)


def foreign_code(folder):
    named = {"auto_map": {"AutoConfig": "configuration.Homemade"}, "architectures": ["HomemadeForCausalLM"]}
    edit(folder / "config.json", model_type="homemade", **named)


def link_out(folder):
    (folder.parent / "elsewhere").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../elsewhere")


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (shutil.rmtree, ModelFilesError, r"source does not exist.*hf download"),
        (lambda folder: (folder / "config.json").unlink(), ModelFilesError, "has no config.json"),
        (only_config, ModelFilesError, "has config.json but no weights"),
        (pickled, ModelFilesError, r"as pickle only \(pytorch_model.bin\).*save_pretrained\(OUT\)"),
        (gguf, ModelFilesError, r"as GGUF \(tiny.Q4.gguf\): give the file itself"),
        (adapter, ModelFilesError, "holds an adapter, not a model"),
        (lfs, ModelFilesError, r"is a Git-LFS pointer \(1\d\d bytes\).*git lfs pull"),
        (
            lambda folder: lfs(folder, "tokenizer.json"),
            ModelFilesError,
            r"tokenizer.json is a Git-LFS pointer",
        ),
        (truncated, ModelFilesError, r"is truncated: its header says [\d,]+ bytes, it has 200,000"),
        (cut_in_header, ModelFilesError, r"is truncated: its header says [\d,]+ bytes, it has 100\."),
        (longer, ModelFilesError, r"its header accounts for [\d,]+ only"),
        (
            lambda folder: (folder / "model.safetensors").write_text("abc"),
            ModelFilesError,
            "has 3 bytes, too few",
        ),
        (
            quantised(quant_method="gptq", bits=4),
            UnsupportedModelError,
            r"quantised \(GPTQ 4-bit\).*original model",
        ),
        (quantised(quant_method="awq", bits=4), UnsupportedModelError, r"\(AWQ 4-bit\)"),
        (quantised(load_in_8bit=True), UnsupportedModelError, r"\(BITSANDBYTES 8-bit\)"),
        (quantised(quant_method="fp8"), UnsupportedModelError, r"\(FP8\)"),
        (of_dtype(torch.float8_e4m3fn), UnsupportedModelError, "model.norm.weight is F8_E4M3"),
        (of_dtype(torch.int8), UnsupportedModelError, "model.norm.weight is I8"),
        (of_dtype(torch.float64), UnsupportedModelError, "model.norm.weight is F64"),
        (config("{"), ModelFilesError, "config.json cannot be read"),
        (config("[]"), ModelFilesError, "config.json is not a JSON object"),
        (config("{}"), UnsupportedModelError, "model_type None cannot be used"),
        (config('{"model_type": "homemade"}'), UnsupportedModelError, "model_type 'homemade' cannot be used"),
        (
            config('{"model_type": ["llama"], "architectures": ["A"]}'),
            UnsupportedModelError,
            "cannot be used",
        ),
        (foreign_code, UnsupportedModelError, "code that comes with a model is not run"),
        (link_out, ModelFilesError, r"tokenizer.json is a link out of the folder"),
    ],
)
def test_wrong_folders_are_refused(source, run, damage, kind, message):
    damage(source)
    check_refused(source, run, kind, message)


def test_a_path_to_a_file_is_refused(tmp_path, source, run):
    check_refused(source / "model.safetensors", run, ModelFilesError, "is a file: give the folder")
    check_refused(tmp_path / "x.gguf", run, ModelFilesError, "x.gguf does not exist")


@pytest.fixture
def sharded(tmp_path):
    folder = save(tmp_path / "sharded", tiny_config("llama", tied=False), max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) == 5
    return folder


def shard(number):
    return f"model-{number:05d}-of-00005.safetensors"


def test_missing_shards_are_named(sharded, run):
    (sharded / shard(3)).unlink()
    check_refused(sharded, run, ModelFilesError, rf"shard 3 of 5 is missing \({shard(3)}\)")
    (sharded / shard(5)).unlink()
    check_refused(sharded, run, ModelFilesError, rf"2 of 5 shards are missing \({shard(3)}, {shard(5)}\)")
    lfs(sharded, shard(3))
    lfs(sharded, shard(5))
    check_refused(sharded, run, ModelFilesError, rf"{shard(3)} is a Git-LFS pointer")
    (sharded / "model.safetensors.index.json").unlink()
    check_refused(sharded, run, ModelFilesError, r"but no model.safetensors.index.json")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "", "..", 3, "\0"]
)
def test_an_index_may_only_name_files_beside_it(sharded, run, name):
    index = sharded / "model.safetensors.index.json"
    edit(index, weight_map={TABLE: shard(1), NORM: name})
    check_refused(sharded, run, ModelFilesError, "only names of safetensors files in the same folder")
    edit(index, weight_map=[])
    check_refused(sharded, run, ModelFilesError, "has no weight_map")


def test_a_tensor_in_two_files_is_refused(sharded, run):
    first, second = (safetensors.torch.load_file(sharded / shard(number)) for number in (1, 2))
    name = next(iter(first))
    safetensors.torch.save_file(second | {name: first[name]}, sharded / shard(2))
    check_refused(sharded, run, ModelFilesError, rf"{name} is in both .*{shard(1)} and .*{shard(2)}")


def test_weights_may_be_links_into_the_cache_of_the_hub_but_nowhere_else(tmp_path, source, run):
    cache = tmp_path / "models--tiny"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copy(path, cache / "blobs" / path.stem)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.stem}")
    bring_in(snapshot, run)
    (source / "model.safetensors").rename(tmp_path / "secret")
    (source / "model.safetensors").symlink_to(tmp_path / "secret")
    check_refused(source, RunFolder(tmp_path / "second"), ModelFilesError, "is a link out of the folder")


def test_code_named_by_a_configuration_is_not_looked_for(source):
    edit(
        source / "config.json",
        attn_implementation="somebody/kernel",
        experts_implementation="somebody/kernel",
    )
    config = ModelFolder(source).config()
    assert config._attn_implementation is None
    assert config._experts_implementation is None


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b""])
def test_a_small_file_that_holds_no_object_is_refused_by_name(source, name, content):
    """The library that read it ended with a traceback, in generate, long after the import."""
    (source / name).write_bytes(content)
    with pytest.raises(ModelFilesError, match=rf"{name}.*[Ff]etch it again"):
        ModelFolder(source).companions()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("/runs/run/model", "OWNER/NAME"),
        ("run/model", "OWNER/NAME"),
        ("./model", "OWNER/NAME"),
        ("model", "OWNER/NAME"),
    ],
)
def test_a_folder_of_this_machine_is_not_taken_for_a_name_of_the_hub(tmp_path, monkeypatch, path, name):
    """A run without its model folder was told to fetch ``RUN/model`` from the hub."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFilesError, match=f"hf download {name} --local-dir DIR"):
        ModelFolder(Path(path))
