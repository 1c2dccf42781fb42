"""No code of a model folder is ever run, and nobody is asked whether it may."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import megatrain_io
from families import PROMPT
from megatrain_io.cli.app import app
from small_models import make_source, small_config

LOADING = ("from_pretrained", "from_config", "pipeline")
EVIL = "open({marker!r}, 'a').write(__name__)\nclass Evil:\n    pass\ndef generate(*a, **k):\n    pass\n"
TOKENIZER = {"AutoTokenizer": ["evil.Evil", None]}
# What a folder may name, and whether stock transformers does without it.
CONFIGS = {
    "a tokenizer": ("tokenizer_config.json", {"auto_map": TOKENIZER, "tokenizer_class": "Evil"}, False),
    "a tokenizer beside one of transformers": ("tokenizer_config.json", {"auto_map": TOKENIZER}, True),
    "a tokenizer named by the model": ("config.json", {"auto_map": TOKENIZER}, True),
    "a tokenizer elsewhere": ("config.json", {"auto_map": {"AutoTokenizer": "other/repository--evil.Evil"}}, True),
    "a model": ("config.json", {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}, True),
    "a model of its own type": (
        "config.json",
        {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil", "architectures": ["Evil"]},
        False,
    ),
    "a type of its own for a class of transformers": (
        "config.json", {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}, True,
    ),
    "attention": ("config.json", {"attn_implementation": "o/r:fn", "_attn_implementation": "o/r"}, True),
    "experts": ("config.json", {"experts_implementation": "o/r:fn", "_experts_implementation": "o/r"}, True),
    "generate": ("generation_config.json", {"custom_generate": "."}, True),
    "generate by a map": ("generation_config.json", {"auto_map": {"generate": "evil.generate"}}, True),
    "a processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}}, True),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    make_source(folder, small_config("llama"))
    return folder


def hostile(sound, tmp_path, case):
    """A folder that names code, which lies beside its files and leaves a mark when it is run."""
    name, changes, _ = CONFIGS[case]
    folder = Path(shutil.copytree(sound / "model", tmp_path / "model"))
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))
    (folder / "custom_generate").mkdir()
    for code in (folder / "evil.py", folder / "custom_generate" / "generate.py"):
        code.write_text(EVIL.format(marker=str(tmp_path / "was run")))
    return folder


def commands(sound, folder, here):
    settings = (
        f"model={folder}", f"output_dir={here}", f"data.train={sound / 'train.jsonl'}", "max_length=32", "max_steps=1",
        "device=cpu", "precision=fp32", "memory.io_backend=threads", "memory.ram=64MiB",
    )  # fmt: skip
    return [
        ("train", *settings),
        ("generate", here, "--prompt", PROMPT, "--max-new-tokens", "2"),
        ("export", here, here / "out"),
    ]


@pytest.mark.parametrize("case", CONFIGS)
def test_code_of_a_folder_is_not_run_and_nobody_is_asked(sound, tmp_path, case):
    folder, stock_does = hostile(sound, tmp_path, case), CONFIGS[case][2]
    how_far = 3 if not stock_does else 2 if "generate" in case else 1
    outcomes = [
        CliRunner().invoke(app, list(map(str, command)), input="y\ny\ny\n")
        for command in commands(sound, folder, tmp_path / "run")[:how_far]
    ]
    assert not (tmp_path / "was run").exists()
    for outcome in outcomes:
        assert isinstance(outcome.exception, SystemExit | None), outcome.exception
        assert "[y/N]" not in outcome.output
    if stock_does:
        assert [outcome.exit_code for outcome in outcomes] == [0] * how_far, outcomes[0].output
    else:
        assert outcomes[0].exit_code == 5
        assert "code that comes with a model is not run" in outcomes[0].stderr
        assert "evil.Evil" in outcomes[0].stderr
        assert "trust_remote_code" not in outcomes[0].stderr


def test_an_import_refuses_a_tokenizer_that_training_would_refuse(sound, tmp_path):
    """It was accepted, and the cure for the copy in RUN/model was refused as a change of that."""
    folder = hostile(sound, tmp_path, "a tokenizer")
    outcome = CliRunner().invoke(app, ["import", str(folder), str(tmp_path / "run")])
    assert outcome.exit_code == 5
    assert f"{folder / 'tokenizer_config.json'} names code of its own" in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_the_advice_for_a_tokenizer_helps(sound, tmp_path):
    folder = hostile(sound, tmp_path, "a tokenizer")
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    del content["auto_map"], content["tokenizer_class"]
    path.write_text(json.dumps(content))
    for command in commands(sound, folder, tmp_path / "run"):
        assert CliRunner().invoke(app, list(map(str, command))).exit_code == 0
    assert not (tmp_path / "was run").exists()


@pytest.mark.slow
def test_a_yes_on_standard_input_runs_nothing(sound, tmp_path):
    folder = hostile(sound, tmp_path, "a tokenizer")
    command = commands(sound, folder, tmp_path / "run")[0]
    answered = subprocess.run(
        [sys.executable, "-m", "megatrain_io", *map(str, command)],
        input="y\n" * 5, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert answered.returncode == 5, answered.stderr
    assert "Traceback" not in answered.stderr
    assert not (tmp_path / "was run").exists()


def test_every_call_that_could_load_code_says_that_it_must_not():
    found = 0
    for path in sorted(Path(megatrain_io.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in LOADING:
                found += 1
                said = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                assert said.get("trust_remote_code") is False, f"{path}:{node.lineno}"
    assert found >= 5
