"""Models as they lie on the hub, by the command line: what is not trained is there afterwards, to the bit."""

import hashlib
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM

import megatrain_io as mt
from megatrain_io.errors import ModelFilesError
from megatrain_io.models.generation_config import end_tokens
from megatrain_io.runs.folder import RunFolder
from model_sources import differing
from published import (
    DTYPES,
    add_tensors,
    call,
    edit_config,
    in_memory,
    make_folder,
    published_config,
    tensors_of,
    text_config,
    trained,
)

OF_FAMILIES = pytest.mark.skipif(not os.environ.get("MEGATRAIN_FAMILIES"), reason="make families runs it")


def load(folder, precision):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision], trust_remote_code=False)


@pytest.mark.parametrize(
    ("model_type", "precision", "buffer"),
    [
        ("deepseek_v3", "fp32", "model.layers.1.mlp.gate.e_score_correction_bias"),
        pytest.param("minimax_m2", "bf16", "model.layers.2.mlp.e_score_correction_bias", marks=OF_FAMILIES),
        pytest.param("gemma4_text", "bf16", "model.layers.0.layer_scalar", marks=OF_FAMILIES),
    ],
)
def test_saved_buffers_are_computed_with_and_exported(tmp_path, monkeypatch, model_type, precision, buffer):
    source = make_folder(tmp_path, text_config(model_type), precision)
    steps, losses = trained(tmp_path, precision, monkeypatch)
    stock = load(source, precision)
    assert stock.get_buffer(buffer).abs().max() > 0.1
    expected = in_memory(stock, steps)
    assert losses == expected.losses
    exported = load(tmp_path / "out", precision)
    assert differing(dict(exported.named_parameters()), expected.weight) == []
    assert differing(dict(exported.named_buffers()), dict(stock.named_buffers())) == []
    stock.save_pretrained(tmp_path / "stock")
    before, after = tensors_of(tmp_path / "stock"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name: each.dtype for name, each in before.items()} == {
        name: each.dtype for name, each in after.items()
    }
    # With the constructor's values it would be another model.
    for each in ("e_score_correction_bias", "layer_scalar"):
        for name, value in stock.named_buffers():
            if name.endswith(each):
                value.fill_(each == "layer_scalar")
    assert in_memory(stock, steps[:1]).losses != losses[:1]


def next_token_layer(folder, prefix, block):
    """The tensors of a layer that predicts one more token: a copy of a block, and what joins two hidden states."""
    inside = {
        name.replace(block, prefix): value
        for name, value in tensors_of(folder).items()
        if name.startswith(block)
    }
    assert inside
    of_its_own = ("eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    return inside | {
        prefix + name: torch.arange(8.0).bfloat16() + place for place, name in enumerate(of_its_own)
    }


def on_the_hub(model_type, source):
    """Give a folder what those of the hub have besides; the tensors that are added."""
    if model_type == "glm4_moe":
        further = next_token_layer(source, "model.layers.3.", "model.layers.2.")
    else:
        further = next_token_layer(source, "mtp.layers.0.", "backbone.layers.4.")
        code = "configuration_nemotron_h.NemotronHConfig"
        edit_config(
            source,
            without=("layers_block_type", "layer_types", "dtype"),
            torch_dtype="bfloat16",
            hybrid_override_pattern="ME*ME-",
            num_hidden_layers=6,
            auto_map={"AutoConfig": code},
        )
    add_tensors(source, further)
    return further


@pytest.mark.parametrize(("model_type", "precision"), [("glm4_moe", "bf16"), ("nemotron_h", "bf16")])
def test_a_mixture_of_experts_of_the_hub_is_exported_as_it_came(
    tmp_path, monkeypatch, caplog, model_type, precision
):
    source = make_folder(tmp_path, text_config(model_type), precision)
    further = on_the_hub(model_type, source)
    assert len(list(source.glob("*.safetensors"))) > 1
    steps, losses = trained(tmp_path, precision, monkeypatch)
    assert f"{len(further)} tensors" in caplog.text
    stock = load(source, precision)
    biases = {name: value.clone() for name, value in stock.named_buffers() if name.endswith("_bias")}
    assert biases
    assert all(value.abs().max() > 0.1 for value in biases.values())
    expected = in_memory(stock, steps)
    assert losses == expected.losses
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.copy_(expected.weight[name])
    stock.save_pretrained(tmp_path / "stock")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    # As stock saves what stock trained, and what stock passes over as it was.
    assert differing(after, tensors_of(tmp_path / "stock") | further) == []
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    # No code came along, and what is named as the dtype of torch is that of the files.
    old["dtype"] = old.pop("torch_dtype", old.get("dtype"))
    # What ends an answer by the tokenizer's chat template is added to what ends a text.
    assert end_tokens(new["eos_token_id"])[0] == old["eos_token_id"]
    assert new == {key: value for key, value in old.items() if key != "auto_map"} | {
        "eos_token_id": new["eos_token_id"]
    }
    exported = load(tmp_path / "out", precision)
    assert type(exported) is type(stock)
    assert differing(dict(exported.named_parameters()), expected.weight) == []
    assert differing({name: exported.get_buffer(name) for name in biases}, biases) == []
    call("generate", tmp_path / "run", "--prompt", "The quick", "--max-new-tokens", 3)


# ------------------------------------------------------------------------------- of more than text

NOT_TEXT = re.compile(r"vis(ual|ion)|audio|projector|^mtp\.")


def text_name(name):
    """Of a tensor of a published model in its text model."""
    inside = re.sub(r"^(model\.language_model|language_model\.model)\.", "model.", name)
    return inside.removeprefix("language_model.")


def as_text_model(published):
    """The text model alone, with the weights of a published one."""
    config = published.config.get_text_config()
    config.tie_word_embeddings = published.config.tie_word_embeddings
    text = AutoModelForCausalLM.from_config(config, dtype=published.dtype)
    state = {text_name(name): value for name, value in published.state_dict().items()}
    text.load_state_dict({name: state[name] for name in text.state_dict()})
    return text


def fed_with_text(published):
    """Let a published model compute its loss as the reference asks for it: not every forward passes the count on."""
    kind = type(published)

    class Fed(kind):
        def forward(self, labels, num_items_in_batch, **inputs):
            logits = super().forward(**inputs).logits
            loss = self.loss_function(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)
            return SimpleNamespace(loss=loss)

    published.__class__ = Fed


# By type: what a text model alone has of its own, and what makes it another one's.
MORE_THAN_TEXT = [
    ("gemma3", "fp32"),  # windows
    ("qwen3_5", "fp32"),  # recurrence
    ("gemma3n", "fp32"),  # inputs of the embedding for every block, keys and values for later ones; sound
    ("gemma4", "bf16"),  # the same, saved buffers; sound
    ("llama4", "fp32"),  # a causal language model inside
    ("qwen3_vl", "bf16"),  # no class for the text model alone
]
MORE_OF_FAMILIES = [
    ("mistral3", "bf16"),
    ("gemma3n", "bf16"),
    ("gemma4", "fp32"),
    ("llama4", "bf16"),
    ("qwen2_vl", "bf16"),
    ("qwen2_5_vl", "fp32"),
    ("qwen2_5_vl", "bf16"),
    ("qwen3_vl", "fp32"),
    ("qwen3_vl_moe", "bf16"),
    ("glm4v", "bf16"),
    ("glm4v_moe", "bf16"),
    ("internvl", "bf16"),
    ("llava", "bf16"),
]


@pytest.mark.parametrize(
    ("model_type", "precision"),
    [*MORE_THAN_TEXT, *(pytest.param(*each, marks=OF_FAMILIES) for each in MORE_OF_FAMILIES)],
)
def test_the_text_model_is_trained_and_all_else_is_carried_through(
    tmp_path, monkeypatch, caplog, model_type, precision
):
    if model_type == "gemma3n":
        pytest.importorskip("timm", reason="its images are read by a model of timm")
    kind, config = published_config(model_type)
    source = make_folder(tmp_path, config, precision, kind)
    assert len(list(source.glob("*.safetensors"))) > 1
    if model_type == "qwen3_5":
        add_tensors(source, {"mtp.fc.weight": torch.arange(12, dtype=torch.int64).view(3, 4)})
    (source / "preprocessor_config.json").write_text('{"size": 32}')
    steps, losses = trained(tmp_path, precision, monkeypatch)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    carried = {name: value for name, value in before.items() if NOT_TEXT.search(name)}
    assert len(carried) > 10
    told = re.search(
        rf"{len(carried)} tensors \([0-9.]+ MiB\) of ([\w, ]+) are carried through unchanged", caplog.text
    )
    assert {*told[1].split(", ")} == {name.removeprefix("model.").partition(".")[0] for name in carried}
    assert f"trains the text model of {kind.__name__}" in caplog.text
    assert before.keys() == after.keys()
    assert differing({name: after[name] for name in carried}, carried) == []
    stock = kind.from_pretrained(source, dtype=DTYPES[precision])
    buffers = {name: value.clone() for name, value in stock.named_buffers()}
    alone = None
    if type(config.text_config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        alone = as_text_model(stock).train()
    # The published class, given text alone, trains to the same bits.
    is_text = {name: not NOT_TEXT.search(name) for name, _ in stock.named_parameters()}
    for name, parameter in stock.train().named_parameters():
        parameter.requires_grad_(is_text[name])
    exported = kind.from_pretrained(tmp_path / "out", dtype=DTYPES[precision])
    found = {text_name(name): value for name, value in exported.named_parameters() if is_text[name]}
    if model_type != "llama4":  # transformers 5.24 runs it with images alone
        fed_with_text(stock)
        whole = in_memory(stock, steps)
        assert losses == whole.losses
        weight = {text_name(name): value for name, value in whole.weight.items() if is_text[name]}
        assert differing(found, weight) == []
    assert differing(dict(exported.named_buffers()), buffers) == []
    if alone is not None:
        expected = in_memory(alone, steps)
        assert losses == expected.losses
        assert differing(found, expected.weight) == []
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert new["architectures"] == [kind.__name__]
    assert new.keys() == old.keys()
    assert {name: new[name] for name in new if name != "text_config"} == {
        name: old[name] for name in old if name != "text_config"
    }
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 32}'
    text = call("generate", tmp_path / "run", "--prompt", "The quick", "--max-new-tokens", 3)
    assert text["text"] is not None


# ------------------------------------------------------------------------------------- what is kept

MTP = "model.layers.61.eh_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def imported_once(tmp_path_factory):
    """A folder with trained biases and a layer that predicts further tokens, and a run that was imported from it."""
    here = tmp_path_factory.mktemp("imported")
    source = make_folder(here, text_config("deepseek_v3"), "fp32")
    add_tensors(source, {MTP: torch.arange(24, dtype=torch.float16).view(4, 6)})
    call("import", source, here / "run", "--precision", "fp32", "--io-backend", "threads")
    return here


@pytest.fixture
def here(imported_once, tmp_path):
    """A copy of both, and of what the run remembers of its source."""
    shutil.copytree(imported_once, tmp_path / "here")
    info = tmp_path / "here" / "run" / "run.json"
    content = json.loads(info.read_text()) | {"source": str(tmp_path / "here" / "model")}
    info.write_text(json.dumps(content))
    return tmp_path / "here"


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["buffers.safetensors", "carried.safetensors"])
@pytest.mark.parametrize("is_lost", [False, True])
def test_what_was_kept_is_made_again_from_the_source_or_refused_by_name(here, caplog, name, is_lost):
    path = here / "run" / "model" / name
    before = path.read_bytes()
    path.unlink() if is_lost else damage(path)
    call("export", here / "run", here / "out")
    assert (
        f"{path} was {'missing' if is_lost else 'not the one of the import'}: it was made again from"
        in caplog.text
    )
    assert path.read_bytes() == before
    assert not (here / "run" / "model" / "remade.partial").exists()
    path.unlink() if is_lost else damage(path)
    shutil.rmtree(here / "model")
    told = call("export", here / "run", here / "other", code=5)
    assert f"{path} is {'missing' if is_lost else 'not the one of the import'}" in told["error"]["message"]
    assert "has no longer the weights of the import" in told["error"]["message"]
    assert not (here / "other").exists()


@pytest.mark.parametrize("change", ["name", "shape", "dtype"])
def test_buffers_that_another_version_of_transformers_has_not_are_refused(here, change):
    path, info = here / "run" / "model" / "buffers.safetensors", here / "run" / "run.json"
    buffers = safetensors.torch.load_file(path)
    value = buffers.pop(BIAS)
    changed = {
        "name": {BIAS.replace("gate.", ""): value},
        "shape": {BIAS: value[:1].clone()},
        "dtype": {BIAS: value.to(torch.float8_e4m3fn)},
    }[change]
    safetensors.torch.save_file(buffers | changed, path)
    content = json.loads(info.read_text())
    content["files"]["buffers.safetensors"] = [hashlib.sha256(path.read_bytes()).hexdigest()]
    info.write_text(json.dumps(content))
    commands = [("generate", here / "run", "--prompt", "The")]
    if change == "name":
        commands.append(("export", here / "run", here / "out"))
    for command in commands:
        told = call(*command, code=5)
        expected = "is F8_E4M3" if change == "dtype" else "go on with the version that it was imported with"
        assert expected in told["error"]["message"]


def test_a_link_in_the_place_where_files_are_made_again_is_not_followed(here, tmp_path):
    """What lay where it led to was removed: a run comes from others, too."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter").write_text("dear")
    (here / "run" / "model" / "remade.partial").symlink_to(mine)
    (here / "run" / "model" / "buffers.safetensors").unlink()
    call("export", here / "run", here / "out")
    assert (mine / "letter").read_text() == "dear"
    assert not (here / "run" / "model" / "remade.partial").is_symlink()


def test_clean_lists_what_a_process_left_that_was_killed_while_it_made_files_again(here):
    scratch = here / "run" / "model" / "remade.partial"
    scratch.mkdir()
    (scratch / "carried.safetensors").write_bytes(bytes(100))
    (here / "run" / "model" / "tokenizer.json.tmp").write_text("{")
    removed = call("clean", here / "run", "--yes")["removed"]
    assert {each["path"] for each in removed} == {str(scratch), f"{scratch.parent / 'tokenizer.json.tmp'}"}
    assert not scratch.exists()
    call("export", here / "run", here / "out")


def test_files_that_are_made_again_are_not_cleaned_away_meanwhile(here):
    folder = RunFolder(here / "run")
    (folder.model / "buffers.safetensors").unlink()
    with folder.importing():
        told = call("export", here / "run", here / "out", code=4)
    assert "another process imports into" in told["error"]["message"]
    call("export", here / "run", here / "out")


@pytest.mark.parametrize("name", ["buffers.safetensors", "carried.safetensors"])
def test_status_says_which_kept_file_is_missing(here, name):
    path = here / "run" / "model" / name
    assert call("status", here / "run")["files"] == []
    path.unlink()
    (said,) = call("status", here / "run")["files"]
    assert said.startswith(f"{path} is missing: the next command that needs it makes it again from")


def test_tensors_that_only_the_index_has_are_noted(here, caplog):
    index = here / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["visual.tower"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    call("import", here / "model", here / "another", "--precision", "fp32", "--io-backend", "threads")
    assert "the index of the weights names, 1 are in none of the files (visual.tower)" in caplog.text


def test_a_plan_counts_what_is_carried_by_config_json_alone(tmp_path):
    kind, config = published_config("gemma3")
    source = make_folder(tmp_path, config, "fp32", kind)
    tensors = tensors_of(source)
    carried = sum(
        each.nbytes
        for name, each in tensors.items()
        if "language_model" not in name and "lm_head" not in name
    )
    keys = ("train.precision=fp32", "train.device=cpu", "data.max_length=32", "memory.ram=1GiB")
    for path in source.glob("*.safetensors*"):
        path.unlink()
    plan = call("plan", source, *keys)
    assert plan["carried_bytes"] == carried
    assert not any("side inputs" in note for note in plan["notes"])


def test_nothing_of_the_source_is_needed_after_the_import(here):
    before = tensors_of(here / "model")
    shutil.rmtree(here / "model")
    call("export", here / "run", here / "out")
    assert differing(tensors_of(here / "out"), before) == []
    call("generate", here / "run", "--prompt", "The", "--max-new-tokens", 1)


def test_a_file_that_the_import_did_not_keep_is_not_read(here):
    source, run = make_folder(here / "second", text_config("minimax_m2"), "bf16"), here / "run 2"
    biases = {"model.layers.0.mlp.e_score_correction_bias": torch.zeros(4)}
    for path in source.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        old = {name: torch.zeros_like(each) for name, each in tensors.items() if "e_score" in name}
        safetensors.torch.save_file(tensors | old, path, metadata={"format": "pt"})
    call("import", source, run, "--precision", "bf16", "--io-backend", "threads")
    assert not (run / "model" / "buffers.safetensors").exists()
    safetensors.torch.save_file(biases, run / "model" / "buffers.safetensors")
    told = call("generate", run, "--prompt", "The", code=5)
    assert (
        "buffers.safetensors was not there at the import, and the model would read it"
        in told["error"]["message"]
    )


def test_a_loop_of_ones_own_has_the_buffers_of_its_folder(here):
    folder, options = here / "model", {"ram": "64MiB", "device": "cpu"}
    with mt.PagedModel.create(folder, here / "own", precision="fp32", **options) as model:
        before = model.evaluate([torch.arange(1, 20).view(1, -1)])
        assert any("layers.61 is carried through" in note for note in model.notes)
        model.save(here / "out")
    assert differing(tensors_of(here / "out"), tensors_of(folder)) == []
    stock = load(folder, "fp32")
    tokens = torch.arange(1, 20).view(1, -1)
    assert before == stock.train()(input_ids=tokens, labels=tokens).loss.item()
    with mt.PagedModel.open(folder, here / "own", **options) as model:
        assert model.evaluate([tokens]) == before
    for path in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        if BIAS in tensors:
            tensors[BIAS][0] += 1
            safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ModelFilesError, match="other values for the buffers of the model than when the file was made"
    ):
        mt.PagedModel.open(folder, here / "own", **options)


def test_a_model_whose_text_model_transformers_does_not_have_alone_is_refused_by_name(tmp_path):
    transformers.GlmOcrConfig().save_pretrained(tmp_path / "model")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    told = call("import", tmp_path / "model", tmp_path / "run", code=5)
    assert (
        "glm_ocr takes more than text, and no causal language model of transformers is known"
        in told["error"]["message"]
    )
