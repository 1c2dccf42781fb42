"""What a person says of a model beside its folder, and the partition that follows from both."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, TypeAdapter, ValidationError
from transformers import PreTrainedConfig

from megatrain_io.config.schema import ModelOptionsConfig
from megatrain_io.errors import ConfigError
from megatrain_io.models.config_limits import refuse_numbers
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.own_code import OwnCode
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.models.probe import probe
from megatrain_io.models.shrink import shrink_config, without_noise

__all__ = ["ModelOptions"]

_NOT_OF_A_COPY = ("quantization_config", "compression_config", "auto_map")


@dataclass(frozen=True)
class ModelOptions:
    """The section ``model_options`` of a configuration, as a run keeps it: without paths.

    Attributes:
        block_list: name of the module list of decoder blocks; None = the one that transformers marks.
        attn_implementation: "sdpa", "eager", or None for sdpa where the architecture has it, else eager.
        miniature: content of the config.json of a small model of the same architecture; None = the model's own, shrunk.
        dequantize: whether fp8 weights are imported as the numbers that they stand for; None = no.
        modules: path and SHA-256 of a file that makes the model known to transformers; None = there is none.
    """

    block_list: str | None = None
    attn_implementation: Literal["sdpa", "eager"] | None = None
    miniature: dict[str, Any] | None = None
    modules: dict[str, Annotated[str, Field(pattern=r"\A[^\x00]*\z")]] | None = None
    dequantize: bool | None = None

    @classmethod
    def of(cls, config: ModelOptionsConfig) -> Self:
        """Read what the configuration names.

        Raises:
            ModelFilesError: ``miniature`` is no model folder, or its config.json is not sound.
            ConfigError: ``modules`` cannot be read.
        """
        miniature = None if config.miniature is None else _content_of(ModelFolder.of(config.miniature))
        modules = None if config.modules is None else OwnCode.of(config.modules).as_dict()
        return cls(
            config.block_list, config.attn_implementation, miniature, modules, config.dequantize or None
        )

    @classmethod
    def kept(cls, options: dict[str, Any]) -> Self:
        """Those that ``run.json`` has.

        Raises:
            ConfigError: they are not what this version writes.
        """
        if unknown := options.keys() - {field.name for field in fields(cls)}:
            raise ConfigError(
                f"model_options of run.json cannot be read: it has {', '.join(sorted(unknown))}"
            )
        try:
            # A run comes from others, too: transformers takes names of code to fetch where it expects "sdpa".
            return TypeAdapter(cls).validate_json(json.dumps(options), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(f"model_options.{place} of run.json cannot be read: {first['msg']}") from error

    def as_dict(self) -> dict[str, Any]:
        """What is set, as plain JSON types."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def run_modules(self, *outside: Path, at: Path | None = None) -> Self:
        """Run ``modules``, if there are any and they may run, so that transformers knows the model.

        Args:
            outside: folders in which the file must not lie: of the model and of the run.
            at: where the file is now; None = where it was.

        Raises:
            ConfigError: they may not run, are not what they were, or fail.
        """
        if self.modules is None and at is not None:
            raise ConfigError(
                "model_options.modules: this run was imported without such a file: leave it out"
            )
        if self.modules is not None:
            try:
                own = OwnCode(**self.modules)
            except TypeError as error:
                raise ConfigError(f"model_options.modules of run.json cannot be read: {error}") from error
            replace(own, path=str(own.path if at is None else at.absolute())).run(outside)
        return self

    def partition(self, config: PreTrainedConfig, dtype: torch.dtype) -> PartitionedModel:
        """Probe a model, and partition it without memory for its parameters.

        Args:
            config: of the model.
            dtype: that computes.

        Raises:
            UnsupportedModelError: it cannot be trained block by block; the message names the key that helps, if any.
        """
        spec = probe(
            config,
            attn_implementation=self.attn_implementation,
            block_list=self.block_list,
            small_config=None if self.miniature is None else _config_of(self.miniature, config),
        )
        return PartitionedModel(config, dtype, spec)

    def small_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The small configuration on which a model is proved: that of the miniature, or the model's own, shrunk.

        Raises:
            ValueError: it cannot be shrunk.
            ConfigError: the miniature is of another model type.
        """
        if self.miniature is None:
            return shrink_config(config)
        return without_noise(_config_of(self.miniature, config))

    def refuse_others(self, asked: "ModelOptions", where: Path) -> None:
        """Refuse options that differ from these, with which the model of a run was imported.

        Args:
            asked: what a configuration sets; what it leaves open is as it was imported.
            where: the run folder.

        Raises:
            ConfigError: it names key, old and new value.
        """
        for name, value in asked.as_dict().items():
            if name == "modules" and self.modules is not None:
                if value["sha256"] != self.modules.get("sha256"):
                    raise ConfigError(
                        f"model_options.modules: {value['path']} is not the file that {where} was imported with, or "
                        "has changed since: put that one back, or choose a new output_dir"
                    )
                continue
            if value != (old := getattr(self, name)):
                kind = {"miniature": "a folder", "modules": "a file"}.get(name, json.dumps(value))
                is_another = isinstance(value, dict) and old
                shown = "another one than now" if is_another else f"{json.dumps(old)}, now {kind}"
                raise ConfigError(
                    f"model_options.{name}: {where} was imported with {shown}. Leave it out, or choose a new output_dir"
                )


def _content_of(folder: ModelFolder) -> dict[str, Any]:
    """What the config.json of a miniature says, under the model type of the class that reads it."""
    read_by = folder.stands_for
    return folder.raw_config | ({} if read_by is None else {"model_type": read_by.model_type})


def _config_of(content: dict[str, Any], config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a miniature, by the class of the model that it stands for."""
    inside = content.get("text_config")
    if isinstance(inside, dict) and content.get("model_type") != config.model_type:
        # Of a model of more than text, whose text model is trained.
        tying = {"tie_word_embeddings": getattr(config, "tie_word_embeddings", False)}
        content = {"model_type": config.model_type, **inside, **tying}
    content = {name: value for name, value in content.items() if name not in _NOT_OF_A_COPY}
    refuse_numbers(content, "model_options.miniature")
    if content.get("model_type") != config.model_type:
        raise ConfigError(
            f"model_options.miniature is of model_type {content.get('model_type')!r}, and the model of "
            f"{config.model_type!r}: give a smaller one of the same"
        )
    try:
        small = type(config).from_dict(content)
    except Exception as cause:
        raise ConfigError(
            f"model_options.miniature: transformers does not take its config.json: {' '.join(str(cause).split())}"
        ) from cause
    # These may name code that transformers would fetch from the hub and run.
    small._attn_implementation = None  # noqa: SLF001
    small._experts_implementation = None  # noqa: SLF001
    return small
