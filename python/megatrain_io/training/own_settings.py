"""Settings of a model that a loop of one's own trains, as its arguments give them."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from megatrain_io.arguments import is_number, number, whole_number
from megatrain_io.config.values import FP32_SMALLEST, SEED_MAX, Size
from megatrain_io.errors import ConfigError, UnsupportedError
from megatrain_io.machine.precision import fastest_on_cpu
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.device.choose import best_device
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.device.cuda import Cuda
from megatrain_io.planning.resolve import ram_of
from megatrain_io.store.layout import Precision, TensorPlace
from megatrain_io.store.paged_store import TensorSettings
from megatrain_io.training.step_memory import StepSize

__all__ = [
    "Settings",
    "WeightDecay",
    "checked_learning_rate",
    "checked_seed",
    "device_of",
    "paths_of",
    "ram_asked",
    "refuse_missing",
]

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
        if not callable(self.weight_decay):
            number("weight_decay", self.weight_decay)
        betas: Any = self.betas  # what a caller gave
        if not (
            isinstance(betas, Sequence) and [is_number(beta) and beta < 1 for beta in betas] == [True] * 2
        ):
            raise ConfigError(f"betas is {betas!r}: it must be two numbers from 0 on, below 1")
        limit = 1.0 if self.max_grad_norm is None else self.max_grad_norm
        for name, value, also in (("eps", self.eps, ""), ("max_grad_norm", limit, ", or None")):
            if not (is_number(value) and value >= FP32_SMALLEST):
                raise ConfigError(
                    f"{name} is {value!r}: it must be a finite number from {FP32_SMALLEST} on, the smallest normal "
                    f"number of fp32{also}"
                )

    @property
    def defers(self) -> bool:
        """Whether gradients wait until the norm over all of them is known."""
        return self.max_grad_norm is not None

    def settings(self, place: TensorPlace) -> TensorSettings:
        """Weight decay of a parameter.

        Raises:
            ConfigError: a function gave none.
        """
        if callable(self.weight_decay):
            name = f"weight_decay of {place.name} {list(place.shape)}, by the function given,"
            return TensorSettings(number(name, self.weight_decay(place.name, place.shape)))
        return TensorSettings.usual(place, self.weight_decay)

    def refuse_wrong_decay(self, places: Iterable[TensorPlace]) -> None:
        """Ask for the weight decay of each parameter, before anything is made with it.

        Raises:
            ConfigError: a function gave none.
        """
        for place in places:
            self.settings(place)

    def describe(self) -> dict[str, Any]:
        """What decides the bits of a step: plain JSON types."""
        return {
            "weight_decay": "a function" if callable(self.weight_decay) else float(self.weight_decay),
            "betas": [*map(float, self.betas)],
            "eps": float(self.eps),
            "max_grad_norm": None if self.max_grad_norm is None else float(self.max_grad_norm),
        }


def paths_of(path: Path | str | Sequence[Path | str]) -> tuple[Path, ...]:
    """The files of a store, one for each drive.

    Raises:
        ConfigError: there is none, or something else.
    """
    paths: Any = (path,) if isinstance(path, Path | str) else path
    if not (isinstance(paths, Sequence) and paths and all(isinstance(each, Path | str) for each in paths)):
        raise ConfigError(f"path is {path!r}: give the path of the file, or one for each drive")
    if "" in paths:
        raise ConfigError("path is empty: give the path of the file, or one for each drive")
    return tuple(Path(each).expanduser() for each in paths)


def refuse_missing(paths: Sequence[Path]) -> None:
    """Refuse files that are not there, or are folders.

    Raises:
        ConfigError: the message names the first one.
    """
    for path in paths:
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                f"{path} does not exist: make it with PagedModel.create, or correct the path"
            ) from None
        except OSError:  # opening it says more
            continue
        if S_ISDIR(mode):
            raise ConfigError(f"{path} is a folder: give the path of the file that PagedModel.create made")


def checked_seed(seed: int) -> int:
    """The seed of dropout, which is kept in the file.

    Raises:
        ConfigError: it is none.
    """
    return whole_number("seed", seed, 0, SEED_MAX)


def checked_learning_rate(learning_rate: float) -> float:
    """The learning rate of a step.

    Raises:
        ConfigError: it is none.
    """
    return number("learning_rate", learning_rate)


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
        DoesNotFitError: this machine has less.
    """
    return ram_of(None if value is None else _size("ram", value), "ram")


def device_of(
    device: Device | torch.device | Literal["cpu", "cuda"] | None,
    precision: Precision | Literal["auto"],
    vram: int | str | None,
    closing: ExitStack,
) -> tuple[Device, Precision]:
    """What computes, and in which precision; ``closing`` closes the device, if it was not handed in.

    Raises:
        ConfigError: ``device`` is something else, or ``vram`` is given where no GPU is made here.
        UnsupportedError: a GPU was asked for, and there is none, or none that computes in ``precision``.
    """
    device = _word_or_device(device)
    if (device == "cuda" or (device is None and vram is not None)) and not torch.cuda.is_available():
        asked = "vram is given" if device is None else "device is 'cuda'"
        raise UnsupportedError(
            f"{asked}, and torch finds no CUDA device here: see megatrain-io doctor, or say device='cpu', without vram"
        )
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
    if precision == "auto":
        has_own = chosen.has_own_memory
        precision = fastest_on_cpu() if not has_own else "bf16" if chosen.has_bf16 else "fp32"
    return chosen, precision


def _word_or_device(
    device: Device | torch.device | Literal["cpu", "cuda"] | None,
) -> Device | Literal["cpu", "cuda"] | None:
    if isinstance(device, torch.device):
        if device.type == "cpu":
            return "cpu"
        if device.type == "cuda" and device.index in {None, 0}:
            return "cuda"
        raise ConfigError(f"device is {device}: it must be 'cpu', 'cuda' (the first GPU), a device, or None")
    if device not in ("cpu", "cuda", None) and not hasattr(device, "torch_device"):
        raise ConfigError(f"device is {device!r}: it must be 'cpu', 'cuda', a device, or None")
    return device
