"""The parameter space: which tensor lies in which record, at which offset, in which chunk. Pure.

All parameters lie end to end, in the order in which a step stops at them: embedding, decoder blocks, head. A
stop has a record for each state format of its parameters, most often one. Offsets count parameters, not bytes, so
they do not depend on the dtype. The same arithmetic lays the bytes out on disk (``rust/src/store/layout.rs``); a
test holds the two together.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, Literal, TypeGuard, get_args

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
    """The tensors of a stop that have one state format, end to end.

    ``parameters`` counts the padding between them, too.
    """

    name: str
    format: StateFormat
    tensors: tuple[TensorPlace, ...]
    parameters: int

    @property
    def is_trained(self) -> bool:
        """Whether a step updates it; what is frozen passes gradients on, and gets none."""
        return SPECS[self.format].is_trained


@dataclass(frozen=True)
class ModelLayout:
    """The whole parameter space of one model.

    Attributes:
        chunk_parameters: parameters of a chunk.
        records: in the order of the parameter space.
        stops: numbers of the records of each stop, in the order in which a step loads them: of the embedding, of each
            decoder block (none where it has no parameters), of the head if it has parameters of its own. No two of a
            stop have the same format.
        blocks: number of stops that are decoder blocks.
        durability: of the store.
    """

    chunk_parameters: int
    records: tuple[Record, ...]
    stops: tuple[tuple[int, ...], ...]
    blocks: int
    durability: Durability = "step"

    @classmethod
    def build(
        cls,
        parts: Iterable[tuple[str, Iterable[tuple[str, tuple[int, ...]]]]],
        blocks: int,
        state_format: StateFormat | Callable[[str], StateFormat],
        chunk_parameters: int | None = None,
        durability: Durability = "step",
    ) -> "ModelLayout":
        """Lay parts of a model out, end to end.

        Args:
            parts: name of each stop, and its tensors as (name, shape): embeddings, blocks, head.
            blocks: number of stops that are decoder blocks.
            state_format: of all tensors, or of each by its name. The tensors of a part that have one format make a
                record; those records follow each other in the order of their first tensors.
            chunk_parameters: parameters of a chunk; None = by the size of the blocks.
            durability: of the store.
        """
        records: list[Record] = []
        stops = []
        for part, tensors in parts:
            by_format: dict[StateFormat, list[tuple[str, tuple[int, ...]]]] = {}
            for name, shape in tensors:
                wanted = state_format(name) if callable(state_format) else state_format
                by_format.setdefault(wanted, []).append((name, shape))
            first = len(records)
            for own_format, own in by_format.items():
                name = part if len(by_format) == 1 else f"{part} ({own_format})"
                records.append(_record(name, own_format, len(records), own))
            stops.append(tuple(range(first, len(records))))
        of_blocks = (records[number] for stop in stops[1 : 1 + blocks] for number in stop)
        chunk = chunk_parameters or default_chunk_parameters(of_blocks)
        return cls(chunk, tuple(records), tuple(stops), blocks, durability)

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
        unknown = {entry["format"] for entry in manifest["records"]}.difference(get_args(StateFormat))
        if unknown:
            raise FormatError(
                f"the store's records have the format {min(unknown)}, and a model in training has one of "
                f"{', '.join(get_args(StateFormat))}"
            )
        records = tuple(
            Record(entry["name"], entry["format"], tuple(places), entry["parameters"])
            for entry, places in zip(manifest["records"], tensors, strict=True)
        )
        model = manifest["model"]
        blocks = model.get("blocks") if isinstance(model, dict) else None
        counts = model.get("stops", [1] * len(records)) if isinstance(model, dict) else None
        if type(blocks) is not int or not _are_counts(counts, blocks, len(records)):
            raise FormatError(
                f"the store's manifest has {len(records)} records and says that {blocks!r} of them are blocks: it was "
                "not made by an import of megatrain-io. Import the model again"
            )
        stops = _stops_of(counts)
        if "stops" in model and len(stops) - blocks not in {1, 2}:
            raise FormatError(
                f"the store's manifest has {len(stops)} stops and {blocks} blocks: embedding and head are two at most"
            )
        for stop in stops:
            formats = [records[number].format for number in stop]
            if len(set(formats)) < len(formats):
                raise FormatError(
                    f"the records {', '.join(records[number].name for number in stop)} of one stop have the formats "
                    f"{', '.join(formats)}: this version makes one record of each"
                )
        return cls(manifest["chunk_parameters"], records, stops, blocks, manifest["durability"])

    def manifest(self, model: dict[str, Any]) -> bytes:
        """The store's manifest; ``model`` is whatever describes the model, kept as it is."""
        counts = list(map(len, self.stops))
        # Where it is missing, as before there were several or none, each record is a stop.
        several = {"stops": counts} if set(counts) != {1} else {}
        return json.dumps(
            {
                "chunk_parameters": self.chunk_parameters,
                "durability": self.durability,
                "records": [
                    {"name": record.name, "format": record.format, "parameters": record.parameters}
                    for record in self.records
                ],
                "tensors": [
                    {"name": t.name, "record": t.record, "offset": t.offset, "shape": list(t.shape)}
                    for t in self.tensors()
                ],
                "model": {**model, "blocks": self.blocks, **several},
            }
        ).encode()

    def with_stops(self, stops: Sequence[Sequence[Record]], blocks: int) -> "ModelLayout":
        """The layout of some stops alone, of which ``blocks`` are decoder blocks; their records are numbered anew."""
        numbers = _stops_of(map(len, stops))
        return replace(self, records=tuple(chain(*stops)), stops=numbers, blocks=blocks)

    @property
    def is_frozen(self) -> bool:
        """Whether nothing is trained: a step then passes gradients on, and makes none of parameters."""
        return not self.trained

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """The records that are trained, in order."""
        return tuple(number for number, record in enumerate(self.records) if record.is_trained)

    @property
    def embedding(self) -> int:
        """Stop of the embeddings and whatever else comes before the blocks."""
        return 0

    def block(self, index: int) -> int:
        """Stop of decoder block ``index``."""
        return 1 + index

    @property
    def head(self) -> int | None:
        """Stop of final norm and head; None when they have no parameters of their own."""
        return 1 + self.blocks if len(self.stops) > 1 + self.blocks else None

    @property
    def loss_stop(self) -> int:
        """Stop at which the loss is computed: of the head, or where that has no parameters, of the embedding."""
        return self.embedding if self.head is None else self.head

    @cached_property
    def stop_of(self) -> tuple[int, ...]:
        """Stop of each record."""
        return tuple(stop for stop, records in enumerate(self.stops) for _ in records)

    def trained_of(self, stop: int) -> tuple[int, ...]:
        """The records of a stop that are trained, in order."""
        return tuple(number for number in self.stops[stop] if self.records[number].is_trained)

    def tensors_of(self, stop: int) -> Iterator[TensorPlace]:
        """All tensors of a stop, record after record."""
        for number in self.stops[stop]:
            yield from self.records[number].tensors

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
        return _round_up(chunk.parameters * SPECS[self.records[chunk.record].format].weight_bytes, PAGE_BYTES)

    def update_extent_bytes(self, chunk: Chunk) -> int:
        """Bytes moved for what only the update of a chunk needs (moments, remainders), whole pages."""
        return _round_up(chunk.parameters * SPECS[self.records[chunk.record].format].update_bytes, PAGE_BYTES)

    def record_weight_bytes(self, record: int) -> int:
        """Bytes that the weights of a record take in a block buffer."""
        return self._weight_bytes_by_record[record]

    @cached_property
    def _weight_bytes_by_record(self) -> tuple[int, ...]:
        return tuple(sum(map(self.weight_extent_bytes, chunks)) for chunks in self._chunks_by_record)

    def record_update_bytes(self, record: int) -> int:
        """Bytes moved for what only the updates of a record need, all its chunks together."""
        return self._update_bytes_by_record[record]

    @cached_property
    def _update_bytes_by_record(self) -> tuple[int, ...]:
        return tuple(sum(map(self.update_extent_bytes, chunks)) for chunks in self._chunks_by_record)

    def record_deferred_bytes(self, record: int) -> int:
        """Bytes moved for the fp32 gradient of a record, all its chunks together, where it waits on the drive."""
        return self._deferred_bytes_by_record[record]

    @cached_property
    def _deferred_bytes_by_record(self) -> tuple[int, ...]:
        return tuple(sum(map(self.gradient_extent_bytes, chunks)) for chunks in self._chunks_by_record)

    def record_gradient_bytes(self, record: int) -> int:
        """Bytes of a buffer for the fp32 gradient of a record."""
        return _round_up(4 * self.records[record].parameters, PAGE_BYTES)

    def gradient_extent_bytes(self, chunk: Chunk) -> int:
        """Bytes moved for the fp32 gradient of a chunk, where it waits on the drive."""
        return _round_up(4 * chunk.parameters, PAGE_BYTES)

    def chunk_slot_bytes(self) -> int:
        """Bytes of a slot in which any chunk can be updated."""
        return max(self.weight_extent_bytes(c) + self.update_extent_bytes(c) for c in self.first_chunks())

    def first_chunks(self) -> Iterator[Chunk]:
        """The first chunk of each record: none of the others is larger."""
        return (chunks[0] for chunks in self._chunks_by_record if chunks)


def default_chunk_parameters(blocks: Iterable[Record]) -> int:
    """Parameters of a chunk: 2 Mi, or a quarter of the largest block where that is less."""
    largest = max((record.parameters for record in blocks), default=CHUNK_PARAMETERS_MAX)
    return min(CHUNK_PARAMETERS_MAX, max(_CHUNK_STEP, _round_up(-(-largest // 4), _CHUNK_STEP)))


def _record(
    name: str, state_format: StateFormat, number: int, tensors: Iterable[tuple[str, tuple[int, ...]]]
) -> Record:
    """Lay the tensors of a record out, end to end."""
    offset = 0
    places = []
    for tensor, shape in tensors:
        place = TensorPlace(tensor, tuple(shape), number, offset)
        places.append(place)
        offset = _round_up(offset + place.elements, _TENSOR_ALIGNMENT)
    return Record(name, state_format, tuple(places), offset)


def _are_counts(counts: object, blocks: int, records: int) -> TypeGuard[list[int]]:
    """Whether it says how many records each stop has, of ``records`` in all; only ``blocks`` may have none."""
    return (
        isinstance(counts, list)
        and 0 <= blocks < len(counts)
        and all(
            type(count) is int and count >= (0 if 0 < stop <= blocks else 1)
            for stop, count in enumerate(counts)
        )
        and sum(counts) == records
    )


def _stops_of(counts: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """The numbers of the records of each stop."""
    ends = list(accumulate(counts))
    return tuple(tuple(range(start, end)) for start, end in zip([0, *ends], ends, strict=False))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


Precision = Literal["bf16", "fp32"]
