"""What is wrong with a model folder is told before anything is built or written: one sentence, with the numbers."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from families import run
from megatrain_io.models.hub_names import HubNames
from megatrain_io.models.safetensors import TENSORS_MAX
from small_models import VOCABULARY, make_source, small_config


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Model folders by family, made once."""
    made = {}

    def source(family, **values):
        key = (family, repr(sorted(values.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            config = small_config(family)
            for name, value in values.items():
                setattr(config, name, value)
            make_source(made[key], config)
        return made[key]

    return source


def settings_of(source, here, *more):
    return (
        f"model={source / 'model'}", f"output_dir={here}", f"data.train={source / 'train.jsonl'}", "max_steps=1",
        "precision=fp32", "device=cpu", "memory.io_backend=threads", "memory.ram=64MiB", *more,
    )  # fmt: skip


def refusal(*arguments, code=5):
    """The sentence that a command is refused with."""
    result = run(*arguments, "--json")
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)["error"]["message"]


def changed(source, tmp_path, change):
    """A copy of a model folder whose tensors ``change`` was given."""
    folder = shutil.copytree(source / "model", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# ------------------------------------------------------------------------------------------- positions


# Tables of positions: of parameters, and of slopes.
TABLES = {"gpt2": "n_positions", "mpt": "max_seq_len"}


@pytest.mark.parametrize("family", TABLES)
def test_rows_longer_than_a_table_of_positions_are_refused_by_plan_and_train(sources, tmp_path, family):
    source = sources(family, **{TABLES[family]: 32})
    for arguments in (
        ("plan", source / "model", "max_length=64"),
        ("train", *settings_of(source, tmp_path / "run", "max_length=64")),
    ):
        said = refusal(*arguments, code=2)
        assert (
            f"data.max_length is 64, and the model has 32 positions ({TABLES[family]} in config.json)" in said
        )
        assert "set data.max_length=32 or less" in said
        assert not (tmp_path / "run").exists()
    assert run("plan", source / "model", "max_length=32").exit_code == 0
    trained = run("train", *settings_of(source, tmp_path / "run", "max_length=32"))
    assert trained.exit_code == 0, trained.output
    said = refusal("generate", tmp_path / "run", "--prompt", "the fox", code=2)
    assert "the model 32 positions" in said
    assert "max_new_tokens is 64, and may be 26" in said
    answered = run("generate", tmp_path / "run", "--prompt", "the fox", "--max-new-tokens", "26")
    assert answered.exit_code == 0, answered.output
    said = refusal("generate", tmp_path / "run", "--prompt", "the fox " * 5, code=2)
    assert "shorten the prompt to 32 tokens or less" in said


def test_rows_longer_than_rotary_positions_are_noted(sources, tmp_path):
    source = sources("llama", max_position_embeddings=32)
    planned = run("plan", source / "model", "max_length=64", "--json")
    assert planned.exit_code == 0
    note = "data.max_length is 64, and the model was made for 32 positions (max_position_embeddings in config.json)"
    assert note in planned.stdout
    trained = run("train", *settings_of(source, tmp_path / "run", "max_length=64"))
    assert trained.exit_code == 0
    assert note in " ".join(trained.stderr.split())
    assert note not in run("plan", source / "model", "max_length=32", "--json").stdout


def test_rows_that_change_the_rotary_table_of_later_ones_are_refused(sources, tmp_path):
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    source = sources("llama", max_position_embeddings=32, rope_parameters=dynamic)
    said = refusal("train", *settings_of(source, tmp_path / "run", "max_length=64"), code=2)
    assert (
        "a longer row changes the rotary table of those after it, which a resumed run does not know" in said
    )
    assert "set data.max_length=32 or less" in said
    trained = run("train", *settings_of(source, tmp_path / "run", "max_length=32"))
    assert trained.exit_code == 0, trained.output


# ---------------------------------------------------------------------------------------------- values


def spoil(name, *values):
    def change(tensors):
        tensors[name].view(-1)[torch.tensor([5, 9, 10][: len(values)])] = torch.tensor(values)

    return change


NAN, INF = float("nan"), float("inf")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "values", "counts"),
    [
        (UP, (NAN,), (1, 0)),
        (UP, (INF, -INF, NAN), (1, 2)),
        ("model.norm.weight", (-INF,), (0, 1)),
        ("model.embed_tokens.weight", (INF, -INF), (0, 2)),
    ],
    ids=str,
)
def test_import_names_tensor_and_count_of_what_is_not_finite(
    sources, tmp_path, name, values, counts, precision
):
    folder = changed(sources("llama"), tmp_path, spoil(name, *values))
    said = refusal("import", folder, tmp_path / "run", "--precision", precision)
    assert f"{name} [" in said
    assert (
        f"has values that are not finite ({counts[0]} not a number, {counts[1]} infinite), the first at ["
        in said
    )
    assert not (tmp_path / "run").exists()


def test_large_values_whose_sum_is_infinite_are_imported(sources, tmp_path):
    folder = changed(sources("llama"), tmp_path, spoil("model.norm.weight", 3e38, 3e38, 3e38))
    assert run("import", folder, tmp_path / "run").exit_code == 0


def test_tied_tensors_that_are_not_finite_are_told_as_that_and_not_as_different(sources, tmp_path):
    source = sources("llama tied")

    def tie(tensors):
        spoil("model.embed_tokens.weight", NAN)(tensors)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    said = refusal("import", changed(source, tmp_path, tie), tmp_path / "run")
    assert "model.embed_tokens.weight [" in said
    assert "(1 not a number, 0 infinite)" in said


# ----------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("prefix", "what"),
    [
        ("_orig_mod.", "from a model wrapped by torch.compile"),
        ("module.", "from a model wrapped by DistributedDataParallel"),
        ("module._orig_mod.", "from a model wrapped by torch.compile"),
        ("_forward_module.", "from a model wrapped by Lightning"),
        ("base_model.model.", "from a model wrapped by peft"),
    ],
)
def test_names_of_a_wrapped_model_are_told_as_what_they_are_and_the_cure_helps(
    sources, tmp_path, prefix, what
):
    folder = changed(
        sources("llama"), tmp_path, lambda tensors: {prefix + name: each for name, each in tensors.items()}
    )
    said = refusal("import", folder, tmp_path / "run")
    assert f"the files were saved {what}" in said
    if "rename the tensors to what is left without" not in said:
        return
    while prefix:  # one layer after the other, as it is told
        mark = said.split("left without ")[1].split(";")[0]
        assert mark in prefix
        prefix = prefix.replace(mark, "")
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {name.replace(mark, ""): each for name, each in tensors.items()}, folder / "model.safetensors"
        )
        if prefix:
            said = refusal("import", folder, tmp_path / "run")
    assert run("import", folder, tmp_path / "run").exit_code == 0


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("v_head.summary.weight", "with a value head"),
        ("score.weight", "with a head that classifies"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "with the adapter beside the model"),
    ],
)
def test_tensors_beside_the_model_are_told_as_what_they_are(sources, tmp_path, name, what):
    folder = changed(sources("llama"), tmp_path, lambda tensors: {**tensors, name: torch.zeros(1, 3)})
    said = refusal("import", folder, tmp_path / "run")
    assert f"the files were saved {what}" in said
    assert name in said


# ---------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("num_hidden_layers", 10**9, "1,000,000,000, and a model has at most 2,048"),
        ("num_hidden_layers", int("9" * 400), "a number of 400 digits, and a model has at most 2,048"),
        ("num_hidden_layers", 0, "0, and a model has at least 1"),
        ("num_labels", 10**10, "10,000,000,000, and a model has at most 1,048,576"),
        ("intermediate_size", 10**15, "1,000,000,000,000,000, and a model has at most 2,147,483,647"),
        ("max_position_embeddings", 10**13, "10,000,000,000,000, and a model has at most"),
        ("hidden_size", -5, "-5, and a model has at least 1"),
        ("attention_dropout", 1e9, "1e+09, and a model has at most 1"),
        ("attention_dropout", -0.5, "-0.5, and a model has at least 0"),
        ("layer_types", ["full_attention"] * 10**6, "1,000,000 entries, at most 65,536"),
        ("text_config", {"num_labels": 10**10}, "10,000,000,000, and a model has at most"),
        ("num_local_experts", 10**8, "100,000,000, and a model has at most 16,384"),
    ],
    ids=lambda each: each if isinstance(each, str) and " " not in each else "",
)
def test_numbers_that_no_model_has_are_refused_before_anything_is_built(sources, tmp_path, key, value, bound):
    folder = shutil.copytree(sources("llama") / "model", tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for arguments in (("plan", folder), ("import", folder, tmp_path / "run")):
        said = refusal(*arguments)
        assert bound in said
        assert str(path) in said


@pytest.mark.parametrize(
    ("family", "values", "reason"),
    [
        (
            "llama",
            {"hidden_size": 2**22, "num_hidden_layers": 4},
            "parameters, and at most 8,796,093,022,208",
        ),
        ("gptj", {"n_positions": 2**30}, "tables of masks and positions take more than 2,147,483,648 bytes"),
    ],
)
def test_numbers_that_are_large_together_are_refused(tmp_path, family, values, reason):
    config = AutoConfig.for_model(family, **values)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    assert reason in refusal("plan", tmp_path)


def test_more_tensors_than_any_model_has_are_refused(sources, tmp_path):
    folder = shutil.copytree(sources("llama") / "model", tmp_path / "model")

    def write(count):
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = json.dumps({f"t{number}": entry for number in range(count)}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)

    write(TENSORS_MAX + 1)
    said = refusal("import", folder, tmp_path / "run")
    assert "has a header of 262,145 tensors, at most 262,144 are read from a file" in said
    write(10_000)
    said = refusal("import", folder, tmp_path / "run")
    assert "the files hold 10,000 tensors, and a LlamaForCausalLM of their config.json is made of" in said


def test_a_mixture_of_many_experts_has_room_for_the_tensors_of_its_files():
    values = {"num_local_experts": 2000, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "hidden_size": 32}
    config = AutoConfig.for_model(
        "mixtral", **values, intermediate_size=16, num_attention_heads=4, head_dim=8
    )
    names = HubNames(config, torch.bfloat16)
    shapes = names.file_shapes()
    assert len(shapes) > 3 * 2 * 2000
    assert names.plan(shapes)


@pytest.mark.parametrize("depth", [40, 400, 900, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [('{"a": ', "}"), ("[", "]")], ids=["objects", "lists"])
def test_nesting_without_end_is_refused(sources, tmp_path, depth, opening, closing):
    """Copying a configuration of 400 objects in each other ended with a traceback."""
    folder = shutil.copytree(sources("llama") / "model", tmp_path / "model")
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(f'{text}, "deep": {opening * depth}1{closing * depth}}}')
    message = refusal("import", folder, tmp_path / "run", "--precision", "fp32")
    assert "nested more than 32 deep" in message or "cannot be read" in message
    assert not (tmp_path / "run").exists()
