"""Entry of the ``megatrain-io`` command and of ``python -m megatrain_io``."""

import codecs
import io
import os
import sys
from contextlib import suppress

from megatrain_io.interrupt import held, stop_signals
from megatrain_io.machine.threads import let_waiting_threads_yield

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code."""
    _start_over_in_utf8()
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding does not have is shown escaped.
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # it was written to before, and its place cannot be told
                stream.reconfigure(errors="backslashreplace")
    # Read by transformers and tokenizers when they are imported: nothing is fetched, nothing is chatty, and no
    # threads are started that a fork would not survive.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    let_waiting_threads_yield(os.environ)
    try:
        with stop_signals(owns_process=True):
            # A library that is interrupted while it is imported may turn that into any other error.
            with held():
                from megatrain_io.cli.app import app
            app(prog_name="megatrain-io")
    except KeyboardInterrupt:
        sys.exit(130)


def _start_over_in_utf8() -> None:
    """Begin anew in Python's UTF-8 mode where the locale is another: names of other letters could not be kept.

    The libraries that read tokenizers take paths as UTF-8 alone.
    """
    is_utf8 = codecs.lookup(sys.getfilesystemencoding()).name == "utf-8"
    if is_utf8 or os.environ.get("PYTHONUTF8") == "1" or not sys.executable or len(sys.orig_argv) < 2:  # noqa: PLR2004
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this very program


if __name__ == "__main__":
    main()
