"""The trainer's own state, which each commit writes as the store's blob. No torch."""

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from megatrain_io.errors import ConfigError, FormatError, MegatrainIoError

__all__ = ["FileName", "PathText", "TrainerState"]

_VERSION = 1


def _plain(name: str) -> str:
    """A name that does not lead out of its folder: a run comes from others, too, and what it has lost is copied."""
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise ValueError("it is no plain name of a file")
    return name


def _path(text: str) -> str:
    if "\0" in text:
        raise ValueError("no path has a NUL")
    return text


FileName = Annotated[str, AfterValidator(_plain)]
"""Name of a file of RUN/model."""

PathText = Annotated[str, AfterValidator(_path)]
"""A path as files of a run have it."""


@dataclass
class TrainerState:
    """How far a run is: all that a resumed one must know besides model and data.

    Attributes:
        step: last step that was trained.
        settings: digest of all settings that decide the bits.
        data: SHA-256 of the tokenised data.
        written_bytes: bytes that training wrote in all starts: an upper bound, exact where the run paused.
        loss: of that step.
        skipped_steps: number of steps so far whose gradients were not finite; nothing was updated by them.
        eval_loss_before: held-out loss of the imported model.
        environment: what may change the bits besides, by ``training.fingerprint``.
        compared: bytes of the steps before, as planned and as measured (``training.plan_check``).
        configuration: all settings by their dotted keys; None where an older version wrote the state.
        stop_tokens: what texts and answers of the data end with, and so what ends generation.
        model_files: for files of RUN/model the SHA-256 that they may have, as ``run.json`` has it: should that be lost.
        version: of this schema.
    """

    step: Annotated[int, Field(ge=0)] = 0
    settings: str = ""
    data: str = ""
    written_bytes: Annotated[int, Field(ge=0)] = 0
    loss: float | None = None
    skipped_steps: Annotated[int, Field(ge=0)] = 0
    eval_loss_before: float | None = None
    environment: dict[str, Any] | None = None
    compared: dict[str, Any] | None = None
    configuration: dict[str, Any] | None = None
    stop_tokens: list[int] = field(default_factory=list)
    model_files: dict[FileName, list[str]] = field(default_factory=dict)
    version: int = _VERSION

    @classmethod
    def parse(cls, blob: bytes) -> "TrainerState":
        """Decode the state that was committed with a store.

        Raises:
            FormatError: these bytes are no trainer's state.
            ConfigError: another version of megatrain-io wrote them.
        """
        try:
            progress = _ADAPTER.validate_json(blob, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise FormatError(
                f"the store's trainer state ({len(blob)} bytes) is not one of megatrain-io's: {place}: {first['msg']}. "
                "The weights can be exported all the same"
            ) from error
        if progress.version != _VERSION:
            raise ConfigError(
                f"the run's trainer state has version {progress.version}, and this build reads {_VERSION}: "
                "go on with the version of megatrain-io that wrote it (run.json names it)"
            )
        return progress

    @classmethod
    def stop_tokens_of(cls, blob: bytes) -> list[int]:
        """What ends generation, by the state of a run; none where these bytes are no trainer's state."""
        try:
            return cls.parse(blob).stop_tokens
        except MegatrainIoError:
            return []

    def encode(self) -> bytes:
        """Encode the state as the bytes that are committed with the store."""
        return json.dumps(asdict(self)).encode()


_ADAPTER = TypeAdapter(TrainerState)
