"""Buffers on a device: their kinds, sizes and numbers."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megatrain_io.store.layout import ModelLayout
from megatrain_io.text import whole_mib

__all__ = [
    "CONTEXT_NBYTES",
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


@dataclass(frozen=True)
class DevicePool:
    """Buffers on a device, as ``(bytes, count)`` by kind.

    Attributes:
        weights: each holds the weights of a record.
        gradients: each holds the fp32 gradient of a record, or of a chunk where gradients gather in RAM (kind
            ``pieces``); empty where nothing is trained.
    """

    weights: Mapping[str, tuple[int, int]]
    gradients: Mapping[str, tuple[int, int]]

    @property
    def gathers(self) -> bool:
        """Whether gradients gather in RAM, as there is no room for one of a whole record."""
        return "pieces" in self.gradients

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


def kind_of(layout: ModelLayout, record: int, kinds: Collection[str]) -> str:
    """The kind of buffer, among ``kinds``, that holds a record."""
    for shared in ("any", "pieces"):
        if shared in kinds:
            return shared
    if layout.embedding < record <= layout.blocks:
        return "block"
    if "outer" in kinds:
        return "outer"
    return "embedding" if record == layout.embedding else "head"


def gathered_chunks(layout: ModelLayout, *, tied_embeddings: bool) -> int:
    """Chunks of gradients that gather in RAM at once: those of a record, and those of a tied table besides."""
    table = layout.embedding if tied_embeddings else None
    others = [len(layout.chunks_of(record)) for record in range(len(layout.records)) if record != table]
    return max(others) + (0 if table is None else len(layout.chunks_of(table)))


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
            buffer serves all records, and none accumulates before the last one has left; None: they gather in RAM, and
            pass through in pieces.
    """
    blocks = [layout.block(index) for index in range(layout.blocks)]
    outer = {layout.embedding: "embedding"}
    if layout.head is not None:
        outer[layout.head] = "head"
    if not tied_embeddings:
        outer = dict.fromkeys(outer, "outer")
    names = {**dict.fromkeys(blocks, "block"), **outer}

    def sizes(nbytes_of: Mapping[int, int], count: int) -> dict[str, tuple[int, int]]:
        return {
            kind: (
                slot_nbytes(max(nbytes for record, nbytes in nbytes_of.items() if names[record] == kind)),
                count if kind == "block" else 1,
            )
            for kind in dict.fromkeys(names.values())
        }

    weights = {record: layout.record_weight_bytes(record) for record in names}
    gradients = {record: layout.record_gradient_bytes(record) for record in names}
    of_weights = sizes(weights, min(block_weights, layout.blocks))
    if not training or layout.is_frozen:
        return DevicePool(of_weights, {})
    if block_gradients is None:
        chunk = max(chunk.parameters for chunk in layout.chunks)
        return DevicePool(of_weights, {"pieces": (slot_nbytes(4 * chunk), _PIECES)})
    if block_gradients == 0:
        return DevicePool(of_weights, {"any": (slot_nbytes(max(gradients.values())), 1)})
    return DevicePool(of_weights, sizes(gradients, min(block_gradients, layout.blocks)))
