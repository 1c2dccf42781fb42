"""An optimizer step in the hands of a loop of one's own, and what is committed with it."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatrain_io.data.batch import MicroBatch, micro_batch_of, trained_tokens
from megatrain_io.errors import ConfigError, DataError, FormatError, MegatrainIoError
from megatrain_io.paging.paged_model import PagedPartition

__all__ = ["MicroBatchLike", "OptimizerStep", "Progress", "micro_batches_of"]

MicroBatchLike = MicroBatch | Mapping[str, Tensor] | Tensor
"""A micro-batch; or ``input_ids`` [B, T], alone or in a mapping with ``labels`` that are not shifted."""

_VERSION = 1
_KIND = "megatrain_io.PagedModel"
# The store keeps 256 KiB with a commit; the rest is for what is written here.
_STATE_BYTES_MAX = 240 << 10


class OptimizerStep:
    """One optimizer step under way: ``forward`` and ``backward``, once each. ``PagedModel.step`` makes it.

    Attributes:
        number: of the step, from 1 on.
        loss: mean over the trained tokens of all micro-batches; None before ``forward``.
        trained_tokens: number of tokens with a label; 0 before ``forward``.
        grad_norm: norm over the gradients of all parameters, before clipping; None before ``backward``.
        clip_coefficient: what all gradients are multiplied by (``max_grad_norm``); 1 where they are not clipped.
        state: the caller's own bytes, committed with the step; those of the step before until they are set.
    """

    def __init__(
        self, number: int, state: bytes, begin: Callable[[Sequence[MicroBatch]], PagedPartition]
    ) -> None:
        self.number = number
        self.loss: float | None = None
        self.trained_tokens = 0
        self.grad_norm: float | None = None
        self.clip_coefficient = 1.0
        self._state = state
        self._begin = begin
        self._model: PagedPartition | None = None

    @property
    def state(self) -> bytes:
        """The caller's own bytes, committed with the step."""
        return self._state

    @state.setter
    def state(self, state: bytes) -> None:
        self._state = _checked_state(state)

    def forward(self, micro_batches: Sequence[MicroBatchLike] | MicroBatchLike) -> float:
        """Pass all micro-batches of the step forward.

        Args:
            micro_batches: of the step, each [B, T] of its own shape; one alone stands for itself. In a mapping
                ``labels`` are those of ``input_ids``, not shifted, as transformers models take them.

        Returns:
            The loss, exact as fp32: the sum over all trained tokens of the step divided by their number.

        Raises:
            TrainingDivergedError: it is not finite.
            DataError: a micro-batch cannot be used, or no token of the step has a label.
            DoesNotFitError: ``ram`` or the device's memory are too small for these micro-batches.
            MegatrainIoError: it was called before.
        """
        if self._model is not None:
            raise MegatrainIoError(
                "forward was called before: it takes all micro-batches of the step at once"
            )
        batches = micro_batches_of(micro_batches)
        self.trained_tokens = trained_tokens(batches)
        self._model = self._begin(batches)
        self.loss = self._model.forward()
        return self.loss

    def backward(self) -> None:
        """Make all gradients; the updates that they allow are made and written in the background.

        Raises:
            NotFiniteError: a gradient is not finite. The step is dropped.
            MegatrainIoError: ``forward`` was not called, or this was called before.
        """
        if self._model is None or self.grad_norm is not None:
            raise MegatrainIoError("backward comes after forward, once")
        made = self._model.backward()
        self.grad_norm, self.clip_coefficient = made.grad_norm, made.clip_coefficient


@dataclass(frozen=True)
class Progress:
    """What is committed with a step: how far it is, and the caller's own bytes.

    Attributes:
        step: steps made so far.
        seed: of dropout.
        environment: what may change the bits; None at step 0.
        state: the caller's own bytes.
    """

    step: int
    seed: int
    environment: dict[str, Any] | None
    state: bytes

    @classmethod
    def parse(cls, blob: bytes) -> "Progress":
        """Decode what was committed.

        Raises:
            FormatError: it is not of a PagedModel.
        """
        text, _, state = blob.partition(b"\n")
        try:
            header = json.loads(text)
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get(_KIND) != _VERSION:
            raise FormatError(
                "this store was not made by PagedModel.create (or by another version of it). One of a training run is "
                "trained by megatrain_io.train; its weights can be exported, and the folder trained here"
            )
        return cls(header["step"], header["seed"], header["environment"], state)

    def encode(self) -> bytes:
        """Encode it as the bytes that are committed with the store."""
        header = {_KIND: _VERSION, "step": self.step, "seed": self.seed, "environment": self.environment}
        return json.dumps(header).encode() + b"\n" + self.state


def micro_batches_of(given: Sequence[MicroBatchLike] | MicroBatchLike) -> list[MicroBatch]:
    """Micro-batches from what a loop has; one alone stands for itself.

    Raises:
        DataError: there is none, or one cannot be used.
    """
    several: Any = [given] if isinstance(given, MicroBatch | Mapping | Tensor) else given
    if not isinstance(several, Iterable):
        raise DataError(f"micro-batches are {several!r}: give a list of them, or one")
    batches = [micro_batch_of(batch) for batch in several]
    if not batches:
        raise DataError("there is no micro-batch: a step needs at least one")
    return batches


def _checked_state(state: bytes) -> bytes:
    if not isinstance(state, bytes):
        raise ConfigError(
            f"state is {type(state).__name__}: it must be bytes, such as json.dumps(...).encode()"
        )
    if len(state) > _STATE_BYTES_MAX:
        raise ConfigError(
            f"state has {len(state):,} bytes: {_STATE_BYTES_MAX:,} are kept with a step; keep what is larger in files "
            "of your own, and their names here"
        )
    return state
