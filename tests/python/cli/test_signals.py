"""Signals at random moments of real processes: nothing acknowledged is lost, and what goes on ends with the same bits.

``MEGATRAIN_SOAK_MOMENTS=20`` sends each of the four signals at so many moments of each command (``make soak``).
"""

import fcntl
import logging
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import sys
import termios
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain_io.__main__ import main
from megatrain_io.interrupt import STOP_SIGNALS
from megatrain_io.runs.export_model import export_model
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.import_model import import_model
from megatrain_io.runs.status import examine
from paged import differing
from runs import ENGINE, blob_of, configured, figures, metrics_of, planes_of, start

MOMENTS = int(os.environ.get("MEGATRAIN_SOAK_MOMENTS", "0"))
"""Moments for each signal and command; 0: one for each command, with one signal after the other."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 + 60 * 4 * MOMENTS)]
LOG = logging.getLogger(__name__)
SEED = int(os.environ.get("MEGATRAIN_SOAK_SEED", "19"))
INTERRUPTED = 130

# Each life is forked from one process that has imported everything and done nothing yet.
LIVES = multiprocessing.get_context("forkserver")
LIVES.set_forkserver_preload(
    ["megatrain_io.cli.app", "megatrain_io.training.trainer", "transformers.models.llama.modeling_llama"]
)


def live(words: list[str], log: Path, ready: Any) -> None:
    """In a process of its own: the command."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    torch.set_num_threads(1)
    sys.argv = ["megatrain-io", *words]
    ready.set()
    main()


@dataclass
class Command:
    """A command that is stopped again and again.

    Attributes:
        words: of its command line.
        log: what it printed last.
        seconds: that it takes undisturbed.
        ended: exit code, and number of lives that ended so.
    """

    words: list[str]
    log: Path
    seconds: float = 1.5
    ended: dict[int, int] = field(default_factory=dict)

    def run(self, number: int | None = None, moment: float = 0.0, *more: str) -> int:
        """Its exit code; with the signal ``number`` after ``moment`` seconds, unless it has ended by then."""
        ready = LIVES.Event()
        process = LIVES.Process(target=live, args=([*self.words, *more], self.log, ready))
        process.start()
        assert ready.wait(120)
        began = time.monotonic()
        process.join(moment if number is not None else 300)
        if number is not None and process.is_alive():
            os.kill(process.pid, number)
            process.join(300)
        assert process.exitcode is not None, f"{self.words} hangs: {self.printed()}"
        if number is None:
            self.seconds = time.monotonic() - began
        else:
            self.ended[process.exitcode] = self.ended.get(process.exitcode, 0) + 1
        expected = {0, -signal.SIGKILL if number == signal.SIGKILL else INTERRUPTED}
        assert process.exitcode in expected, f"{process.exitcode}: {self.printed()}"
        assert "Traceback" not in self.printed()
        return process.exitcode

    def printed(self) -> str:
        """What the last life printed."""
        return self.log.read_text(errors="replace")


def moments(command: Command, kind: int):
    """Signals, each with a moment of the command's time."""
    chosen = random.Random(f"{SEED}/{kind}")
    numbers = [STOP_SIGNALS[kind % 4]] if MOMENTS == 0 else STOP_SIGNALS * MOMENTS
    for number in numbers:
        yield number, chosen.uniform(0.0, command.seconds)


def kills(command: Command, kind: int):
    """Moments of a ``kill -9``, which no process hears."""
    chosen = random.Random(f"{SEED}/kill/{kind}")
    return [chosen.uniform(0.0, command.seconds) for _ in range(max(1, MOMENTS))]


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    run = tmp_path_factory.mktemp("imported") / "run"
    import_model(source / "model", run, precision="bf16", engine=ENGINE)
    return run


def test_import(source, imported, tmp_path):
    run = tmp_path / "run"
    command = Command(["import", str(source / "model"), str(run), "--io-backend", ENGINE], tmp_path / "log")
    if MOMENTS:
        assert command.run() == 0
        shutil.rmtree(run)
    for number, moment in moments(command, 0):
        if command.run(number, moment) == INTERRUPTED:
            assert not run.exists(), f"seed {SEED}: {moment} s"
        else:
            shutil.rmtree(run)
    expected = planes_of(imported)
    for moment in kills(command, 0):
        command.run(signal.SIGKILL, moment)
        if not RunFolder(run).is_imported:
            assert command.run() == 0, "the next one takes over what was left"
        RunFolder(run).mend([])  # as the next command does
        assert differing(planes_of(run), expected) == []
        assert sorted(path.name for path in run.iterdir()) == ["model", "run.json", "store.mtio"]
        shutil.rmtree(run)
    LOG.info("%s: %s", command.words[0], command.ended)


TRAININGS = {
    "every step": {"memory": {"commit_every": 1}},
    "every ten": {"memory": {"commit_every": 10}},
    "every ten, state in RAM": {"memory": {"commit_every": 10, "ram": "1GiB"}},
    "scratch": {"memory": {"durability": "scratch"}},
    "evaluation": {"eval_steps": 1, "memory": {"commit_every": 10}},
}
STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    start(configured(source, run, max_steps=STEPS))
    return planes_of(run), figures(run)


@pytest.mark.parametrize("kind", TRAININGS if MOMENTS else ["scratch"])
def test_training(source, tmp_path, undisturbed, kind):
    run, path = tmp_path / "run", tmp_path / "my.yaml"
    path.write_text(configured(source, run, max_steps=STEPS, **TRAININGS[kind]).to_yaml())
    command = Command(["train", "--config", str(path)], tmp_path / "log")
    if MOMENTS:
        assert command.run() == 0
        shutil.rmtree(run)
    kept = 0
    for number, moment in moments(command, 1 + list(TRAININGS).index(kind)):
        ended = command.run(number, moment, *["--resume"] * (kept > 0))
        kept = check_stop(command, run, kept)
        if ended == 0:
            check_training(run, undisturbed)
            shutil.rmtree(run)
            kept = 0
    if kept < STEPS:
        assert command.run(None, 0.0, *["--resume"] * (kept > 0)) == 0
        check_training(run, undisturbed)
    LOG.info("%s: %s", kind, command.ended)


def live_in_terminal(words: list[str], name: str, ready: Any) -> None:
    """In a process of its own, on a terminal: the command."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    os.close(terminal)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)
    sys.argv = ["megatrain-io", *words]
    ready.set()
    main()


def test_a_closed_terminal(source, tmp_path, undisturbed):
    """Every line that is printed fails then, and must stop nothing that is still to be kept."""
    run, path = tmp_path / "run", tmp_path / "my.yaml"
    path.write_text(configured(source, run, max_steps=STEPS, memory={"commit_every": 100}).to_yaml())
    ours, theirs = os.openpty()
    ready = LIVES.Event()
    words = ["train", "--config", str(path)]
    process = LIVES.Process(target=live_in_terminal, args=(words, os.ttyname(theirs), ready))
    process.start()
    assert ready.wait(120)
    os.close(theirs)
    metrics, shown = run / "metrics.jsonl", b""
    while process.is_alive() and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 2):
        if select.select([ours], [], [], 0.05)[0]:
            with suppress(OSError):  # nobody holds the other end, for a moment
                shown += os.read(ours, 1 << 16)
    os.close(ours)
    process.join(100)
    assert process.exitcode == INTERRUPTED, shown.decode(errors="replace")
    step = blob_of(run)["step"]
    assert [line["step"] for line in metrics_of(run)] == [*range(1, step + 1)]
    assert step >= 2
    command = Command([*words, "--resume"], tmp_path / "log")
    assert command.run() == 0
    check_training(run, undisturbed)


def check_stop(command, run, kept):
    """What a stop leaves; the last step that it keeps."""
    if not RunFolder(run).is_imported:
        assert kept == 0, command.printed()
        assert not list(run.glob("store*")), "nothing half-made"
        return 0
    step = blob_of(run)["step"]
    assert step >= kept, f"an acknowledged step was lost: {command.printed()}"
    assert examine(RunFolder(run)).last_stop == "clean"
    if run.joinpath("metrics.jsonl").exists():
        assert [line["step"] for line in metrics_of(run)] == [*range(1, step + 1)], command.printed()
    said = re.search(r"step (\d+) is the last one", command.printed())
    assert said is None or int(said[1]) == step
    return step


def check_training(run, undisturbed):
    planes, lines = undisturbed
    assert differing(planes_of(run), planes) == []
    assert figures(run) == lines


def test_export(tmp_path, imported):
    out = tmp_path / "out"
    command = Command(["export", str(imported), str(out)], tmp_path / "log")
    export_model(imported, tmp_path / "whole", engine=ENGINE)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    if MOMENTS:
        assert command.run() == 0
        shutil.rmtree(out)
    for number, moment in moments(command, 6):
        if command.run(number, moment) == INTERRUPTED:
            assert not list(tmp_path.glob("out*")), f"seed {SEED}: {moment} s"
        else:
            shutil.rmtree(out)
    for moment in kills(command, 6):
        command.run(signal.SIGKILL, moment)
        if not out.exists():
            assert command.run() == 0, "the next one takes over what was left"
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
        assert not list(tmp_path.glob("*.partial"))
        shutil.rmtree(out)
    LOG.info("%s: %s", command.words[0], command.ended)


def test_generate(tmp_path, imported):
    words = ["generate", str(imported), "--prompt", "the quick", "--max-new-tokens", "30"]
    command = Command(words, tmp_path / "log")
    store = RunFolder(imported).own_store.read_bytes()
    if MOMENTS:
        assert command.run() == 0
    for number, moment in moments(command, 7):
        command.run(number, moment)
        assert examine(RunFolder(imported)).last_stop == "clean"
    assert RunFolder(imported).own_store.read_bytes() == store
    LOG.info("%s: %s", command.words[0], command.ended)
