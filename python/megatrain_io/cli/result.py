"""How a command ends: its output and its exit code."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Any

import typer

from megatrain_io.errors import DoesNotFitError, InterruptedRunError, MegatrainIoError, StorageError
from megatrain_io.interrupt import check, is_requested
from megatrain_io.text import visible

__all__ = ["CommandResult", "command"]


@dataclass
class CommandResult:
    """What a command prints at its end, and its exit code.

    Attributes:
        json_output: whether ``values`` are printed as JSON, and not ``text``.
        values: of plain types.
        text: the same for a person.
        exit_code: see ``megatrain_io.errors``.
    """

    json_output: bool
    values: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    exit_code: int = 0

    def counting(self, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show the progress of a command that counts, on standard error; see ``cli.progress``."""
        from rich.console import Console

        from megatrain_io.cli.progress import counting

        return counting(what, Console(stderr=True), quiet=self.json_output)

    def interrupt(self, safe: str, name: str = "") -> None:
        """End with the interruption: what is safe, and the signal that asked for it."""
        by = f" by {name}" if name else ""
        self.fail(f"interrupted{by}. {safe}", "KeyboardInterrupt", InterruptedRunError.exit_code)

    def explain(self, error: Exception, safe: str) -> bool:
        """Make a sentence of an error that has one, and the result of it; whether it had."""
        if isinstance(error, MegatrainIoError):
            is_bug = error.exit_code == MegatrainIoError.exit_code
            # Notes say what became of the state, where that is not what the error itself says.
            message = " ".join(dict.fromkeys([str(error), *getattr(error, "__notes__", [])]))
            if is_bug:
                message = f"{message}. This is a bug in megatrain-io: please report it"
            self.fail(message, type(error).__name__, error.exit_code)
        elif isinstance(error, OSError | MemoryError) and not isinstance(error, BrokenPipeError):
            self.fail(*_of_the_system(error))
        elif is_requested():
            # Some libraries turn the interrupt into an error of their own.
            self.interrupt(safe)
        else:
            return False
        return True

    def show(self) -> None:
        """Print the result on standard output."""
        with suppress(OSError) if is_requested() else nullcontext():  # the terminal may be gone
            if self.json_output:
                typer.echo(json.dumps(_plain(self.values), allow_nan=False))
            elif self.text:
                # A line of a result may hold anything that a model says; what a pipe takes is left as it is.
                is_shown = sys.stdout.isatty()
                for line in self.text.split("\n"):
                    sys.stdout.write(f"{visible(line) if is_shown else line}\n")

    def fail(self, message: str, kind: str, exit_code: int) -> None:
        """Print an error on standard error, and make it the result, in place of what was there."""
        with suppress(OSError) if is_requested() else nullcontext():  # the terminal may be gone
            typer.echo(f"megatrain-io: {visible(message)}", err=True)
        self.exit_code = exit_code
        self.text = ""
        self.values = {"error": {"kind": kind, "message": message, "exit_code": exit_code}}


@contextmanager
def command(*, json_output: bool, interrupted: str) -> Iterator[CommandResult]:
    """Print what a command found; end it with the right exit code, without a traceback for our own errors.

    Args:
        json_output: print ``values``, not ``text``; an error becomes ``{"error": ...}``.
        interrupted: what is safe and what to do after Ctrl-C, or another signal that asks for a stop.
    """
    result = CommandResult(json_output)
    try:
        # Whatever a library prints, standard output holds the result alone.
        with redirect_stdout(sys.stderr):
            check()
            yield result
    except KeyboardInterrupt as stop:
        result.interrupt(interrupted, str(stop))
    except Exception as error:
        if not result.explain(error, interrupted):
            raise
    result.show()
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _of_the_system(error: OSError | MemoryError) -> tuple[str, str, int]:
    """What is said of an error of the system's for which nothing nearer had a sentence; its kind and its exit code."""
    if isinstance(error, MemoryError):
        advice = "there is not enough memory for this. End other programs, or give it a smaller model or file"
        return advice, DoesNotFitError.__name__, DoesNotFitError.exit_code
    place = f"{error.filename}: " if error.filename else ""
    advice = (
        f"{place}{error.strerror or error}. Look at the path and its permissions, and at the system's log"
    )
    return advice, StorageError.__name__, StorageError.exit_code


def _plain(value: Any) -> Any:
    """The same value of JSON types alone; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
