"""Settings of a model that a loop of one's own trains, as its arguments give them."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatrain_io.config.values import Size
from megatrain_io.errors import ConfigError
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.device.choose import best_device
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.device.cuda import Cuda
from megatrain_io.planning.resolve import ram_of
from megatrain_io.store.layout import Precision, TensorPlace
from megatrain_io.store.paged_store import TensorSettings
from megatrain_io.training.step_memory import StepSize

__all__ = ["Settings", "WeightDecay", "device_of", "paths_of", "ram_asked"]

WeightDecay = float | Callable[[str, tuple[int, ...]], float]
"""Of matrices and embeddings, with none for vectors; or ``decay(name, shape)`` for each parameter."""

_SIZE = TypeAdapter(Size)


@dataclass(frozen=True)
class Settings:
    """How a model is trained: the caller's settings.

    Attributes:
        paths: files of the store.
        device: what computes.
        ram: bytes of RAM that may be taken.
        weight_decay: of matrices and embeddings, or of each parameter.
        betas: AdamW's.
        eps: AdamW's.
        max_grad_norm: bound on the norm of all gradients; None = none.
        largest: step for which memory is divided at once.
    """

    paths: tuple[Path, ...]
    device: Device
    ram: int
    weight_decay: WeightDecay
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float | None
    largest: StepSize | None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: one is out of its range.
        """
        decay = 0.0 if callable(self.weight_decay) else self.weight_decay
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        for name, value, is_right, range_ in (
            ("weight_decay", decay, decay >= 0, "from 0 on"),
            (
                "betas",
                self.betas,
                [0 <= beta < 1 for beta in self.betas] == [True] * 2,
                "two from 0 on, below 1",
            ),
            ("eps", self.eps, self.eps > 0, "above 0"),
            ("max_grad_norm", self.max_grad_norm, limit > 0, "above 0, or None"),
        ):
            if not is_right:
                raise ConfigError(f"{name} is {value}: it must be {range_}")

    @property
    def defers(self) -> bool:
        """Whether gradients wait until the norm over all of them is known."""
        return self.max_grad_norm is not None

    def settings(self, place: TensorPlace) -> TensorSettings:
        """Weight decay of a parameter."""
        if callable(self.weight_decay):
            return TensorSettings(self.weight_decay(place.name, place.shape))
        return TensorSettings(self.weight_decay if len(place.shape) > 1 else 0.0)

    def describe(self) -> dict[str, Any]:
        """What decides the bits of a step: plain JSON types."""
        return {
            "weight_decay": "a function" if callable(self.weight_decay) else self.weight_decay,
            "betas": list(self.betas),
            "eps": self.eps,
            "max_grad_norm": self.max_grad_norm,
        }


def paths_of(path: Path | str | Sequence[Path | str]) -> tuple[Path, ...]:
    """The files of a store, one for each drive.

    Raises:
        ConfigError: there is none.
    """
    paths = (path,) if isinstance(path, Path | str) else path
    if not paths:
        raise ConfigError("path is empty: give the path of the file, or one for each drive")
    return tuple(Path(each).expanduser() for each in paths)


def _size(name: str, value: int | str) -> int:
    try:
        nbytes: int = _SIZE.validate_python(value)
    except ValidationError:
        raise ConfigError(f"{name} is {value!r}: it must be a size, such as 4GiB") from None
    return nbytes


def ram_asked(value: int | str | None) -> int:
    """Bytes of RAM that may be taken; None is what ``memory.ram`` takes by default.

    Raises:
        ConfigError: it is no size.
    """
    return ram_of(None if value is None else _size("ram", value))


def device_of(
    device: Device | Literal["cpu", "cuda"] | None,
    precision: Precision,
    vram: int | str | None,
    closing: ExitStack,
) -> Device:
    """What computes; ``closing`` closes it, if it was not handed in.

    Raises:
        ConfigError: ``device`` is another word, or ``vram`` is given where no GPU is made here.
        UnsupportedError: a GPU was asked for, and there is none, or none that computes in ``precision``.
    """
    if isinstance(device, str) and device not in {"cpu", "cuda"}:
        raise ConfigError(f"device is {device!r}: it must be 'cpu', 'cuda', a device, or None")
    chosen: Device
    if device == "cpu":
        chosen = Cpu()
    elif device == "cuda" or (device is None and vram is not None):
        chosen = Cuda(None if vram is None else _size("vram", vram))
    elif device is None:
        chosen = best_device(precision)
    else:
        chosen = device
    if chosen is not device:
        closing.callback(chosen.close)
    if vram is not None and not isinstance(chosen, Cuda):
        raise ConfigError("vram is given, and no GPU computes: leave it out")
    if precision == "bf16" and not chosen.has_bf16:
        raise ConfigError(f"{chosen.name} does not compute in bf16: create the model with precision='fp32'")
    return chosen
