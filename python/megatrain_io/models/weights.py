"""Where a model's weights come from: what import needs of a file format."""

from collections.abc import Mapping
from typing import Protocol

__all__ = ["WeightEntry", "WeightReader"]


class WeightEntry(Protocol):
    """A tensor in the files of a model."""

    @property
    def dtype(self) -> str:
        """Of what ``read`` gives, named as safetensors does: ``BF16``, ``F16``, ``F32``, or one that is not trained."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""


class WeightReader(Protocol):
    """The tensors of a model's files, by name, read in parts: never the whole model, nor a whole tensor, in RAM.

    ``models.safetensors.Checkpoint`` is one; another file format needs no more than this.
    """

    @property
    def entries(self) -> Mapping[str, WeightEntry]:
        """Dtype and shape of every tensor, by name."""

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """Little-endian bytes of elements ``start``..``stop`` of a tensor.

        Raises:
            ModelFilesError: the files became shorter, or the drive failed to read them.
        """
