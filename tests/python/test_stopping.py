"""docs/stopping.md: its scripts do what they say, and its keys, commands and exit codes are those of the program."""

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from megatrain_io import errors
from megatrain_io.cli.app import app
from megatrain_io.config.schema import SECTIONS

TEXT = (Path(__file__).parents[2] / "docs" / "stopping.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
BASH = shutil.which("bash") or "bash"
SLURM = next(script for script in SCRIPTS if "#SBATCH" in script)

# Stands for the command: says how it was called, and waits for a signal.
TRAINING = f"""#!{sys.executable} -IS
import signal, sys
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: asked.append(number))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
print("called", *sys.argv[1:], flush=True)
print("heard", signal.sigwait([signal.SIGUSR1, signal.SIGTERM]).name, flush=True)
sys.exit(130)
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.splitlines()[0])
def test_every_script_is_read_by_bash(script):
    subprocess.run([BASH, "-n"], input=script, text=True, check=True)
    subprocess.run([BASH, "-n", "-o", "posix"], input=script, text=True, check=True)


def test_every_command_and_option_exists():
    commands = typer.main.get_command(app).commands
    for verb, rest in re.findall(r"megatrain-io ([a-z]+)([^`\n]*)", TEXT):
        known = {option for parameter in commands[verb].params for option in parameter.opts}
        assert set(re.findall(r" (--[a-z-]+)", rest)) <= known, verb


def test_every_key_exists():
    rows = [
        line.split("|")[1] for line in TEXT.partition("## Going on")[2].splitlines() if line.startswith("| `")
    ]
    assert len(rows) > 3
    for row in rows:
        section = ""
        for key in re.findall(r"`([a-z_.*]+)`", row):
            section, _, name = key.rpartition(".") if "." in key else (section, "", key)
            if section and key not in SECTIONS:
                names = SECTIONS[section].model_fields
                assert any(re.fullmatch(name.replace("*", ".*"), field) for field in names), key


def test_the_unit_of_systemd_knows_the_exit_codes():
    (unit,) = re.findall(r"^```ini\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    parsed = configparser.ConfigParser()
    parsed.optionxform = str
    parsed.read_string(unit)
    service = dict(parsed["Service"])
    assert service["SuccessExitStatus"] == str(errors.InterruptedRunError.exit_code)
    kinds = [
        errors.ConfigError,
        errors.DoesNotFitError,
        errors.DataError,
        errors.CorruptionError,
        errors.TrainingDivergedError,
    ]
    assert service["RestartPreventExitStatus"] == " ".join(str(kind.exit_code) for kind in kinds)
    assert shlex.split(service["ExecStart"]) == ["/srv/training/train.sh"]
    known = {
        "Type",
        "WorkingDirectory",
        "ExecStart",
        "KillMode",
        "KillSignal",
        "TimeoutStopSec",
        "SuccessExitStatus",
    }
    assert service.keys() <= known | {"Restart", "RestartPreventExitStatus"}


def hears(process, number):
    """Whether a process has a handler for a signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return int(caught[1], 16) >> (number - 1) & 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_job_script_hands_the_signal_on_and_queues_the_job_again(tmp_path, number, requeued):
    for name, content in (
        ("megatrain-io", TRAINING),
        ("scontrol", '#!/bin/sh\necho scontrol "$@"\n'),
        ("job", SLURM),
    ):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    with subprocess.Popen(
        [BASH, tmp_path / "job"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout.readline() == "called train --config my.yaml --resume\n"
        while not hears(job.pid, number):
            os.sched_yield()
        job.send_signal(number)
        rest = job.stdout.read()
    assert job.returncode == 130
    assert rest == f"heard {number.name}\n" + "scontrol requeue 17\n" * requeued
