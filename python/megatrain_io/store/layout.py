"""The parameter space: which tensor lies in which record, at which offset, in which chunk. Pure.

All parameters lie end to end, in the order in which a step meets them: embedding, decoder blocks, head,
one record each. Offsets count parameters, not bytes, so they do not depend on the dtype. The same arithmetic
lays the bytes out on disk (``rust/src/store/layout.rs``); a test holds the two together.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from megatrain_io.errors import (
    FormatError,
)
from megatrain_io.store.state_format import SPECS, StateFormat

__all__ = [
    "CHUNK_PARAMETERS_MAX",
    "PAGE_BYTES",
    "Chunk",
    "Durability",
    "ModelLayout",
    "Precision",
    "Record",
    "TensorPlace",
    "default_chunk_parameters",
]

PAGE_BYTES = 4096
"""Extents and transfers are multiples of this, in bytes."""

CHUNK_PARAMETERS_MAX = 2 << 20
"""Parameters of a chunk, where the model is large enough: 4 MiB of bf16 weights, 20 MiB of update planes."""

_CHUNK_STEP = 4096
_TENSOR_ALIGNMENT = 128

Durability = Literal["step", "scratch"]


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: ``offset`` parameters from the start of its record."""

    name: str
    shape: tuple[int, ...]
    record: int
    offset: int

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass(frozen=True)
class Chunk:
    """Consecutive parameters of one record: the unit of I/O, checksum and update."""

    index: int
    record: int
    start: int
    parameters: int


@dataclass(frozen=True)
class Record:
    """The tensors of one part of the model, end to end. ``parameters`` counts the padding between them, too."""

    name: str
    tensors: tuple[TensorPlace, ...]
    parameters: int


@dataclass(frozen=True)
class ModelLayout:
    """The whole parameter space of one model.

    Record 0 is the embedding, then one record for each decoder block, then the head if it has
    parameters of its own.
    """

    format: StateFormat
    chunk_parameters: int
    records: tuple[Record, ...]
    blocks: int
    durability: Durability = "step"

    @classmethod
    def build(
        cls,
        parts: Iterable[tuple[str, Iterable[tuple[str, tuple[int, ...]]]]],
        blocks: int,
        state_format: StateFormat,
        chunk_parameters: int | None = None,
        durability: Durability = "step",
    ) -> "ModelLayout":
        """Lay parts of a model out, end to end.

        Args:
            parts: name of each record, and its tensors as (name, shape): embeddings, blocks, head.
            blocks: number of records that are decoder blocks.
            state_format: of all records.
            chunk_parameters: parameters of a chunk; None = by the size of the blocks.
            durability: of the store.
        """
        records = []
        for index, (name, tensors) in enumerate(parts):
            offset = 0
            places = []
            for tensor, shape in tensors:
                place = TensorPlace(tensor, tuple(shape), index, offset)
                places.append(place)
                offset = _round_up(offset + place.elements, _TENSOR_ALIGNMENT)
            records.append(Record(name, tuple(places), offset))
        chunk = chunk_parameters or default_chunk_parameters(records[1 : 1 + blocks])
        return cls(state_format, chunk, tuple(records), blocks, durability)

    @classmethod
    def from_manifest(cls, text: str) -> "ModelLayout":
        """The layout that ``manifest`` wrote; the core has checked all of it but ``model``.

        Raises:
            FormatError: it is a store of tensors, or ``model`` is not what this package writes.
        """
        manifest = json.loads(text)
        if manifest.get("content", "training") != "training":
            raise FormatError(
                f"this store holds {manifest['content']}, not a model in training: open it with "
                "megatrain_io.TensorStore"
            )
        tensors: list[list[TensorPlace]] = [[] for _ in manifest["records"]]
        for entry in manifest["tensors"]:
            place = TensorPlace(entry["name"], tuple(entry["shape"]), entry["record"], entry["offset"])
            tensors[place.record].append(place)
        records = tuple(
            Record(entry["name"], tuple(places), entry["parameters"])
            for entry, places in zip(manifest["records"], tensors, strict=True)
        )
        model = manifest["model"]
        blocks = model.get("blocks") if isinstance(model, dict) else None
        if type(blocks) is not int or not 0 <= blocks < len(records):
            raise FormatError(
                f"the store's manifest has {len(records)} records and says that {blocks!r} of them are blocks: it was "
                "not made by an import of megatrain-io. Import the model again"
            )
        formats = sorted({entry["format"] for entry in manifest["records"]})
        if len(formats) > 1:
            raise FormatError(
                f"the store's records have different formats ({', '.join(formats)}): this version trains all of a "
                "model, or nothing"
            )
        state_format: StateFormat = formats[0]
        return cls(state_format, manifest["chunk_parameters"], records, blocks, manifest["durability"])

    def manifest(self, model: dict[str, Any]) -> bytes:
        """The store's manifest; ``model`` is whatever describes the model, kept as it is."""
        return json.dumps(
            {
                "chunk_parameters": self.chunk_parameters,
                "durability": self.durability,
                "records": [
                    {"name": record.name, "format": self.format, "parameters": record.parameters}
                    for record in self.records
                ],
                "tensors": [
                    {"name": t.name, "record": t.record, "offset": t.offset, "shape": list(t.shape)}
                    for t in self.tensors()
                ],
                "model": {**model, "blocks": self.blocks},
            }
        ).encode()

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in the compute dtype: 2 in bf16, 4 in fp32."""
        return SPECS[self.format].weight_bytes

    @property
    def is_frozen(self) -> bool:
        """Whether nothing is trained: a step then passes gradients on, and makes none of parameters."""
        return not SPECS[self.format].is_trained

    @property
    def embedding(self) -> int:
        """Record of the embeddings and whatever else comes before the blocks."""
        return 0

    def block(self, index: int) -> int:
        """Record of decoder block ``index``."""
        return 1 + index

    @property
    def head(self) -> int | None:
        """Record of final norm and head; None when they have no parameters of their own."""
        return 1 + self.blocks if len(self.records) > 1 + self.blocks else None

    def tensors(self) -> Iterator[TensorPlace]:
        """All tensors, in the order of the parameter space."""
        for record in self.records:
            yield from record.tensors

    @property
    def parameters(self) -> int:
        """Number of parameters, padding left out."""
        return sum(tensor.elements for tensor in self.tensors())

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks, in the order of the parameter space."""
        chunks: list[Chunk] = []
        for index, record in enumerate(self.records):
            for start in range(0, record.parameters, self.chunk_parameters):
                count = min(self.chunk_parameters, record.parameters - start)
                chunks.append(Chunk(len(chunks), index, start, count))
        return tuple(chunks)

    def chunks_of(self, record: int) -> tuple[Chunk, ...]:
        """The chunks of a record, in order."""
        return self._chunks_by_record[record]

    @cached_property
    def _chunks_by_record(self) -> tuple[tuple[Chunk, ...], ...]:
        found: list[list[Chunk]] = [[] for _ in self.records]
        for chunk in self.chunks:
            found[chunk.record].append(chunk)
        return tuple(map(tuple, found))

    def weight_extent_bytes(self, chunk: Chunk) -> int:
        """Bytes moved for the weights of a chunk, whole pages."""
        return _round_up(chunk.parameters * SPECS[self.format].weight_bytes, PAGE_BYTES)

    def update_extent_bytes(self, chunk: Chunk) -> int:
        """Bytes moved for what only the update of a chunk needs (moments, remainders), whole pages."""
        return _round_up(chunk.parameters * SPECS[self.format].update_bytes, PAGE_BYTES)

    def record_weight_bytes(self, record: int) -> int:
        """Bytes that the weights of a record take in a block buffer."""
        return self._weight_bytes_by_record[record]

    @cached_property
    def _weight_bytes_by_record(self) -> tuple[int, ...]:
        return tuple(sum(map(self.weight_extent_bytes, chunks)) for chunks in self._chunks_by_record)

    def record_gradient_bytes(self, record: int) -> int:
        """Bytes of a buffer for the fp32 gradient of a record."""
        return _round_up(4 * self.records[record].parameters, PAGE_BYTES)

    def gradient_extent_bytes(self, chunk: Chunk) -> int:
        """Bytes moved for the fp32 gradient of a chunk, where it waits on the drive."""
        return _round_up(4 * chunk.parameters, PAGE_BYTES)

    def chunk_slot_bytes(self) -> int:
        """Bytes of a slot in which any chunk can be updated."""
        return max(self.weight_extent_bytes(c) + self.update_extent_bytes(c) for c in self.chunks)


def default_chunk_parameters(blocks: Iterable[Record]) -> int:
    """Parameters of a chunk: 2 Mi, or a quarter of the largest block where that is less."""
    largest = max((record.parameters for record in blocks), default=CHUNK_PARAMETERS_MAX)
    return min(CHUNK_PARAMETERS_MAX, max(_CHUNK_STEP, _round_up(-(-largest // 4), _CHUNK_STEP)))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


Precision = Literal["bf16", "fp32"]
