"""The keys of a run's configuration: their types, defaults and meanings. No torch."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatrain_io.config.values import (
    EPSILON_MAX,
    INT_MAX,
    SEED_MAX,
    Count,
    CountOrAuto,
    Folders,
    Fp32Positive,
    FractionOrPath,
    LocalPath,
    Paths,
    Size,
    TemplateText,
    WholeCount,
)

__all__ = ["ROOT", "SECTIONS", "DataConfig", "MemoryConfig", "ModelOptionsConfig", "RunConfig", "TrainConfig"]


_HIGHEST_USUAL_RATE = 1e-3
"""Rates of small models that are trained from nothing reach it; those of fine-tuning stay far below."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class DataConfig(Section):
    """The training data, and how they are made into sequences."""

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
    chat_template: TemplateText | None = None
    """name, file or text of a chat template, where the model has none"""


class TrainConfig(Section):
    """Hyperparameters of the training: AdamW over all parameters."""

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
    adam_epsilon: Annotated[Fp32Positive, Field(le=EPSILON_MAX)] = 1e-8
    """added to the denominator"""
    max_grad_norm: Fp32Positive | None = None
    """largest norm of all gradients together, exact; an update then waits for the next step; null: no limit"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16, fp32, or auto: as imported, else what computes fastest here; masters and moments are fp32"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """what computes: cpu, cuda, or auto: a GPU where there is one"""
    seed: Annotated[int, Field(ge=0, le=SEED_MAX)] = 42
    """of the order of the data and of dropout"""
    eval_steps: Count | None = None
    """measure the held-out loss every so many steps, and at the end"""
    logging_steps: Count = 1
    """report every so many steps"""

    def doubts(self) -> list[str]:
        """A sentence for each setting that is allowed, and hardly meant."""
        if self.learning_rate <= _HIGHEST_USUAL_RATE:
            return []
        usual = "training all parameters with AdamW usually takes 1e-6 to 1e-4"
        forgets = f"above {_HIGHEST_USUAL_RATE:g} a pretrained model soon forgets what it knew"
        return [f"train.learning_rate is {self.learning_rate:g}: {usual}, and {forgets}"]


class MemoryConfig(Section):
    """Where the training state lies, what it may take, and how it is moved."""

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


class ModelOptionsConfig(Section):
    """What must be said of some models beside their folder; kept with the run from its import on."""

    block_list: Annotated[str, Field(min_length=1)] | None = None
    """name of the module list of decoder blocks, where transformers does not mark it; null: the one it marks"""
    miniature: LocalPath | None = None
    """folder with the config.json of a small model of the same architecture, to prove it on; null: its own, shrunk"""
    attn_implementation: Literal["sdpa", "eager"] | None = None
    """sdpa, eager, or null: sdpa where the architecture has it"""
    dequantize: bool = False
    """import weights in fp8 with scales by blocks (DeepSeek-V3) as the numbers they stand for"""
    modules: LocalPath | None = None
    """file of Python that registers a model of your own with transformers; in a YAML file it needs --allow-code"""


class RunConfig(Section):
    """The whole configuration of one run. Relative paths are meant from the current directory."""

    model: LocalPath
    """folder of the model to start from"""
    output_dir: LocalPath
    """the run folder"""
    data: DataConfig
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    model_options: ModelOptionsConfig = ModelOptionsConfig()

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

    def settled(
        self, *, precision: Literal["bf16", "fp32"], accumulation: int, files: list[str] | None
    ) -> "RunConfig":
        """The same with what was settled in place of ``auto``, and absolute paths: what a resumed run goes on with.

        Args:
            precision: compute dtype.
            accumulation: micro-batches of a step.
            files: data of the caller's own, in place of ``data.train``; None = as it is.
        """
        found = {"precision": precision, "gradient_accumulation_steps": accumulation}
        paths = _absolute(self)
        if files is not None:
            paths["data"] = paths["data"].model_copy(update={"train": files})
        return self.model_copy(update={**paths, "train": self.train.model_copy(update=found)})

    def to_yaml(self) -> str:
        """All keys with their values, as YAML that ``load`` reads back to the same configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _absolute(config: RunConfig) -> dict[str, Any]:
    """The parts of a configuration that hold paths, with paths that mean the same from any folder."""
    data, dirs = config.data, config.memory.store_dir
    template = data.chat_template
    is_file = template is not None and "{" not in template and Path(template).expanduser().is_file()
    own = {
        "train": [_absolute_path(path) for path in data.train],
        "eval": _absolute_path(data.eval) if isinstance(data.eval, str) else data.eval,
        "chat_template": _absolute_path(template) if template is not None and is_file else template,
    }
    store_dir = None if dirs is None else tuple(Path(_absolute_path(folder)) for folder in dirs)
    return {
        "model": Path(_absolute_path(config.model)),
        "output_dir": Path(_absolute_path(config.output_dir)),
        "data": data.model_copy(update=own),
        "memory": config.memory.model_copy(update={"store_dir": store_dir}),
        "model_options": _absolute_options(config.model_options),
    }


def _absolute_options(options: ModelOptionsConfig) -> ModelOptionsConfig:
    if options.modules is None:
        return options
    return options.model_copy(update={"modules": Path(_absolute_path(options.modules))})


def _absolute_path(path: Path | str) -> str:
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100 - a link stays a link


ROOT = ""

SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "train": TrainConfig,
    "memory": MemoryConfig,
    "model_options": ModelOptionsConfig,
}
