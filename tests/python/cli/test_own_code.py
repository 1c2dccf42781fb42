"""A model that the user wrote: its file runs where it was named, and nowhere else, and only as it was imported."""

import importlib.util
import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import megatrain_io as mt
from corpus import make_tokenizer, write
from families import NEW, PROMPT, stock_text
from megatrain_io.cli.app import app
from megatrain_io.models import own_code
from small_models import TEXTS, VOCABULARY, make_source, small_config

CODE = '''
"""A decoder with a list of blocks."""
with open({marker!r}, "a") as mark:
    mark.write("ran ")
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput


class HandConfig(PreTrainedConfig):
    model_type = "handwritten"

    def __init__(self, vocab_size=64, hidden_size=32, num_hidden_layers=3, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden):
        seen = self.norm(hidden).cumsum(1) / (1 + torch.arange(hidden.shape[1]))[:, None]
        return hidden + self.out(torch.tanh(self.mix(seen.to(hidden.dtype))))


class HandModel(PreTrainedModel, GenerationMixin):
    config_class = HandConfig
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        kwargs = {{name: kwargs[name] for name in ("num_items_in_batch", "shift_labels") if name in kwargs}}
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {{"input_ids": input_ids}}
'''


@pytest.fixture(autouse=True)
def _nothing_is_allowed(monkeypatch):
    monkeypatch.setattr(own_code._Allowed, "files", set())
    monkeypatch.setattr(own_code._Allowed, "is_all", False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file, and a model folder as ``save_pretrained`` writes it, with noise on its weights."""
    here = tmp_path_factory.mktemp("handwritten")
    file = here / "hand.py"
    file.write_text(CODE.format(marker=str(here / "ran")))
    own_code.allow(file)
    own_code.OwnCode.of(file).run([])
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("handwritten", vocab_size=VOCABULARY, eos_token_id=2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(here / "model")
    make_tokenizer(template=None).save_pretrained(here / "model")
    write(here / "train.jsonl", [{"text": text} for text in TEXTS])
    return here


def forget():
    """As if no file of the user's had run in this process."""
    for name in [name for name in sys.modules if name.startswith("megatrain_io_modules_")]:
        del sys.modules[name]
    for mapping in (own_code.CONFIG_MAPPING, own_code.MODEL_FOR_CAUSAL_LM_MAPPING):
        mapping._extra_content.clear()


def run(*arguments):
    """A command as a new process would run it: no file of the user's has run, none is allowed."""
    own_code._Allowed.files, own_code._Allowed.is_all = set(), False
    forget()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def settings_of(made, here, *more):
    return (
        f"model={made / 'model'}", f"output_dir={here}", f"data.train={made / 'train.jsonl'}", "max_length=32",
        "gradient_accumulation_steps=1", "precision=fp32", "device=cpu", "memory.io_backend=threads",
        "memory.ram=64MiB", "model_options.block_list=blocks", *more,
    )  # fmt: skip


def message_of(result):
    return json.loads(result.stdout)["error"]["message"]


def runs_of(made):
    marker = made / "ran"
    return marker.read_text().count("ran") if marker.exists() else 0


def test_a_model_of_ones_own_is_imported_trained_resumed_exported_and_asked(made, tmp_path):
    here, file = tmp_path / "run", made / "hand.py"
    named = f"model_options.modules={file}"
    options = ("--modules", file, "--block-list", "blocks", "--precision", "fp32", "--io-backend", "threads")
    assert run("import", made / "model", here, *options).exit_code == 0
    kept = json.loads((here / "run.json").read_text())["model_options"]["modules"]
    assert kept == own_code.OwnCode.of(file).as_dict()
    assert run("train", *settings_of(made, here, "max_steps=4", named), "--json").exit_code == 0
    # The YAML of a run names the file, and whoever gives it has not: that takes a word.
    refused = run("train", "--config", here / "config.yaml", "max_steps=5", "--resume", "--json")
    assert refused.exit_code == 2
    assert "--allow-code" in message_of(refused)
    before = runs_of(made)
    resumed = run(
        "train", "--config", here / "config.yaml", "max_steps=5", "--resume", "--allow-code", "--json"
    )
    assert resumed.exit_code == 0, resumed.stdout
    assert runs_of(made) == before + 1
    assert run("export", here, here / "out", "--modules", file).exit_code == 0
    said = run("generate", here, "--prompt", PROMPT, "--max-new-tokens", NEW, "--allow-code", "--json")
    assert said.exit_code == 0, said.stdout
    assert json.loads(said.stdout)["text"] == stock_text(here / "out")
    planned = run("plan", made / "model", named, "model_options.block_list=blocks", "max_length=32", "--json")
    assert planned.exit_code == 0, planned.stdout


def test_nothing_runs_that_was_not_named_or_has_changed(made, tmp_path):
    here, file = tmp_path / "run", tmp_path / "hand.py"
    shutil.copy(made / "hand.py", file)
    config = tmp_path / "my.yaml"
    config.write_text(f"model_options:\n  modules: {file}\n")
    named = f"model_options.modules={file}"
    options = ("--block-list", "blocks", "--precision", "fp32", "--io-backend", "threads", "--json")
    assert run("import", made / "model", here, "--modules", file, *options).exit_code == 0
    count = runs_of(made)

    def refused(*command, says):
        result = run(*command, "--json")
        assert result.exit_code == 2, result.stdout
        assert says in message_of(result)
        assert runs_of(made) == count

    train = ("train", "--config", config, *settings_of(made, here, "max_steps=1"))
    refused(*train, says="give --allow-code, if you trust it")
    refused("generate", here, "--prompt", "A", says="--modules")
    refused("export", here, tmp_path / "out", says="--modules")
    refused("plan", made / "model", "--config", config, says=named)
    assert run("status", here).exit_code == 0
    assert run("verify", here).exit_code == 0
    for folder in (made / "model", here):
        inside = folder / "hand.py"
        shutil.copy(file, inside)
        more = (f"model_options.modules={inside}",)
        target = tmp_path / "another"
        if folder == here:
            target = here
        refused("train", *settings_of(made, target, "max_steps=1", *more), "--allow-code", says="is not run")
        inside.unlink()
    file.write_text(file.read_text() + "\n")
    refused("train", *settings_of(made, here, "max_steps=1", named), says="has changed since")
    refused("export", here, tmp_path / "out", "--allow-code", says="has changed since")
    refused("generate", here, "--prompt", "A", "--modules", file, says="has changed since")
    assert runs_of(made) == count


def test_code_in_a_model_folder_is_not_run_by_whatever_name(made, tmp_path):
    """The files of a folder in the hub's cache are links to elsewhere."""
    hub = tmp_path / "models--a--b"
    folder = hub / "snapshots" / "1"
    (hub / "blobs").mkdir(parents=True)
    shutil.copytree(made / "model", folder)
    shutil.copy(made / "hand.py", hub / "blobs" / "77")
    (folder / "hand.py").symlink_to(hub / "blobs" / "77")
    (folder / "elsewhere").symlink_to(made)
    (tmp_path / "link.py").symlink_to(folder / "hand.py")
    (tmp_path / "hard").symlink_to(folder)
    before = runs_of(made)
    for name in (
        folder / "hand.py", hub / "blobs" / "77", folder / "elsewhere" / "hand.py", tmp_path / "link.py",
        tmp_path / "hard" / "hand.py", folder / ".." / "1" / "hand.py",
    ):  # fmt: skip
        refused = run("import", folder, tmp_path / "run", "--modules", name, "--json")
        assert refused.exit_code == 2
        assert "code in the folder of a model or a run is not run" in message_of(refused), name
    assert runs_of(made) == before
    # Beside it, by a way through it, is not in it.
    shutil.copy(made / "hand.py", tmp_path)
    options = ("--block-list", "blocks", "--precision", "fp32", "--io-backend", "threads", "--json")
    through = made / "model" / ".." / "hand.py"
    assert run("import", made / "model", tmp_path / "run", "--modules", through, *options).exit_code == 0


def test_a_plan_runs_no_code_of_a_run_folder(made, tmp_path):
    here, file = tmp_path / "run", made / "hand.py"
    options = ("--block-list", "blocks", "--precision", "fp32", "--io-backend", "threads")
    assert run("import", made / "model", here, "--modules", file, *options).exit_code == 0
    shutil.copy(file, here / "hand.py")
    keys = (f"output_dir={here}", f"model_options.modules={here / 'hand.py'}")
    before = runs_of(made)
    refused = run("plan", made / "model", *keys, "--allow-code", "--json")
    assert "code in the folder of a model or a run is not run" in message_of(refused)
    assert runs_of(made) == before


def test_the_command_of_status_works_as_printed(made, tmp_path):
    here, file = tmp_path / "run", made / "hand.py"
    named = f"model_options.modules={file}"
    assert run("train", *settings_of(made, here, "max_steps=1", named)).exit_code == 0
    status = json.loads(run("status", here, "--json").stdout)
    assert status["code"] == str(file)
    assert f"code       {file}" in run("status", here).stdout
    generate, export, train = re.findall(
        r"megatrain-io (generate.*?|export.*?|train.*?)(?:, or|\. To|, with)", status["next"]
    )
    said = run(*shlex.split(generate.replace("TEXT", shlex.quote(PROMPT))))
    assert said.exit_code == 0, said.output
    exported = run(*shlex.split(export.replace("OUT", str(tmp_path / "out"))))
    assert exported.exit_code == 0, exported.output
    trained = run(*shlex.split(train.replace("=N", "=2")))
    assert trained.exit_code == 0, trained.output


def test_a_file_that_was_moved_is_named_where_it_is_now(made, tmp_path):
    here, file = tmp_path / "run", tmp_path / "hand.py"
    shutil.copy(made / "hand.py", file)
    options = ("--block-list", "blocks", "--precision", "fp32", "--io-backend", "threads")
    assert run("import", made / "model", here, "--modules", file, *options).exit_code == 0
    file = file.rename(tmp_path / "moved.py")
    refused = run("export", here, tmp_path / "out", "--allow-code", "--json")
    assert "If it lies elsewhere now, name that place" in message_of(refused)
    assert run("export", here, tmp_path / "out", "--modules", file).exit_code == 0
    own_code._Allowed.files.clear()
    forget()
    # From Python it is named by the argument, or imported by whoever calls.
    mt.export_model(here, tmp_path / "by argument", modules=file)
    forget()
    file.rename(tmp_path / "hand.py")
    own_code._Allowed.files.clear()
    spec = importlib.util.spec_from_file_location("of_ours", tmp_path / "hand.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["of_ours"] = module
    try:
        spec.loader.exec_module(module)
        AutoConfig.register("handwritten", module.HandConfig)
        AutoModelForCausalLM.register(module.HandConfig, module.HandModel)
        mt.export_model(here, tmp_path / "imported")
    finally:
        del sys.modules["of_ours"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("by argument", "imported")]
    assert weights[0] == weights[1]


def test_a_file_for_a_run_without_one_is_refused(tmp_path):
    make_source(tmp_path, small_config("llama"))
    here, file = tmp_path / "run", tmp_path / "hand.py"
    file.write_text("raise SystemExit(3)")
    options = ("--precision", "fp32", "--io-backend", "threads")
    assert run("import", tmp_path / "model", here, *options).exit_code == 0
    refused = run("export", here, tmp_path / "out", "--modules", file, "--json")
    assert refused.exit_code == 2
    assert "this run was imported without such a file: leave it out" in message_of(refused)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def", "failed with SyntaxError"),
        ("raise SystemExit(3)", "failed with SystemExit"),
        ("x = 1", "registers no model with transformers"),
        (None, "cannot be read"),
    ],
    ids=["syntax", "exit", "nothing", "none"],
)
def test_a_file_that_makes_no_model_known_is_refused_with_a_sentence(made, tmp_path, text, reason):
    file = tmp_path / "code.py"
    if text is not None:
        file.write_text(text)
    refused = run("import", made / "model", tmp_path / "run", "--modules", file, "--json")
    assert refused.exit_code == 2
    assert reason in message_of(refused)
    assert not (tmp_path / "run").exists()
