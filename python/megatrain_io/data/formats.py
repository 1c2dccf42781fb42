"""Documents of training data, in whichever of the known formats they come."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, NoReturn, get_args

from megatrain_io.data.files import SourceFile
from megatrain_io.data.rows import Row, json_name, read_rows
from megatrain_io.data.text_files import read_passages
from megatrain_io.errors import ConfigError, DataError

__all__ = ["Completion", "Conversation", "Document", "DocumentReader", "Format", "Instruction", "Text"]

Format = Literal["text", "prompt_completion", "messages", "alpaca", "sharegpt"]

# The keys that tell a format, in the order in which they are looked for: data sets in the alpaca format often
# carry the assembled `text` as well.
_KEYS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_KNOWN = "text | prompt+completion | messages | instruction+output | conversations"
_FIELDS = {key for keys in _KEYS.values() for key in keys} | {"input", "role", "content", "from", "value"}
# Keys of conversations that would decide what the model sees, or which turns are trained, and are not read.
_PICTURES = ("image", "images", "video", "videos", "audio", "audios")
_TURN_MASKS = ("train", "training", "train_on_turn", "train_detail", "mask", "masked", "loss", "loss_mask")
# What data sets that nobody has mapped yet call a question and its answer.
_ASKING = ("prompt", "question", "instruction", "input", "query")
_ANSWERING = ("answer", "response", "completion", "output", "reply")
_PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off)$)[A-Za-z_][\w.-]*", re.ASCII | re.IGNORECASE)
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(["gpt", "chatgpt", "bard", "bing", "model", "bot"], "assistant"),
    **dict.fromkeys(["function", "observation", "function_response"], "tool"),
    "human": "user",
}


@dataclass(frozen=True)
class Text:
    """Running text, all of which is trained; `ends` is false where more of the same document follows."""

    text: str
    ends: bool = True


@dataclass(frozen=True)
class Completion:
    """A prompt as it stands, and the completion that is trained to follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Instruction:
    """An instruction in words (with its input, if any), and the output that is trained to answer it.

    Attributes:
        instruction: what is asked.
        output: the answer.
        system: what the model is told before, or "".
        history: earlier instructions and answers.
    """

    instruction: str
    output: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()

    def turns(self) -> tuple[Row, ...]:
        """The same as turns of a conversation."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in (*self.history, (self.instruction, self.output)):
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return tuple(turns)


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation, each with `role` and `content`, and the tools it may call, as JSON schemas.

    An answer with `weight` 0 is not trained.
    """

    messages: tuple[Row, ...]
    tools: tuple[Row, ...] | None = None


@dataclass(frozen=True)
class Document:
    """One example of the training data, and where it stands.

    Attributes:
        place: file and line, for people.
        format: of the file.
        content: the example; a long text file comes as several documents, all but the last with `ends` false.
        bytes_read: bytes of the file up to its end.
        whole: sha256 of the file where the file is one document, else "".
        unused: keys of the example that nothing is done with.
    """

    place: str
    format: Format
    content: Text | Completion | Instruction | Conversation
    bytes_read: int = field(compare=False)
    whole: str = ""
    unused: tuple[str, ...] = field(default=(), compare=False)

    def key(self, seed: int) -> int:
        """64 bits of a hash of the content: the same in whatever file or order the document stands."""
        content = self.whole
        if not content:
            values = asdict(self.content)
            # As it was before there were these: a run goes on with the same share held out.
            plain = {
                name: value for name, value in values.items() if value or name not in ("system", "history")
            }
            content = json.dumps(plain, sort_keys=True)
        return int.from_bytes(hashlib.sha256(f"{seed}:{content}".encode()).digest()[:8])


class DocumentReader:
    """Reads the documents of files, and finds out the format of each file."""

    def __init__(self, data_format: Format | None = None, fields: Mapping[str, str] | None = None) -> None:
        """Check the options.

        Args:
            data_format: forces one format; None finds it out from the first example of each file.
            fields: which key of the data stands for which of ours: `{"prompt": "question"}`.

        Raises:
            ConfigError: there is no such format or field.
        """
        if data_format is not None and data_format not in get_args(Format):
            raise ConfigError(
                f"data.format: {data_format!r} is not one of {', '.join(get_args(Format))}, auto"
            )
        if unknown := sorted((fields or {}).keys() - _FIELDS):
            raise ConfigError(
                f"data.fields: {unknown[0]!r} is not one of {', '.join(sorted(_FIELDS))}. "
                f"Ours come first, those of the file second: {{prompt: question, completion: answer}}"
            )
        self._format = data_format
        self._fields = {key: key for key in _FIELDS} | dict(fields or {})
        # What was named is meant, also where the names of another format are there.
        self._order = sorted(_KEYS, key=lambda name: not set(_KEYS[name]) & set(fields or {}))

    @property
    def reads_unknown_as(self) -> Literal["text", "json"] | None:
        """How a file of an unknown extension is read: only if the format was forced."""
        if self._format is None:
            return None
        return "text" if self._format == "text" else "json"

    def read(self, file: SourceFile) -> Iterator[Document]:
        """Yield the documents of a file, in its order; blank lines and blank files give none.

        Raises:
            DataError: something in it cannot be read, with file and line.
        """
        if file.kind == "text":
            if self._format not in (None, "text"):
                raise DataError(
                    f"{file.path} is plain text, and data.format: {self._format} needs keys. "
                    f"Give it in a .jsonl file, or leave data.format out."
                )
            for text, ends, bytes_read in read_passages(file):
                yield Document(str(file.path), "text", Text(text, ends), bytes_read, file.sha256)
            return
        found = self._format
        for place, row, bytes_read in read_rows(file):
            found = found or self._detect(place, row)
            missing = [key for key in _KEYS[found] if self._fields[key] not in row]
            if missing:
                self._refuse_keys(place, row, found)
            content = self._content(place, row, found)
            yield Document(place, found, content, bytes_read, unused=self._unused(row, found))

    def _unused(self, row: Row, data_format: Format) -> tuple[str, ...]:
        """Keys with a value of which nothing becomes."""
        names = {"alpaca": ("input", "system", "history"), "messages": ("tools", "system")}
        ours = (*_KEYS[data_format], *names.get(data_format.replace("sharegpt", "messages"), ()))
        used = {self._fields.get(key, key) for key in ours}
        return tuple(key for key, value in row.items() if key not in used and value not in (None, "", [], {}))

    def _detect(self, place: str, row: Row) -> Format:
        for data_format in self._order:
            if all(self._fields[key] in row for key in _KEYS[data_format]):
                return data_format
        if {"chosen", "rejected"} <= row.keys():
            raise DataError(
                f"{place} has keys [{_keys(row)}]: preference pairs are not trained. To train the chosen answers "
                f"alone, {_of_chosen(place, row)}"
            )
        raise DataError(f"{place} has keys [{_keys(row)}]. Known: {_KNOWN}. {_map_example(row)}")

    def _refuse_keys(self, place: str, row: Row, data_format: Format) -> NoReturn:
        needed = ", ".join(self._fields[key] for key in _KEYS[data_format])
        whence = "data.format says" if self._format else "the file's first example is"
        raise DataError(
            f"{place} has keys [{_keys(row)}], but {whence} {data_format}, which needs [{needed}]. "
            f"Correct the line, or name its keys in data.fields; one file holds one format."
        )

    def _content(
        self, place: str, row: Row, data_format: Format
    ) -> Text | Completion | Instruction | Conversation:
        if data_format == "text":
            return Text(self._string(place, row, "text"))
        if data_format == "prompt_completion":
            return Completion(self._string(place, row, "prompt"), self._string(place, row, "completion"))
        if data_format == "alpaca":
            instruction = self._string(place, row, "instruction")
            if row.get(self._fields["input"]):
                instruction += "\n\n" + self._string(place, row, "input")
            output = self._string(place, row, "output")
            return Instruction(instruction, output, self._system(place, row), _history(place, row))
        return self._conversation(place, row, self._fields[_KEYS[data_format][0]])

    def _conversation(self, place: str, row: Row, key: str) -> Conversation:
        if pictures := [name for name in _PICTURES if row.get(name)]:
            raise DataError(
                f"{place} has {pictures[0]}, and only text is trained. Remove the line, or the key."
            )
        turns = _objects(place, row, key)
        if not turns:
            raise DataError(f"{place}: {key} is an empty list. Remove the line.")
        messages = tuple(self._message(f"{place}, {key}[{i}]", turn) for i, turn in enumerate(turns))
        if system := self._system(place, row):
            first = messages[0]
            if first["role"] not in ("system", "developer"):
                messages = ({"role": "system", "content": system}, *messages)
            elif first.get("content") != system:
                raise DataError(
                    f"{place} has {key} that begin with a system turn, and another system beside. Keep one."
                )
        return Conversation(messages, _tools(place, row))

    def _system(self, place: str, row: Row) -> str:
        return self._string(place, row, "system") if row.get("system") else ""

    def _message(self, place: str, turn: Row) -> Row:
        """A turn with `role` and `content`, and whatever else it says: templates read reasoning and tool calls."""
        pairs = (("role", "content"), ("from", "value"))
        pair = next((pair for pair in pairs if self._fields[pair[0]] in turn), None)
        if pair is None:
            raise DataError(
                f"{place} has keys [{_keys(turn)}]. Each turn needs role+content or from+value; "
                f"name its keys with data.fields: {{role: ..., content: ...}}."
            )
        role_key, content_key = pair
        role = self._string(place, turn, role_key)
        if role not in _ROLES:
            raise DataError(
                f"{place}: the {self._fields[role_key]} {role!r} is unknown. Known: {', '.join(_ROLES)}. "
                f"Correct it: only turns of the assistant are trained."
            )
        own = (self._fields[role_key], self._fields[content_key])
        message = {key: value for key, value in turn.items() if key not in own}
        message["role"] = _ROLES[role]
        _check_mask(place, message)
        if not turn.get("tool_calls") or turn.get(self._fields[content_key]) is not None:
            message["content"] = self._string(place, turn, content_key)
        return message

    def _string(self, place: str, row: Row, key: str) -> str:
        name = self._fields.get(key, key)
        value = row.get(name)
        if not isinstance(value, str):
            what = f"is {json_name(value)}" if name in row else "is missing"
            raise DataError(f"{place}: {name} {what}; it must be text in quotes.")
        return value


def _objects(place: str, row: Row, key: str) -> tuple[Row, ...]:
    value = row[key]
    if not isinstance(value, list):
        raise DataError(f"{place}: {key} is {json_name(value)}; it must be a list of objects.")
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise DataError(f"{place}: {key}[{i}] is {json_name(item)}; it must be an object.")
    return tuple(value)


def _check_mask(place: str, message: Row) -> None:
    """Refuse what says which turns are trained, but as `weight` of an answer, 0 or 1."""
    if masks := [key for key in _TURN_MASKS if message.get(key) is not None]:
        raise DataError(
            f"{place} has the key {masks[0]}, which is not read. Remove it: answers are trained, and nothing else is; "
            f"one with weight: 0 is not."
        )
    weight = message.get("weight")
    if weight is None:
        message.pop("weight", None)
    elif weight not in (0, 1) or (weight and message["role"] != "assistant"):
        raise DataError(
            f"{place}: weight is {weight!r} for a turn of the {message['role']}. It can be 0 or 1 for an answer, which "
            f"is not trained or is; other turns are not."
        )


def _tools(place: str, row: Row) -> tuple[Row, ...] | None:
    """The tools of a conversation, which some tools write as JSON in a text."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            row = {"tools": json.loads(tools)}
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: tools is text that is not JSON: {error}. Write a list of objects."
            ) from error
    return _objects(place, row, "tools") if row.get("tools") else None


def _history(place: str, row: Row) -> tuple[tuple[str, str], ...]:
    """Earlier instructions and answers: pairs of texts."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in history
    ):
        raise DataError(
            f'{place}: history must be a list of pairs of texts: [["question", "answer"], ...]. Correct the line.'
        )
    return tuple((question, answer) for question, answer in history)


def _keys(row: Row) -> str:
    return ", ".join(row)


def _of_chosen(place: str, row: Row) -> str:
    """How to train the chosen answers of preference pairs alone."""
    asked = next((key for key in _ASKING if key in row), None)
    if not isinstance(row["chosen"], list):
        names = {"text": "chosen"} if asked is None else {"prompt": asked, "completion": "chosen"}
        return f"map them with data.fields: {_flow(names)}."
    if asked is None or not isinstance(row[asked], list):
        return "map them with data.fields: {messages: chosen}."
    return (
        f"write {asked} and chosen of each line as one list under the key messages ({place} has them as two)."
    )


def _map_example(row: Row) -> str:
    if len(row) == 1:
        return f"Map with data.fields: {_flow({'text': _keys(row)})}."
    asked = next((key for key in _ASKING if key in row), None)
    answer = next((key for key in _ANSWERING if key in row), None)
    if (asked is None or answer is None) and len(row) == 2:  # noqa: PLR2004 - one asks, one answers
        asked, answer = row
    question, answer = asked or "KEY_OF_THE_QUESTION", answer or "KEY_OF_THE_ANSWER"
    return (
        f"Map with data.fields: {_flow({'instruction': question, 'output': answer})} to train answers in the chat "
        f"template, or {_flow({'prompt': question, 'completion': answer})} to train them as they stand."
    )


def _flow(names: Mapping[str, str]) -> str:
    """A mapping as YAML on one line; names that are no plain words are quoted."""
    quoted = {ours: key if _PLAIN.fullmatch(key) else json.dumps(key) for ours, key in names.items()}
    return "{" + ", ".join(f"{ours}: {key}" for ours, key in quoted.items()) + "}"
