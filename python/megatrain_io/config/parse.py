"""The configuration of a run: a YAML file with the names Hugging Face uses, and ``key=value`` on top of it.

Strict: all unknown keys, wrong types and values out of range are refused at once, with their lines. No torch.
"""

import difflib
import logging
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatrain_io.config.aliases import ALIASES, ELSEWHERE
from megatrain_io.config.schema import ROOT, SECTIONS, RunConfig
from megatrain_io.config.yaml_text import NOT_YAML, yaml_problem
from megatrain_io.errors import ConfigError
from megatrain_io.files import SETTINGS_BYTES_MAX, read_file

__all__ = ["describe_keys", "load", "load_config"]

_LOG = logging.getLogger("megatrain_io")

_KEYS: dict[str, list[str]] = {
    ROOT: [name for name in RunConfig.model_fields if name not in SECTIONS],
    **{section: list(model.model_fields) for section, model in SECTIONS.items()},
}
_TEXT_KEYS = {
    "ram",
    "vram",
    "model",
    "output_dir",
    "chat_template",
    "store_dir",
    "block_list",
    "miniature",
    "modules",
    "format",
    "fields",
    "data.train",
}
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_EXPONENT = re.compile(r"([-+]?)(\d*)\.?(\d*)[eE]([-+]?)(\d+)")


def load_config(
    source: Path | str | Mapping[str, Any], settings: Sequence[str] | Mapping[str, Any] = ()
) -> RunConfig:
    """Read the configuration of a run; notes about what was understood otherwise than written go to the log.

    Args:
        source: a YAML file, or the same keys as a mapping: ``{"model": "./model", "train": {"max_steps": 20}}``.
        settings: what wins over it: ``{"train.learning_rate": 2e-5}`` or ``["learning_rate=2e-5"]``.

    Raises:
        ConfigError: it names every problem.
    """
    config, notes = load(Path(source) if isinstance(source, str) else source, settings)
    for note in notes:
        _LOG.warning(note)
    return config


def load(
    source: Path | Mapping[str, Any] | None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    defaults: Mapping[tuple[str, str], Any] | None = None,
) -> tuple[RunConfig, list[str]]:
    """Read a configuration, and notes about what was understood otherwise than it was written.

    Args:
        source: YAML file, or its keys as a mapping; None takes everything from ``overrides``.
        overrides: ``key=value``, the key as a dotted path (``train.learning_rate``) or by its last part
            where that is clear, the value as YAML; or a mapping from such keys to values. They win over the source.
        defaults: values for keys that must be given, by section and name, where the caller can do without them.

    Raises:
        ConfigError: it names every problem, with its line.
    """
    if not isinstance(source, Path | Mapping | None):
        raise ConfigError(
            f"the configuration is a {type(source).__name__}: give a YAML file, or its keys as a mapping"
        )
    if isinstance(overrides, str):
        overrides = [overrides]
    reading = _Reading(source if isinstance(source, Path) else None)
    if isinstance(source, Path):
        reading.read_file(source)
    elif source is not None:
        reading.read_mapping(source)
    if isinstance(overrides, Mapping):
        reading.read_mapping(overrides)
    else:
        for item in overrides:
            reading.read_override(item)
    reading.default(defaults or {})
    return reading.finish(), reading.notes


def describe_keys() -> str:
    """Every key with its default and its meaning, one a line, as text."""
    lines = []
    for section, names in _KEYS.items():
        model = SECTIONS.get(section, RunConfig)
        for name in names:
            field = model.model_fields[name]
            default = "required" if field.is_required() else _shown(field.default)
            lines.append(f"{_dotted(section, name):<38} {default:<10} {field.description}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Place:
    line: int = 0  # of the file; 0 is elsewhere
    elsewhere: str = "on the command line"

    def __str__(self) -> str:
        return f"line {self.line}" if self.line else self.elsewhere


_COMMAND_LINE = _Place()
_MAPPING = _Place(elsewhere="in the mapping")
_AFTER_ALL_LINES = 2**31


class _Reading:
    """Gathers values, problems and notes; a problem does not end the reading, so that all are told at once."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.notes: list[str] = []
        self._values: dict[tuple[str, str], tuple[Any, _Place]] = {}
        self._problems: list[tuple[int, str]] = []
        self._suggested: set[str] = set()

    # ------------------------------------------------------------------------------------------ the file

    def read_file(self, path: Path) -> None:
        """Read the keys of a YAML file."""
        try:
            loader = yaml.SafeLoader(read_file(path, SETTINGS_BYTES_MAX))
            root = loader.get_single_node()
        except NOT_YAML as error:
            raise ConfigError(f"{path}: not YAML: {yaml_problem(error)}") from error
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        if not isinstance(root, yaml.MappingNode | None):
            raise ConfigError(f"{path}: must hold keys and values, such as `model: ./Qwen3-8B`")
        for section, name, node, place in () if root is None else self._nodes(root):
            self._take_node(loader, section, name, node, place)

    def _nodes(self, root: yaml.MappingNode) -> Iterator[tuple[str, str, yaml.Node, _Place]]:
        for section, node, place in _pairs(root):
            if section not in SECTIONS:
                yield ROOT, section, node, place
            elif isinstance(node, yaml.MappingNode):
                yield from ((section, name, value, at) for name, value, at in _pairs(node))
            elif node.tag != "tag:yaml.org,2002:null":
                self._problem(section, "must hold keys beneath it", place)

    def _take_node(
        self, loader: yaml.SafeLoader, section: str, name: str, node: yaml.Node, place: _Place
    ) -> None:
        if (key := self._known(section, name, place)) is None:
            return
        label = _dotted(*key)
        if key in self._values:
            self._problem(label, f"given twice, also in {self._values[key][1]}; keep one", place)
            return
        try:
            value = loader.construct_object(node, deep=True)
        except NOT_YAML as error:  # a day that no month has, a number without digits
            self._problem(label, f"the value is not YAML: {yaml_problem(error)}", place)
            return
        number = _number(key, value)
        if number is not None:
            self.notes.append(
                f"{label}: {value} was read as text by YAML 1.1; taken as {number} ({place}). "
                f"Write {_point_and_sign(value)} to silence this"
            )
        self._values[key] = (value if number is None else number, place)

    # ---------------------------------------------------------------------------------- the command line

    def read_override(self, item: str) -> None:
        """Read one ``key=value`` of the command line; it wins over the file."""
        written, equals, text = item.partition("=")
        written = written.strip()
        if not equals or not written:
            self._problem(item, "not key=value")
            return
        try:
            value = yaml.safe_load(text)
        except NOT_YAML as error:
            self._problem(written, f"the value is not YAML: {yaml_problem(error)}")
            return
        self._set(written, value, _COMMAND_LINE)

    # -------------------------------------------------------------------------------------- the mapping

    def read_mapping(self, mapping: Mapping[str, Any]) -> None:
        """Read the keys of a mapping, nested by section or dotted."""
        before = self._values
        self._values = {}
        for key, value in mapping.items():
            if key in SECTIONS and (value is None or isinstance(value, Mapping)):
                for name, inner in (value or {}).items():
                    self._set(f"{key}.{name}", inner, _MAPPING)
            else:
                self._set(str(key), value, _MAPPING)
        self._values = before | self._values

    def _set(self, written: str, value: Any, place: _Place) -> None:
        """Set a key by its dotted path; it wins over what was read before."""
        section, name, *rest = self._section_of(written.split("."))
        if not name:
            also = [f"{other}.{section}" for other in SECTIONS if section in _KEYS[other]]
            hint = f"Did you mean {also[0]}?" if also else ""
            self._problem(written, "a section, not a key", place, hint)
            return
        if rest and name != "fields" and name not in ELSEWHERE:
            self._problem(written, "unknown key", place, self._nearest(section, name))
            return
        if (key := self._known(section, name, place)) is None:
            return
        if not rest and place == _MAPPING and key in self._values:
            self._problem(_dotted(*key), "given twice; keep one", place)
        if rest:
            before = self._values.get(key, ({}, place))[0]
            value = {**(before if isinstance(before, dict) else {}), ".".join(rest): value}
        self._values[key] = (value if (number := _number(key, value)) is None else number, place)

    def _section_of(self, parts: list[str]) -> list[str]:
        """The parts of a dotted path, its section first; a name without one is looked for in all sections."""
        if parts[0] in SECTIONS:
            return parts if len(parts) > 1 else [*parts, ""]
        homes = [section for section in _KEYS if parts[0] in _names(section)]
        return [homes[0] if len(homes) == 1 else ROOT, *parts]

    def default(self, values: Mapping[tuple[str, str], Any]) -> None:
        """Set the values of keys that were not given."""
        for key, value in values.items():
            self._values.setdefault(key, (value, _COMMAND_LINE))

    # ------------------------------------------------------------------------------------------ the keys

    def _known(self, section: str, name: str, place: _Place) -> tuple[str, str] | None:
        """The key that is meant by a name, as (section, name); None after noting what is wrong with it."""
        if name in _KEYS[section]:
            return section, name
        label = _dotted(section, name)
        if (section, name) in ALIASES:
            meant = ALIASES[section, name]
            self.notes.append(f"{label}: taken as {_dotted(section, meant)} ({place})")
            return section, meant
        if name in ELSEWHERE:
            self._problem(label, ELSEWHERE[name], place)
        else:
            self._problem(label, "unknown key", place, self._nearest(section, name))
        return None

    def _nearest(self, section: str, name: str) -> str:
        """A hint: the most similar key of the section, else of all, else what the section has."""
        here = _names(section) + ([] if section else list(SECTIONS))
        homes = {leaf: other for other in _KEYS for leaf in _names(other)}
        if found := difflib.get_close_matches(name, here, n=1):
            self._suggested.add(_dotted(section, ALIASES.get((section, found[0]), found[0])))
            return f"Did you mean {found[0]}?"
        if found := difflib.get_close_matches(name, list(homes), n=1):
            self._suggested.add(_dotted(homes[found[0]], found[0]))
            return f"Did you mean {_dotted(homes[found[0]], found[0])}?"
        return f"Known here: {', '.join(here)}"

    # ------------------------------------------------------------------------------------------- the end

    def finish(self) -> RunConfig:
        """Check all values against their types and ranges, and return the configuration.

        Raises:
            ConfigError: it names every problem, with its line.
        """
        tree: dict[str, Any] = {"data": {}}
        for (section, name), (value, _) in self._values.items():
            (tree.setdefault(section, {}) if section else tree)[name] = value
        config = None
        try:
            config = RunConfig.model_validate(tree)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self._take_error(detail["loc"], detail["type"], detail["msg"])
        if config is None or self._problems:
            problems = [text for _, text in sorted(self._problems, key=lambda problem: problem[0])]
            from_file = self.path is not None and any(line > 0 for line, _ in self._problems)
            source = str(self.path) if from_file else "the configuration"
            if len(problems) == 1:
                raise ConfigError(f"{source}: {problems[0]}")
            raise ConfigError("\n  ".join([f"{source}: {len(problems)} problems", *problems]))
        if config.train.max_steps and ("train", "num_train_epochs") in self._values:
            self.notes.append("train.num_train_epochs: not used, because max_steps is given")
        return config

    def _take_error(self, loc: tuple[int | str, ...], kind: str, message: str) -> None:
        section, name = (str(loc[0]), str(loc[1])) if loc[1:] else (ROOT, str(loc[0]) if loc else "")
        label = _dotted(section, name)
        if kind == "missing":
            if label not in self._suggested:
                sentence = f"{label}: required; give it in the file, or {label}=... on the command line"
                self._problems.append((_AFTER_ALL_LINES, sentence))
        elif not loc:
            self._problems.append((_AFTER_ALL_LINES, message.removeprefix("Value error, ")))
        else:
            value, place = self._values[section, name]
            must = re.sub(r"^(Input should|Value error, must) ", "must ", message)
            self._problem(label, f"{must}, and is {_shown(value)}", place)

    def _problem(self, label: str, what: str, place: _Place = _COMMAND_LINE, hint: str = "") -> None:
        self._problems.append((place.line, f"{label}: {what} ({place}). {hint}".removesuffix(". ")))


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _names(section: str) -> list[str]:
    return _KEYS[section] + [alias for home, alias in ALIASES if home == section]


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, _Place]]:
    """Keys as they are written (``on`` stays ``on``), values, and the lines of the keys."""
    for key, value in node.value:
        yield str(key.value), value, _Place(key.start_mark.line + 1)


def _number(key: tuple[str, str], value: Any) -> float | int | None:
    """The number that was meant by a text such as ``1e-5``; None if it is none, or the key takes text."""
    if not isinstance(value, str) or key[1] in _TEXT_KEYS or _dotted(*key) in _TEXT_KEYS:
        return None
    if not _EXPONENT.fullmatch(value) or value[0] in "eE":
        return None
    number = float(value)
    return int(number) if number.is_integer() else number


def _point_and_sign(text: str) -> str:
    """A number with an exponent, written as YAML 1.1 requires."""
    return _EXPONENT.sub(lambda m: f"{m[1]}{m[2] or 0}.{m[3] or 0}e{m[4] or '+'}{m[5]}", text)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    is_short_word = isinstance(value, str) and value.isidentifier() and len(value) <= _SHORT.maxstring
    return value if is_short_word else _SHORT.repr(value)
