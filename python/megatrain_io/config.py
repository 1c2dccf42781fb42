"""The configuration of a run: a YAML file with the names Hugging Face uses, and ``key=value`` on top of it.

Strict: all unknown keys, wrong types and values out of range are refused at once, with their lines. No torch.
"""

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatrain_io.config_values import (
    INT_MAX,
    Count,
    CountOrAuto,
    Folders,
    Fp32Positive,
    FractionOrPath,
    LocalPath,
    Paths,
    Size,
    WholeCount,
)
from megatrain_io.errors import ConfigError

__all__ = ["DataConfig", "MemoryConfig", "RunConfig", "TrainConfig", "describe_keys", "load"]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class DataConfig(_Section):
    """What is trained on."""

    train: Paths
    """file or folder, or a list of them"""
    eval: FractionOrPath = None
    """held-out data: a fraction of the training data, or a path"""
    format: Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"] = "auto"
    """how examples are written: auto, text, prompt_completion, messages, alpaca or sharegpt"""
    fields: dict[str, str] | None = None
    """names of the columns, where they differ: {prompt: question, completion: answer}"""
    max_length: Annotated[int, Field(ge=2, le=INT_MAX)] = 1024
    """tokens in a sequence; what is longer is cut"""
    packing: bool = True
    """put several examples into one sequence, without letting them see each other"""
    assistant_only_loss: bool = True
    """train on answers, not on prompts"""
    chat_template: str | None = None
    """name, file or text of a chat template, where the model has none"""


class TrainConfig(_Section):
    """How it is trained: AdamW over all parameters."""

    num_train_epochs: WholeCount = 1
    """passes over the data"""
    max_steps: Count | None = None
    """optimizer steps; overrides num_train_epochs"""
    per_device_train_batch_size: Count = 1
    """sequences in a micro-batch"""
    gradient_accumulation_steps: CountOrAuto = 8
    """micro-batches in an optimizer step, which pays NVMe traffic once; auto: so many that computing hides it"""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    """highest learning rate"""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """course of the learning rate after the warm-up: cosine, linear or constant"""
    warmup_steps: Annotated[int, Field(ge=0, le=INT_MAX)] = 0
    """steps in which the learning rate rises from zero"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """decoupled; norms and biases are left out"""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """decay of the first moment"""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """decay of the second moment"""
    adam_epsilon: Fp32Positive = 1e-8
    """added to the denominator"""
    max_grad_norm: Fp32Positive | None = None
    """largest norm of all gradients together, exact; an update then waits for the next step; null: no limit"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16, fp32, or auto: as imported, else bf16, or fp32 on a GPU without it; masters and moments are fp32"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """what computes: cpu, cuda, or auto: a GPU where there is one"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """of the order of the data and of dropout"""
    eval_steps: Count | None = None
    """measure the held-out loss every so many steps, and at the end"""
    logging_steps: Count = 1
    """report every so many steps"""


class MemoryConfig(_Section):
    """Where the state lies and how it is moved."""

    store_dir: Folders | None = None
    """folder for the store, on a local NVMe drive, or a list: one for each drive; null: in output_dir"""
    durability: Literal["step", "scratch"] = "step"
    """step: committed steps survive a crash; scratch: only a clean end does, in half the space"""
    commit_every: Count = 1
    """steps between two commits: at most so many are lost in a crash"""
    ram: Size | None = None
    """what training may allocate, such as 4GiB; state stays in what buffers leave of it; null: half of what is free"""
    vram: Size | None = None
    """what training may take of a GPU's memory, such as 7GiB, driver included; null: what is free"""
    max_tbw: Annotated[float, Field(gt=0)] | None = None
    """terabytes (10^12 bytes) that the run may write to its drives; before more are, it pauses; null: no limit"""
    io_backend: Literal["auto", "uring", "threads"] = "auto"
    """auto, uring or threads"""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """for AdamW and checksums; 0: one for each core"""


class RunConfig(_Section):
    """One run. Relative paths are meant from the current directory."""

    model: LocalPath
    """folder of the model to start from"""
    output_dir: LocalPath
    """the run folder"""
    data: DataConfig
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        train = self.train
        if train.eval_steps is not None and self.data.eval is None:
            raise ValueError(
                "train.eval_steps: there is nothing to evaluate: give data.eval, or remove eval_steps"
            )
        if train.max_steps is not None and train.warmup_steps > train.max_steps:
            raise ValueError(
                f"train.warmup_steps: {train.warmup_steps} steps of warm-up are more than the whole run "
                f"(max_steps is {train.max_steps})"
            )
        return self

    def to_yaml(self) -> str:
        """All keys with their values, as YAML that ``load`` reads back to the same configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


_ROOT = ""
_SECTIONS: dict[str, type[_Section]] = {"data": DataConfig, "train": TrainConfig, "memory": MemoryConfig}
_KEYS: dict[str, list[str]] = {
    _ROOT: [name for name in RunConfig.model_fields if name not in _SECTIONS],
    **{section: list(model.model_fields) for section, model in _SECTIONS.items()},
}
_ALIASES: dict[tuple[str, str], str] = {
    (_ROOT, "model_name_or_path"): "model",
    ("data", "sequence_len"): "max_length",
    ("data", "cutoff_len"): "max_length",
    ("data", "max_seq_length"): "max_length",
}
_TEXT_KEYS = {
    "ram",
    "vram",
    "model",
    "output_dir",
    "chat_template",
    "store_dir",
    "format",
    "fields",
    "data.train",
}
_EXPONENT = re.compile(r"([-+]?)(\d*)\.?(\d*)[eE]([-+]?)(\d+)")

# Keys of other tools, and what is so here.
_ELSEWHERE: dict[str, str] = {
    name: sentence
    for names, sentence in (
        ("gradient_clipping clip_grad_norm max_norm grad_clip", "use train.max_grad_norm"),
        ("max_disk", "not available yet; remove it"),
        ("report_to run_name wandb_project logging_dir callbacks", "not available yet; remove it"),
        ("lora lora_r lora_rank lora_alpha lora_dropout lora_target peft", "not available yet; remove it"),
        ("lora_target_modules load_in_4bit load_in_8bit quantization_bit", "not available yet; remove it"),
        ("neftune_noise_alpha label_smoothing_factor group_by_length", "not available yet; remove it"),
        ("attn_implementation flash_attention flash_attn torch_compile", "not available yet; remove it"),
        ("optim optimizer", "AdamW is the only optimizer so far; remove it"),
        ("method finetuning_type adapter stage", "not available yet: all parameters are trained; remove it"),
        (
            "save_steps save_strategy save_total_limit saves_per_epoch save_only_model",
            "every step is durable here; nothing to set; remove it",
        ),
        (
            "bf16 fp16 fp32 tf32 dtype torch_dtype mixed_precision pure_bf16",
            "use precision (train.precision: bf16 or fp32)",
        ),
        (
            "gradient_checkpointing gradient_checkpointing_kwargs activation_offloading",
            "always on here; remove it",
        ),
        (
            "deepspeed fsdp fsdp_config accelerator_config zero_stage",
            "not used here: the model is paged through NVMe instead; remove it",
        ),
        ("eval_strategy evaluation_strategy evals_per_epoch", "use train.eval_steps"),
        ("val_set_size val_size test_size eval_dataset test_datasets", "use data.eval"),
        ("datasets dataset dataset_dir dataset_name train_file", "use data.train"),
        ("micro_batch_size train_batch_size batch_size", "use train.per_device_train_batch_size"),
        ("num_epochs epochs", "use train.num_train_epochs"),
        ("lr_scheduler scheduler", "use train.lr_scheduler_type"),
        ("lr", "use train.learning_rate"),
        ("warmup_ratio", "not available yet; use train.warmup_steps"),
        ("base_model", "use model"),
        ("template", "use data.chat_template"),
        ("train_on_inputs completion_only_loss", "use data.assistant_only_loss"),
        ("sample_packing", "use data.packing"),
        ("resume_from_checkpoint", "resuming is the option --resume of the command line"),
        ("overwrite_output_dir", "a run folder is never overwritten; choose another output_dir"),
        ("trust_remote_code", "code from a model folder is never run; remove it"),
        ("push_to_hub hub_model_id", "nothing is ever uploaded; remove it"),
        ("do_train do_eval dataloader_num_workers dataset_num_proc", "not needed here; remove it"),
    )
    for name in names.split()
}


def load(
    path: Path | None,
    overrides: Sequence[str] = (),
    defaults: Mapping[tuple[str, str], Any] | None = None,
) -> tuple[RunConfig, list[str]]:
    """Read a configuration, and notes about what was understood otherwise than it was written.

    Args:
        path: YAML file; None takes everything from ``overrides``.
        overrides: ``key=value``, the key as a dotted path (``train.learning_rate``) or by its last part
            where that is clear, the value as YAML. They win over the file.
        defaults: of keys that must be given, by section and name, for who can do without them.

    Raises:
        ConfigError: it names every problem, with its line.
    """
    reading = _Reading(path)
    if path is not None:
        reading.read_file(path)
    for item in overrides:
        reading.read_override(item)
    reading.default(defaults or {})
    return reading.finish(), reading.notes


def describe_keys() -> str:
    """Every key with its default and its meaning, one a line."""
    lines = []
    for section, names in _KEYS.items():
        model = _SECTIONS.get(section, RunConfig)
        for name in names:
            field = model.model_fields[name]
            default = "required" if field.is_required() else _shown(field.default)
            lines.append(f"{_dotted(section, name):<38} {default:<10} {field.description}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Place:
    line: int = 0  # 0 is the command line

    def __str__(self) -> str:
        return f"line {self.line}" if self.line else "on the command line"


_COMMAND_LINE = _Place()
_AFTER_ALL_LINES = 2**31


class _Reading:
    """Gathers values, problems and notes; what is wrong does not end the reading."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.notes: list[str] = []
        self._values: dict[tuple[str, str], tuple[Any, _Place]] = {}
        self._problems: list[tuple[int, str]] = []
        self._suggested: set[str] = set()

    # ------------------------------------------------------------------------------------------ the file

    def read_file(self, path: Path) -> None:
        """Take in a YAML file."""
        try:
            loader = yaml.SafeLoader(path.read_bytes())
            root = loader.get_single_node()
            if isinstance(root, yaml.MappingNode):
                for section, name, node, place in self._nodes(root):
                    self._take_node(loader, section, name, node, place)
            elif root is not None:
                raise ConfigError(f"{path}: must hold keys and values, such as `model: ./Qwen3-8B`")
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {_yaml_problem(error)}") from error
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error

    def _nodes(self, root: yaml.MappingNode) -> Iterator[tuple[str, str, yaml.Node, _Place]]:
        for section, node, place in _pairs(root):
            if section not in _SECTIONS:
                yield _ROOT, section, node, place
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
        value = loader.construct_object(node, deep=True)
        number = _number(key, value)
        if number is not None:
            self.notes.append(
                f"{label}: {value} was read as text by YAML 1.1; taken as {number} ({place}). "
                f"Write {_point_and_sign(value)} to silence this"
            )
        self._values[key] = (value if number is None else number, place)

    # ---------------------------------------------------------------------------------- the command line

    def read_override(self, item: str) -> None:
        """Take in one ``key=value``."""
        written, equals, text = item.partition("=")
        written = written.strip()
        if not equals or not written:
            self._problem(item, "not key=value")
            return
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            self._problem(written, f"the value is not YAML: {_yaml_problem(error)}")
            return
        section, name, *rest = self._section_of(written.split("."))
        if not name:
            also = [f"{other}.{section}" for other in _SECTIONS if section in _KEYS[other]]
            self._problem(written, "a section, not a key", hint=f"Did you mean {also[0]}?" if also else "")
            return
        if rest and name != "fields" and name not in _ELSEWHERE:
            self._problem(written, "unknown key", hint=self._nearest(section, name))
            return
        if (key := self._known(section, name, _COMMAND_LINE)) is None:
            return
        if rest:
            before = self._values.get(key, ({}, _COMMAND_LINE))[0]
            value = {**(before if isinstance(before, dict) else {}), ".".join(rest): value}
        self._values[key] = (value if (number := _number(key, value)) is None else number, _COMMAND_LINE)

    def _section_of(self, parts: list[str]) -> list[str]:
        """A dotted path with its section in front; a name of no section is looked for in all of them."""
        if parts[0] in _SECTIONS:
            return parts if len(parts) > 1 else [*parts, ""]
        homes = [section for section in _KEYS if parts[0] in _names(section)]
        return [homes[0] if len(homes) == 1 else _ROOT, *parts]

    def default(self, values: Mapping[tuple[str, str], Any]) -> None:
        """Take in what was not given."""
        for key, value in values.items():
            self._values.setdefault(key, (value, _COMMAND_LINE))

    # ------------------------------------------------------------------------------------------ the keys

    def _known(self, section: str, name: str, place: _Place) -> tuple[str, str] | None:
        """The key that is meant, or None after saying what is wrong with it."""
        if name in _KEYS[section]:
            return section, name
        label = _dotted(section, name)
        if (section, name) in _ALIASES:
            meant = _ALIASES[section, name]
            self.notes.append(f"{label}: taken as {_dotted(section, meant)} ({place})")
            return section, meant
        if name in _ELSEWHERE:
            self._problem(label, _ELSEWHERE[name], place)
        else:
            self._problem(label, "unknown key", place, self._nearest(section, name))
        return None

    def _nearest(self, section: str, name: str) -> str:
        """A hint: the most similar key of the section, else of all, else what the section has."""
        here = _names(section) + ([] if section else list(_SECTIONS))
        homes = {leaf: other for other in _KEYS for leaf in _names(other)}
        if found := difflib.get_close_matches(name, here, n=1):
            self._suggested.add(_dotted(section, _ALIASES.get((section, found[0]), found[0])))
            return f"Did you mean {found[0]}?"
        if found := difflib.get_close_matches(name, list(homes), n=1):
            self._suggested.add(_dotted(homes[found[0]], found[0]))
            return f"Did you mean {_dotted(homes[found[0]], found[0])}?"
        return f"Known here: {', '.join(here)}"

    # ------------------------------------------------------------------------------------------- the end

    def finish(self) -> RunConfig:
        """Check values against types and ranges."""
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
        section, name = (str(loc[0]), str(loc[1])) if loc[1:] else (_ROOT, str(loc[0]) if loc else "")
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
    return _KEYS[section] + [alias for home, alias in _ALIASES if home == section]


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, _Place]]:
    """Keys as they are written (``on`` stays ``on``), values, and the lines of the keys."""
    for key, value in node.value:
        yield str(key.value), value, _Place(key.start_mark.line + 1)


def _number(key: tuple[str, str], value: Any) -> float | int | None:
    """The number that was meant by a text such as ``1e-5``."""
    if not isinstance(value, str) or key[1] in _TEXT_KEYS or _dotted(*key) in _TEXT_KEYS:
        return None
    if not _EXPONENT.fullmatch(value) or value[0] in "eE":
        return None
    number = float(value)
    return int(number) if number.is_integer() else number


def _point_and_sign(text: str) -> str:
    """A number with exponent as YAML 1.1 wants it."""
    return _EXPONENT.sub(lambda m: f"{m[1]}{m[2] or 0}.{m[3] or 0}e{m[4] or '+'}{m[5]}", text)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) and value.isidentifier() else reprlib.repr(value)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())
