"""Whatever is damaged beside the store: the command ends right, or with one sentence and its exit code.

About a third of 1,600 attacks on the files around the store ended in a traceback, in silence or with other bits. Here
every file that the command reads is flipped, cut, swapped, emptied, removed and retyped, by seeds; a run that goes on
must have the bits of one that nothing happened to.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import traceback

import pytest
import zstandard
from typer.testing import CliRunner

from damage import damage
from megatrain_io.cli.app import app
from megatrain_io.config.parse import load_config
from megatrain_io.errors import InterruptedRunError
from megatrain_io.machine.bench import Options, bench
from paged import differing
from runs import ENGINE, WORDS, planes_of, start

GROUP = 10
"""Damages of a test: more would hide which of them hangs."""
DAMAGES = int(os.environ.get("MEGATRAIN_SOAK_DAMAGES", "40"))
PROCESSES = int(os.environ.get("MEGATRAIN_SOAK_DAMAGED_PROCESSES", "1"))
RESUME = ["train", "--config", "run.yaml", "--resume"]
FRESH = ["train", "--config", "fresh.yaml"]
OF_A_RUN = [
    RESUME,
    RESUME,
    ["status", "run"],
    ["verify", "run"],
    ["clean", "run"],
    ["export", "run", "out"],
    ["generate", "run", "-p", "the"],
]
OF_A_MODEL = [["import", "model", "new"], ["plan", "model"], FRESH]
READ_BY = {
    "run/run.json": OF_A_RUN,
    "run/config.yaml": OF_A_RUN,
    "run/metrics.jsonl": [RESUME, ["status", "run"]],
    "run/model/config.json": OF_A_RUN,
    "run/model/generation_config.json": OF_A_RUN,
    "run/model/tokenizer.json": OF_A_RUN,
    "run/model/tokenizer_config.json": OF_A_RUN,
    "run/data/index.json": [RESUME],
    "run/data/train.tokens": [RESUME],
    "run/data/eval.tokens": [RESUME],
    "run.yaml": [RESUME],
    "model/config.json": OF_A_MODEL,
    "model/generation_config.json": OF_A_MODEL,
    "model/tokenizer.json": OF_A_MODEL,
    "model/tokenizer_config.json": OF_A_MODEL,
    "model/model.safetensors": OF_A_MODEL,
    "data/dialogues.jsonl": [FRESH],
    "data/table.csv": [FRESH],
    "data/notes.txt": [FRESH],
    "data/notes.txt.gz": [FRESH],
    "data/more.jsonl.zst": [FRESH],
    "config/megatrain-io/profile.json": [["plan", "model"], RESUME, ["doctor", "."]],
    "machine.yaml": [["plan", "model", "--on", "machine.yaml"]],
}
CODES = {0, 2, 3, 4, 5, 6, 7}
"""1 is a bug; 130 is an interruption."""


@pytest.fixture(scope="module")
def world(source, tmp_path_factory):
    """A folder with a model, data of each kind, a run with 2 of its 4 steps, a profile, and a machine.

    And a copy of it: a run knows where its model lies, so that each damage is done in the same place.
    """
    world = tmp_path_factory.mktemp("world") / "here"
    world.mkdir()
    shutil.copytree(source / "model", world / "model")
    (world / "model" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 256, "max_length": 20})
    )
    data = world / "data"
    data.mkdir()
    texts = [" ".join(WORDS[i % 5 : i % 5 + 4]) for i in range(8)]
    (data / "dialogues.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (data / "table.csv").write_text("text\n" + "".join(f'"{text}, and more"\n' for text in texts))
    (data / "notes.txt").write_text("\n\n".join(texts))
    (data / "notes.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
    more = "".join(json.dumps({"text": text.upper()}) + "\n" for text in texts)
    (data / "more.jsonl.zst").write_bytes(zstandard.compress(more.encode()))
    train = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
    }
    memory = {"ram": "2000KiB", "io_backend": ENGINE, "threads": 1}
    shared = {"model": "model", "train": train | {"precision": "bf16"}, "memory": memory}
    keys = {"train": "data/dialogues.jsonl", "eval": 0.2, "max_length": 32}
    (world / "run.yaml").write_text(json.dumps({**shared, "output_dir": "run", "data": keys}))
    fresh = {**shared, "output_dir": "new", "data": {"train": "data", "max_length": 32}}
    fresh["train"] = fresh["train"] | {"max_steps": 1}
    (world / "fresh.yaml").write_text(json.dumps(fresh))
    (world / "machine.yaml").write_text(
        json.dumps(
            {
                "name": "box",
                "ram": "8GiB",
                "drives": [{"read_gb_per_s": 2.0, "write_gb_per_s": 1}],
                "cpu_tflops": 0.1,
            }
        )
    )
    profile = bench(world, Options(nbytes=64 << 20, seconds=0.05, engine=ENGINE), lambda _done, _total: None)
    profile.write(world / "config" / "megatrain-io" / "profile.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        with pytest.raises(InterruptedRunError):
            start(load_config("run.yaml"), stop=2)
    shutil.copytree(world, world.parent / "pristine")
    return world


def anew(world):
    """Make everything as it was."""
    shutil.rmtree(world)
    shutil.copytree(world.parent / "pristine", world)


@pytest.fixture(scope="module")
def right(world):
    """What an undamaged run comes to: the planes after its last step, its exported weights, its answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        for words in (["export", "run", "out"], ["generate", "run", "-p", "the"], RESUME):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, done.output
            if words[0] == "generate":
                answer = done.stdout
    return planes_of(world / "run"), (world / "out" / "model.safetensors").read_bytes(), answer


def attack(seed, world):
    """Damage something; the command to run there, the file, and words for it."""
    anew(world)
    victim = [*READ_BY][seed % len(READ_BY)]
    commands = READ_BY[victim]
    words = commands[(seed // len(READ_BY)) % len(commands)]
    return words, victim, f"seed {seed}: {victim}, {damage(world / victim, seed)}; {' '.join(words)}"


def problem_of(code, output):
    """What is wrong with how a command ended; None if nothing is."""
    told = [line for line in output.splitlines() if line.startswith("megatrain-io: ")]
    if "Traceback" in output or code not in CODES:
        return f"exit code {code}: {output}"
    return f"exit code {code} and {len(told)} sentences: {output}" if len(told) != (code != 0) else None


def has_right_bits(world, words, victim, right, stdout):
    """Whether what went on in spite of the damage has come to the same."""
    planes, exported, answer = right
    if not victim.startswith(("run/", "config/")):
        return True  # another model, other data: the person's own
    if words[0] == "train":
        return differing(planes_of(world / "run"), planes) == []
    if words[0] == "export":
        return (world / "out" / "model.safetensors").read_bytes() == exported
    return words[0] != "generate" or stdout == answer


def outcome(seed, world, right):
    """What is wrong with what came of a damage; None if nothing is."""
    words, victim, case = attack(seed, world)
    os.chdir(world)
    done = CliRunner().invoke(app, words, prog_name="megatrain-io")
    os.chdir(world.parent)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return case + "\n" + "".join(traceback.format_exception(done.exception)[-4:])
    problem = problem_of(done.exit_code, done.output)
    if (
        problem is None
        and done.exit_code == 0
        and not has_right_bits(world, words, victim, right, done.stdout)
    ):
        problem = f"other bits: {done.output}"
    return None if problem is None else f"{case}\n{problem}"


@pytest.mark.slow
@pytest.mark.parametrize("group", range(DAMAGES // GROUP))
def test_damage_is_survived_or_told(group, world, right, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(world / "config"))
    monkeypatch.chdir(world.parent)
    seeds = range(group * GROUP, (group + 1) * GROUP)
    problems = [problem for seed in seeds if (problem := outcome(seed, world, right)) is not None]
    assert not problems, "\n\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100_000, 100_000 + PROCESSES))
def test_damage_is_survived_or_told_by_a_real_process(seed, world):
    words, _, case = attack(seed * 7, world)
    environment = os.environ | {"XDG_CONFIG_HOME": str(world / "config")}
    command = [sys.executable, "-m", "megatrain_io", *words]
    done = subprocess.run(
        command,
        cwd=world,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    problem = problem_of(done.returncode, done.stdout + done.stderr)
    assert problem is None, f"{case}\n{problem}"
