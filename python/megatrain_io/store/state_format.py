"""Formats of a record's state: which planes each has, and how many bytes of one parameter. No torch.

A format is one of weights together with what an optimizer keeps for each of them; the core has the table
(``rust/src/units/state_format.rs``), and nobody else counts these bytes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatrain_io.machine.extension import state_formats

__all__ = ["SPECS", "FormatSpec", "PlaneSpec", "StateFormat"]

StateFormat = Literal["bf16", "f32", "raw16", "raw32"]
"""``bf16``: weight bf16, remainder int16, moments f32. ``f32``: weight and moments f32. Both are AdamW's.
``raw16`` and ``raw32``: frozen, the weight alone, bf16 and f32.
"""


@dataclass(frozen=True)
class PlaneSpec:
    """One plane: its name, torch's name of its dtype, and bytes of one parameter."""

    name: str
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class FormatSpec:
    """One format. Bytes are those of one parameter.

    Attributes:
        weight: what forward and backward compute with.
        update: what only the update needs, in the order on the drive; none where nothing is trained.
        read_bytes: read by a step of training where nothing stays in RAM.
        written_bytes: written by it.
    """

    weight: PlaneSpec
    update: tuple[PlaneSpec, ...]
    read_bytes: int
    written_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight."""
        return self.weight.nbytes

    @cached_property
    def update_bytes(self) -> int:
        """Bytes that only the update needs."""
        return sum(plane.nbytes for plane in self.update)

    @property
    def is_trained(self) -> bool:
        """Whether a step updates it."""
        return self.written_bytes > 0


def _specs() -> dict[str, FormatSpec]:
    specs = {}
    for name, figures in state_formats().items():
        weight, *update = (PlaneSpec(*plane) for plane in figures["planes"])
        specs[name] = FormatSpec(weight, tuple(update), *figures["step_nbytes"])
    return specs


SPECS: dict[str, FormatSpec] = _specs()
"""All formats that the core knows, by name: those of ``StateFormat``, and that of stores of tensors."""
