"""What must be said of some models beside their folder: by keys and options, and kept with the run."""

import json
import re

import pytest
from transformers import AutoConfig

from families import PROMPT, run, stock_text
from megatrain_io.generate import Generator
from published import make_folder, published_config
from small_models import make_source, small_config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose blocks transformers does not mark."""
    folder = tmp_path_factory.mktemp("unmarked")
    make_source(folder, small_config("openai-gpt"))
    return folder


def settings_of(source, here, *more):
    return (
        f"model={source / 'model'}", f"output_dir={here}", f"data.train={source / 'train.jsonl'}", "max_length=32",
        "max_steps=2", "gradient_accumulation_steps=1", "precision=fp32", "device=cpu", "memory.io_backend=threads",
        "memory.ram=64MiB", *more,
    )  # fmt: skip


def message_of(result):
    return json.loads(result.stdout)["error"]["message"]


def test_the_advice_of_a_refusal_works_as_printed_and_is_kept_with_the_run(source, tmp_path):
    here = tmp_path / "run"
    refused = run("import", source / "model", here, "--json")
    assert refused.exit_code == 5
    option, name = re.search(r"import: (--block-list) NAME\): it has (\S+) \(", message_of(refused)).groups()
    common = ("--precision", "fp32", "--io-backend", "threads")
    assert run("import", source / "model", here, option, name, *common).exit_code == 0
    assert json.loads((here / "run.json").read_text())["model_options"] == {"block_list": name}
    # None of these is told again.
    assert run("train", *settings_of(source, here)).exit_code == 0
    assert run("export", here, here / "out").exit_code == 0
    said = run("generate", here, "--prompt", PROMPT, "--max-new-tokens", 8, "--json")
    assert json.loads(said.stdout)["text"] == stock_text(here / "out")
    other = run(
        "train", *settings_of(source, here, "model_options.block_list=h", "max_steps=3"), "--resume", "--json"
    )
    assert other.exit_code == 2
    assert f'model_options.block_list: {here} was imported with "{name}", now "h"' in message_of(other)


def test_plan_and_train_follow_the_key(source, tmp_path):
    refused = run("plan", source / "model", "--json")
    key, name = re.search(
        r"by (model_options\.block_list)=NAME .* it has (\S+) \(", message_of(refused)
    ).groups()
    assert run("plan", source / "model", f"{key}={name}", "max_length=32").exit_code == 0
    here = tmp_path / "run"
    assert (
        run("train", *settings_of(source, here, f"{key}={name}", "attn_implementation=eager")).exit_code == 0
    )
    kept = {"block_list": name, "attn_implementation": "eager"}
    assert json.loads((here / "run.json").read_text())["model_options"] == kept
    with Generator.open(here, engine="threads") as generator:
        assert generator._model.partition.spec.attn_implementation == "eager"


def test_a_miniature_is_read_at_the_import_and_need_not_be_there_later(source, tmp_path):
    small, here = tmp_path / "small", tmp_path / "run"
    small.mkdir()
    config = AutoConfig.for_model("openai-gpt", vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    (small / "config.json").write_text(config.to_json_string(use_diff=False))
    named = ("block_list=transformer.h", f"model_options.miniature={small}")
    trained = run("train", *settings_of(source, here, *named), "--json")
    assert trained.exit_code == 0, trained.stdout
    (small / "config.json").unlink()
    small.rmdir()
    assert run("generate", here, "--prompt", PROMPT, "--max-new-tokens", 2).exit_code == 0
    done = run("train", *settings_of(source, here, *named), "--resume", "--json")
    assert "has done all its 2 steps" in message_of(done)
    kept = json.loads((here / "run.json").read_text())["model_options"]["miniature"]
    assert kept["n_embd"] == 16


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model_type": "gpt2"}, "is of model_type 'gpt2', and the model of 'openai-gpt'"),
        ({"model_type": "openai-gpt", "n_embd": "wide"}, "transformers does not take its config.json"),
        (None, "config.json"),
    ],
    ids=["another", "wrong", "none"],
)
def test_a_miniature_that_is_none_is_refused(source, tmp_path, content, reason):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    options = ("--miniature", tmp_path, "--block-list", "transformer.h", "--json")
    refused = run("import", source / "model", tmp_path / "run", *options)
    assert refused.exit_code in (2, 5), refused.exception
    assert reason in message_of(refused)
    assert not (tmp_path / "run").exists()


def test_a_list_that_is_not_there_is_refused_with_those_that_are(source, tmp_path):
    refused = run("import", source / "model", tmp_path / "run", "--block-list", "layers", "--json")
    assert refused.exit_code == 5
    assert "no module list layers (model_options.block_list): it has transformer.h" in message_of(refused)


def test_a_miniature_may_be_of_more_than_text_or_of_a_foreign_type(tmp_path):
    kind, config = published_config("gemma3")
    folder = make_folder(tmp_path, config, "fp32", kind)
    small = tmp_path / "small"
    small.mkdir()
    options = ("--miniature", small, "--precision", "fp32", "--io-backend", "threads", "--json")
    content = json.loads((folder / "config.json").read_text())
    # What a stranger's config.json names is not looked for: neither fetched, nor asked for.
    content["text_config"] |= {"attn_implementation": "somebody/kernel:run", "experts_implementation": "a/b"}
    (small / "config.json").write_text(json.dumps(content))
    imported = run("import", folder, tmp_path / "run", *options)
    assert imported.exit_code == 0, imported.output
    assert run("verify", "--model", folder, "--miniature", small).exit_code == 0
    foreign = json.loads((folder / "config.json").read_text())["text_config"]
    words = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_of_ours"}
    (small / "config.json").write_text(json.dumps(foreign | words))
    imported = run("import", folder, tmp_path / "another", *options)
    assert imported.exit_code == 0, imported.output
    (small / "config.json").write_text(json.dumps(foreign | {"num_hidden_layers": 10**9}))
    refused = run("import", folder, tmp_path / "third", *options)
    assert "model_options.miniature: num_hidden_layers is 1,000,000,000" in message_of(refused)
