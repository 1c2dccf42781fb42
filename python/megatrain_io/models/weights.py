"""Where a model's weights come from: what import needs of a file format."""

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Protocol, Self

__all__ = ["StoredEntry", "StoredWeights", "WeightEntry", "WeightReader"]


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

    ``models.safetensors.Checkpoint`` and ``models.gguf_weights.GgufWeights`` are such.
    """

    @property
    def entries(self) -> Mapping[str, WeightEntry]:
        """Dtype and shape of every tensor, by name."""

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """Little-endian bytes of elements ``start``..``stop`` of a tensor.

        Raises:
            ModelFilesError: the files became shorter, or the drive failed to read them.
        """


class StoredEntry(WeightEntry, Protocol):
    """A tensor in the files of a model, whose bytes can be copied."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""


class StoredWeights(Protocol):
    """A ``WeightReader`` of files that are open, until the context ends."""

    @property
    def entries(self) -> Mapping[str, StoredEntry]:
        """See ``WeightReader.entries``."""

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """See ``WeightReader.read``."""

    def pieces(self, name: str) -> Iterator[tuple[int, bytearray]]:
        """A tensor of any dtype: offset and bytes of each piece, so many as are read at once."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
