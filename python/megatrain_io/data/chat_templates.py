"""Chat templates, and their rendering in a process of its own.

A template comes with a model and is a program: one that loops without end or takes all memory must end with a
sentence. It is rendered by transformers, in a fork of this process that has limits of time and memory.
"""

import gc
import json
import os
import re
import resource
import signal
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from megatrain_io.data.files import open_file
from megatrain_io.errors import DataError
from megatrain_io.files import SETTINGS_BYTES_MAX, lead_nowhere, read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHAT_TEMPLATES", "ChatRenderer", "TemplateError", "read_chat_template"]

CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
}
_TEMPLATE_BYTES_MAX = 4 << 20
# Of one rendering. Those of models take milliseconds and some 10 kB.
_CPU_SECONDS = 5
# Of all renderings of a conversation, two for each answer.
_CONVERSATION_SECONDS = 120
_MEMORY = 512 << 20
_CHARACTERS = 64 << 20
# A process that does not even use up its time.
_WAIT_SECONDS = 600
# The day that templates are told it is in training. The day of the run would give other tokens on another day.
_TODAY = datetime(2024, 7, 26, tzinfo=UTC)
_TODAY_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_UNTOUCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class TemplateError(Exception):
    """A chat template refuses a conversation, or goes beyond its limits.

    Attributes:
        turns: number of turns that it was given.
        reason: what it said, or which limit it met.
    """

    def __init__(self, turns: int, reason: str) -> None:
        super().__init__(reason)
        self.turns = turns
        self.reason = reason


def read_chat_template(choice: str | None) -> str | None:
    """Text of the template that was chosen by name, as the path of a file, or as the text itself.

    Raises:
        DataError: the choice is none of them.
    """
    if choice is not None and re.search(r"\{[{%]", choice):
        return choice
    if choice is None or choice in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[choice] if choice else None
    reason = ""
    try:
        with open_file(Path(choice).expanduser()) as file:
            content = file.read(_TEMPLATE_BYTES_MAX + 1)
        if len(content) <= _TEMPLATE_BYTES_MAX:
            return content.decode()
        reason = f"it has more than {_TEMPLATE_BYTES_MAX:,} bytes"
    except (DataError, UnicodeDecodeError, ValueError, RuntimeError) as error:
        reason = str(error)
    raise DataError(
        f"data.chat_template: {choice!r} is neither {', '.join(CHAT_TEMPLATES)} nor a text file that can be "
        f"read ({reason.rstrip('.')}). Give one of the names, or the path or text of a Jinja template."
    )


class ChatRenderer:
    """Renders conversations by a chat template, as transformers does, within limits of time and memory."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None = None, *, fixed_day: bool
    ) -> None:
        """Nothing is started before the first conversation.

        Args:
            tokenizer: a transformers tokenizer.
            chat_template: a Jinja template to use instead of the tokenizer's.
            fixed_day: tell the template the same day every day, for data that are the same tomorrow.
        """
        self._tokenizer: Any = tokenizer
        self._chat_template = chat_template
        self._fixed_day = fixed_day
        self._connection: Connection | None = None
        self._process = 0
        self._finalizer: weakref.finalize[..., ChatRenderer] | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        parts: Sequence[tuple[int, bool]],
    ) -> list[str]:
        """Render the beginnings of a conversation.

        Args:
            messages: its turns.
            tools: JSON schemas of the tools that may be called.
            parts: of each rendering the number of turns, and whether it ends with the prompt for an answer.

        Raises:
            TemplateError: the template refuses one, or goes beyond its limits.
            DataError: no process can be started.
        """
        connection = self._connection or self._start()
        request = {"messages": [*messages], "tools": [*tools] if tools else None, "parts": [*parts]}
        try:
            connection.send_bytes(json.dumps(request).encode())
            reply = json.loads(connection.recv_bytes()) if connection.poll(_WAIT_SECONDS) else None
        except (EOFError, OSError):
            raise TemplateError(len(messages), self._died()) from None
        if reply is None:
            self.close()
            raise TemplateError(len(messages), f"it gave no answer within {_WAIT_SECONDS} seconds")
        if "reason" in reply:
            raise TemplateError(reply["turns"], reply["reason"])
        texts: list[str] = reply["texts"]
        return texts

    def close(self) -> None:
        """End the process; a later rendering starts another one."""
        if self._finalizer is not None:
            self._finalizer()
        self._connection = self._finalizer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        try:
            with warnings.catch_warnings():
                # Of threads that a fork lacks: it calls Python code alone, and needs none of them.
                warnings.simplefilter("ignore", DeprecationWarning)
                process = os.fork()
        except OSError as error:
            raise DataError(
                f"no process for the chat template can be started: {error.strerror}. Free some memory, or end others."
            ) from error
        if process == 0:
            _serve(theirs, self._tokenizer, self._chat_template, fixed_day=self._fixed_day)
        theirs.close()
        self._connection, self._process = ours, process
        self._finalizer = weakref.finalize(self, _end, ours, process)
        return ours

    def _died(self) -> str:
        """Why the process ended."""
        if self._finalizer is not None:
            self._finalizer.detach()
        if self._connection is not None:
            self._connection.close()
        self._connection = self._finalizer = None
        status = os.waitpid(self._process, 0)[1]
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGPROF:
                return (
                    f"it takes more than {_CPU_SECONDS} seconds of computing, the most that one rendering may"
                )
            return f"its process was ended by signal {number} ({signal.Signals(number).name})"
        return _too_large()


def _end(connection: Connection, process: int) -> None:
    connection.close()
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(process, 0)


# ---------------------------------------------------------------------------------------- the other process


def _serve(connection: Connection, tokenizer: Any, template: str | None, *, fixed_day: bool) -> NoReturn:
    """Answer requests until the other end is closed; what was forked is never returned to."""
    try:
        _limit(connection.fileno())
        while True:
            request = json.loads(connection.recv_bytes())
            connection.send_bytes(json.dumps(_answer(request, tokenizer, template, fixed_day)).encode())
    finally:
        os._exit(1)


def _limit(kept: int) -> None:
    """Leave all of the parent but its memory, and take no more than a bounded part beside it."""
    gc.disable()  # what it would end belongs to the parent
    for number in _UNTOUCHED:
        signal.signal(number, signal.SIG_IGN)  # these are for the parent, and its end is seen
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    lead_nowhere((0, 1, 2))
    for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if descriptor not in (0, 1, 2, kept):
            with suppress(OSError):
                os.close(descriptor)
    mapped = int(read_file(Path("/proc/self/statm"), SETTINGS_BYTES_MAX).split()[0]) * resource.getpagesize()
    for what, most in ((resource.RLIMIT_AS, mapped + _MEMORY), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)  # noqa: PLW2901
        resource.setrlimit(what, (most, hard))


def _answer(request: Any, tokenizer: Any, template: str | None, fixed_day: bool) -> dict[str, Any]:  # noqa: FBT001
    texts: list[str] = []
    turns = 0
    end = time.process_time() + _CONVERSATION_SECONDS
    try:
        for turns, prompting in request["parts"]:
            # By the signal, which also ends what Python does not come back from.
            signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
            chosen = tokenizer.get_chat_template(template, request["tools"])
            text = tokenizer.apply_chat_template(
                request["messages"][:turns],
                tools=request["tools"],
                chat_template=_with_a_fixed_day(chosen) if fixed_day else chosen,
                add_generation_prompt=prompting,
                tokenize=False,
            )
            if len(text) > _CHARACTERS:
                return _refused(turns, f"it makes {len(text):,} characters, more than {_CHARACTERS:,}")
            text.encode()
            texts.append(text)
            if time.process_time() > end:
                what = (
                    f"its {len(request['messages']):,} turns take more than {_CONVERSATION_SECONDS} seconds"
                )
                return _refused(turns, f"{what} to render: split the conversation")
    except MemoryError:
        return _refused(turns, _too_large())
    except UnicodeEncodeError:
        return _refused(turns, "it makes half a character, which is no text")
    except Exception as error:  # noqa: BLE001 - whatever a template raises, or does wrong
        return _refused(turns, str(error)[:1000] or type(error).__name__)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"texts": texts}


def _too_large() -> str:
    return f"it needs more than {_MEMORY >> 20} MiB of memory, the most that one rendering may"


def _refused(turns: int, reason: str) -> dict[str, Any]:
    return {"turns": turns, "reason": reason}


def _with_a_fixed_day(template: str) -> str:
    return _TODAY_CALL.sub(lambda call: json.dumps(_TODAY.strftime(call[2])), template)
