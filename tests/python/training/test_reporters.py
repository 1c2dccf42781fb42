"""What a person sees during a run: the right figures, at the right moments, and nothing else."""

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatrain_io.cli.progress import counting
from megatrain_io.runs.metrics import StepReport
from megatrain_io.text import gib
from megatrain_io.training.reporters import LineReporter, LiveReporter, WarningReporter, facts, reporter

REPORT = StepReport(
    step=1,
    max_steps=10,
    loss=2.5,
    learning_rate=1e-5,
    tokens=8000,
    trained_tokens=7000,
    seconds=4.0,
    read_bytes=14 * 10**9,
    written_bytes=12 * 10**9,
    stalled_seconds=1.0,
    ram_bytes=3 * 2**29,
    ledger_bytes=2**30,
    written_bytes_total=1_200_000_000_000,
)


def begun(step, max_steps, notes=()):
    return SimpleNamespace(step=step, max_steps=max_steps, notes=notes)


RUN = begun(0, 10)


@pytest.fixture
def console():
    """Not a terminal."""
    return Console(file=io.StringIO(), width=60)


@pytest.fixture
def terminal():
    """A terminal, as far as rich can tell."""
    return Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)


def lines(console):
    return console.file.getvalue().splitlines()


def test_the_figures_of_a_step():
    assert facts(REPORT) == [
        "loss 2.5000",
        "lr 1.00e-05",
        "2,000 tok/s",
        "read 3.5 GB/s",
        "write 3.0 GB/s",
        "stalled 25%",
        "RAM 1.5 GiB",
        "written 1.2 TB",
    ]
    stalled = {"read": 0.2, "pool": 0.01, "write": 0.78, "update": 0.01, "commit": 0.0}
    assert facts(replace(REPORT, stalled=stalled))[5] == "stalled 25% (write 20%, read 5%)"
    assert facts(replace(REPORT, eval_loss=2.25))[1] == "held-out loss 2.2500"
    assert gib(2**30) == "1.0 GiB"


def test_a_step_that_took_no_time_and_a_loss_that_is_no_number():
    assert facts(replace(REPORT, seconds=0.0, loss=float("nan")))[0] == "loss nan"


class Gone(io.StringIO):
    """Where a terminal was, or the reader of a pipe."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("kind", [LineReporter, LiveReporter, WarningReporter])
def test_a_console_that_is_gone_stops_no_training(kind):
    """``train 2>&1 | tee log`` ended with its first line after tee was gone, with all steps since the last commit."""
    shown = kind(Console(file=Gone(), width=60, force_terminal=kind is LiveReporter))
    shown.on_start(begun(0, 10, ["one\ntwo"]))
    shown.on_step(RUN, replace(REPORT, eval_loss=2.0))
    shown.on_skip(RUN, 2, "why")
    shown.on_warning(RUN, "RAM")
    shown.on_end(RUN)


def test_a_note_of_several_lines_has_them_and_none_that_came_from_outside(console):
    LineReporter(console).on_start(begun(0, 10, ["data:\n  train: 3 rows\n  eval: 1 row", "a\nstep 9/9"]))
    assert lines(console)[:4] == ["note: data:", "  train: 3 rows", "  eval: 1 row", "note: a\\nstep 9/9"]


def test_a_line_is_one_line_however_narrow_the_console(console):
    shown = LineReporter(console)
    shown.on_start(begun(0, 10, ["I/O engine: [bold]threads"]))
    shown.on_step(RUN, REPORT)
    shown.on_end(RUN)
    assert lines(console) == [
        "note: I/O engine: [bold]threads",
        "training for 10 steps",
        "step 1/10  " + "  ".join(facts(REPORT)) + "  ETA 0:00:36",
    ]


def test_lines_come_now_and_then(console):
    """The clock moves by two seconds a step, five must pass; step 3 has an evaluation."""
    times = iter(range(0, 100, 2))
    shown = LineReporter(console, clock=lambda: next(times))
    shown.on_start(begun(0, 10))
    for step in range(1, 11):
        shown.on_step(RUN, replace(REPORT, step=step, eval_loss=2.0 if step == 3 else None))
    told = [int(line.split()[1].split("/")[0]) for line in lines(console)[1:]]
    assert told == [1, 3, 6, 9, 10]


def test_lines_respect_logging_steps(console):
    times = iter(range(0, 1000, 10))
    shown = LineReporter(console, logging_steps=4, clock=lambda: next(times))
    for step in range(1, 11):
        shown.on_step(RUN, replace(REPORT, step=step))
    assert [int(line.split()[1].split("/")[0]) for line in lines(console)] == [1, 4, 8, 10]


def test_a_resumed_run_says_so_and_its_time_is_that_of_its_newest_steps(console):
    shown = LineReporter(console)
    shown.on_start(begun(7, 10))
    shown.on_step(RUN, replace(REPORT, step=8, seconds=100.0))
    assert lines(console)[0] == "resuming after step 7 of 10"
    assert lines(console)[1].endswith("ETA 0:03:20")


def test_a_terminal_shows_progress_in_place(terminal):
    shown = LiveReporter(terminal)
    shown.on_start(begun(2, 4))
    shown.on_step(RUN, replace(REPORT, step=3, max_steps=4, eval_loss=2.25))
    shown.on_step(RUN, replace(REPORT, step=4, max_steps=4))
    shown.on_end(RUN)
    shown.on_end(RUN)
    text = terminal.file.getvalue()
    assert "resuming after step 2 of 4" in text
    assert "step 3: held-out loss 2.2500" in text
    assert "4/4" in text
    assert "written 1.2 TB" in text


def test_a_live_display_that_never_started_can_be_finished(terminal):
    LiveReporter(terminal).on_end(RUN)
    assert terminal.file.getvalue() == ""


def test_the_reporter_fits_the_console(console, terminal):
    assert isinstance(reporter(console), LineReporter)
    assert isinstance(reporter(terminal), LiveReporter)


def test_quiet_is_quiet(console):
    with counting("import", console, quiet=True) as progress:
        progress(1, 1)
    assert lines(console) == []


def test_counting_without_a_terminal_tells_the_end(console):
    with counting("import", console) as progress:
        progress(1, 2)
        progress(2, 2)
    assert lines(console) == ["import: 2/2"]


def test_counting_on_a_terminal(terminal):
    with counting("import", terminal) as progress:
        progress(2, 2)
    assert "import" in terminal.file.getvalue()
    assert "2/2" in terminal.file.getvalue()
