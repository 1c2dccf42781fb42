"""Buffers on a device: their kinds, sizes and numbers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.state_format import StateFormat
from megatrain_io.text import whole_mib

__all__ = [
    "CONTEXT_NBYTES",
    "PIECES",
    "DeviceKind",
    "DevicePool",
    "VramPlan",
    "device_pool",
    "gathered_chunks",
    "kind_of",
    "slot_nbytes",
]

CONTEXT_NBYTES = 600 << 20
"""What CUDA, cuBLAS and fragments of the allocator take on a GPU, besides tensors."""

# Pieces of gradients that gather in RAM: one comes in, one is added to, one goes out.
_PIECES = 3

_STEP = 2 << 20


class DeviceKind(NamedTuple):
    """What a buffer on a device is for.

    Attributes:
        stop: ``block``; ``embedding`` and ``head``, or ``outer`` for both; ``any`` for all of them; ``pieces`` of
            gradients that gather in RAM.
        format: of the records; None for pieces, which are of all.
    """

    stop: str
    format: StateFormat | None


PIECES = DeviceKind("pieces", None)
"""The kind of the buffers that gradients pass through which gather in RAM."""


@dataclass(frozen=True)
class DevicePool:
    """Buffers on a device, as ``(bytes, count)`` by kind.

    Attributes:
        weights: each holds the weights of a record.
        gradients: each holds the fp32 gradient of a record, or of a chunk where gradients gather in RAM (kind
            ``pieces``); empty where nothing is trained.
    """

    weights: Mapping[DeviceKind, tuple[int, int]]
    gradients: Mapping[DeviceKind, tuple[int, int]]

    @property
    def gathers(self) -> bool:
        """Whether gradients gather in RAM, as there is no room for one of a whole record."""
        return PIECES in self.gradients

    @property
    def nbytes(self) -> int:
        """Bytes that all buffers take together."""
        kinds = [*self.weights.values(), *self.gradients.values()]
        return sum(nbytes * count for nbytes, count in kinds)


@dataclass(frozen=True)
class VramPlan:
    """How the memory of a device is divided, in bytes.

    Attributes:
        vram: the budget.
        context: what the driver and its libraries take.
        compute: tensors of compute that are alive at once.
        pool: buffers for weights and gradients.
        activations: for activation checkpoints; those that do not fit go on to RAM.
        all_activations: what all activation checkpoints take together.
    """

    vram: int
    context: int
    compute: int
    pool: DevicePool
    activations: int
    all_activations: int

    @property
    def allocated(self) -> int:
        """Bytes that are allocated before the first step: the pool, and room for activation checkpoints."""
        return self.pool.nbytes + self.activations

    @property
    def total(self) -> int:
        """Bytes that will be taken: at most the budget."""
        return self.context + self.compute + self.allocated

    def __str__(self) -> str:
        """How the budget is divided, as a line for a person."""
        is_spilled = self.activations < self.all_activations
        rest = f" (of {whole_mib(self.all_activations)}, the rest in RAM)" * is_spilled
        inputs = f"{whole_mib(self.activations)}{rest}"
        gradients = sum(nbytes * count for nbytes, count in self.pool.gradients.values())
        gathers = " (they gather in RAM)" * self.pool.gathers
        return (
            f"VRAM: {whole_mib(self.total)} of {whole_mib(self.vram)}: weights "
            f"{whole_mib(self.pool.nbytes - gradients)}, gradients {whole_mib(gradients)}{gathers}, activations "
            f"{inputs}, compute {whole_mib(self.compute)}, driver and libraries {whole_mib(self.context)}"
        )


def slot_nbytes(nbytes: int) -> int:
    """Bytes that a buffer of ``nbytes`` takes: torch's allocator gives large ones in steps of 2 MiB."""
    return nbytes if nbytes < _STEP // 2 else -(-nbytes // _STEP) * _STEP


def kind_of(layout: ModelLayout, record: int, kinds: Iterable[DeviceKind]) -> DeviceKind:
    """The kind of buffer, among ``kinds``, that holds a record."""
    stop, own = _name_of(layout, layout.stop_of[record]), layout.records[record].format
    fitting = {kind.stop: kind for kind in kinds if kind.format in {None, own}}
    return next(fitting[name] for name in ("any", PIECES.stop, stop, "outer") if name in fitting)


def _name_of(layout: ModelLayout, stop: int) -> str:
    if layout.embedding < stop <= layout.blocks:
        return "block"
    return "embedding" if stop == layout.embedding else "head"


def gathered_chunks(layout: ModelLayout, *, tied_embeddings: bool) -> int:
    """Chunks of gradients that gather in RAM at once: those of a stop, and those of a tied table besides."""
    chunks = [
        sum(len(layout.chunks_of(record)) for record in layout.trained_of(stop))
        for stop in range(len(layout.stops))
    ]
    table = chunks.pop(layout.embedding) if tied_embeddings else 0
    return max(chunks) + table


def device_pool(
    layout: ModelLayout,
    *,
    tied_embeddings: bool,
    training: bool,
    block_weights: int = 2,
    block_gradients: int | None = 2,
) -> DevicePool:
    """The buffers that a step needs on a device.

    Args:
        layout: of the store.
        tied_embeddings: whether the head needs the embedding's weights, too: then both are there at once, and else one
            buffer serves them one after the other.
        training: False leaves out gradients, as frozen weights do.
        block_weights: buffers for weights of blocks: one to compute with, and one that is filled meanwhile.
        block_gradients: buffers for gradients of blocks: one to accumulate in, and one that leaves meanwhile; 0: one
            buffer serves all records of a format, and none accumulates before the last one has left; None: they gather
            in RAM, and pass through in pieces.

    Of each kind there are as many for every format that a block, embedding or head has a record of.
    """
    names = [_name_of(layout, stop) for stop in range(len(layout.stops))]
    if not tied_embeddings:
        names = [name if name == "block" else "outer" for name in names]

    def sizes(
        records: Iterable[int], nbytes_of: Callable[[int], int], count: int
    ) -> dict[DeviceKind, tuple[int, int]]:
        found: dict[DeviceKind, tuple[int, int]] = {}
        for record in records:
            kind = DeviceKind(names[layout.stop_of[record]], layout.records[record].format)
            most = max(slot_nbytes(nbytes_of(record)), *found.get(kind, (0, 0))[:1])
            found[kind] = (most, count if kind.stop == "block" else 1)
        return found

    of_weights = sizes(
        range(len(layout.records)), layout.record_weight_bytes, min(block_weights, layout.blocks)
    )
    if not training or layout.is_frozen:
        return DevicePool(of_weights, {})
    if block_gradients is None:
        chunk = max(chunk.parameters for record in layout.trained for chunk in layout.chunks_of(record))
        return DevicePool(of_weights, {PIECES: (slot_nbytes(4 * chunk), _PIECES)})
    if block_gradients == 0:
        names = ["any"] * len(names)
    count = min(block_gradients, layout.blocks)
    return DevicePool(of_weights, sizes(layout.trained, layout.record_gradient_bytes, count))
