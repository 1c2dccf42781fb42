"""A folder whose model type transformers does not have is trained by the public class that it names, as Kimi-K2's."""

import json
import shutil
from pathlib import Path

import pytest

from families import NEW, PROMPT, run, stock_text
from small_models import make_source, small_config

AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
WORDS = {"model_type": "kimi_k2", "auto_map": AUTO_MAP, "aux_loss_alpha": 0.001}
FILES = ("configuration_deepseek.py", "modeling_deepseek.py")


def edited(folder, **words):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | words))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A DeepSeek-V3 under its own name and under another, beside code that leaves a mark when it runs."""
    here = tmp_path_factory.mktemp("kimi")
    make_source(here, small_config("deepseek_v3"))
    kimi = edited(Path(shutil.copytree(here / "model", here / "kimi")), **WORDS)
    for name in FILES:
        (kimi / name).write_text(f"open({str(here / 'was run')!r}, 'w')\nraise SystemExit('it runs')\n")
    return here


def trained(source, model, here):
    settings = (
        f"model={model}", f"output_dir={here}", f"data.train={source / 'train.jsonl'}", "max_length=32", "max_steps=2",
        "gradient_accumulation_steps=1", "precision=fp32", "device=cpu", "memory.io_backend=threads",
        "memory.ram=256MiB", "learning_rate=1e-3",
    )  # fmt: skip
    result = run("train", *settings, "--json")
    assert result.exit_code == 0, result.output
    assert run("export", here, here / "out").exit_code == 0
    return here / "out"


def test_it_is_trained_as_the_class_that_it_names_and_exported_with_its_own_words(source, tmp_path):
    out = trained(source, source / "kimi", tmp_path / "run")
    plain = trained(source, source / "model", tmp_path / "plain")
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config.items() >= (WORDS | {"architectures": ["DeepseekV3ForCausalLM"]}).items()
    for name in FILES:
        assert (out / name).read_bytes() == (source / "kimi" / name).read_bytes()
    said = run("generate", tmp_path / "run", "--prompt", PROMPT, "--max-new-tokens", NEW, "--json")
    assert json.loads(said.stdout)["text"] == stock_text(plain)
    assert not (source / "was run").exists()


def test_weights_that_do_not_fit_the_class_are_refused_by_name(source, tmp_path):
    folder = edited(
        Path(shutil.copytree(source / "kimi", tmp_path / "model")), architectures=["LlamaForCausalLM"]
    )
    refused = run("import", folder, tmp_path / "run", "--precision", "fp32", "--json")
    assert refused.exit_code in (4, 5), refused.output
    assert "do not fit the LlamaForCausalLM" in json.loads(refused.stdout)["error"]["message"]
    assert not (source / "was run").exists()
