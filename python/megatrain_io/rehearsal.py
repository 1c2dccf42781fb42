"""A step on tensors that have shapes and no memory: what it would allocate, known before it runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from megatrain_io.layout import ModelLayout, Record
from megatrain_io.swap import BorrowedRecord
from megatrain_io.workspace import WorkspaceMeter

__all__ = ["CANNOT_REHEARSE", "Rehearsal", "shortened"]

CANNOT_REHEARSE = (DataDependentOutputException, GuardOnDataDependentSymNode, NotImplementedError)
"""A model whose shapes depend on its data (a mixture of experts that looks at its routing) raises one of these."""

_ENOUGH_BLOCKS = 2


def shortened(layout: ModelLayout) -> ModelLayout:
    """The same model with two blocks, if all are alike: a step needs no more at once with a hundred."""
    blocks = [layout.records[layout.block(index)] for index in range(layout.blocks)]
    shapes = {tuple(place.shape for place in block.tensors) for block in blocks}
    if len(blocks) <= _ENOUGH_BLOCKS or len(shapes) > 1:
        return layout
    epilogue = layout.records[1 + layout.blocks :]
    return replace(
        layout, records=(layout.records[0], *blocks[:_ENOUGH_BLOCKS], *epilogue), blocks=_ENOUGH_BLOCKS
    )


class _FakeRecord(BorrowedRecord):
    """Stands for a borrowed record: zeros of its shapes, which nobody counts.

    Real ones have no memory either until they are written to, and reading touches a few rows of a table.
    """

    def __init__(self, meter: WorkspaceMeter, record: Record, dtype: torch.dtype) -> None:
        with meter.paused():
            self.tensors = {place.name: torch.zeros(place.shape, dtype=dtype) for place in record.tensors}

    def give_back(self) -> None:
        self.tensors = {}


class Rehearsal:
    """Stands for store, pool and saved inputs in a step that only counts.

    Attributes:
        layout: of the model, shortened where its blocks are alike.
        peak_nbytes: most bytes of tensors that were alive at once, without those of pool and saved inputs.
    """

    def __init__(self, layout: ModelLayout) -> None:
        self.layout = shortened(layout)
        self._dtype = torch.float32 if layout.format == "f32" else torch.bfloat16
        self._meter = WorkspaceMeter()
        self._prologue = 0
        self._least = 0
        self._inputs: dict[tuple[int, int], Tensor] = {}

    @property
    def peak_nbytes(self) -> int:
        """So far."""
        return max(self._meter.peak_nbytes, self._least)

    @contextmanager
    def prologue(self) -> Iterator[None]:
        """Inside, torch computes: masks are made by code that looks at its data."""
        before = self._meter.nbytes
        with self._meter:
            yield
        self._prologue = self._meter.peak_nbytes - before

    @contextmanager
    def blocks(self) -> Iterator[None]:
        """Inside, torch computes shapes alone. What the prologue's backward pass takes comes on top."""
        with FakeTensorMode(allow_non_fake_inputs=True), self._meter:
            yield
        gradient = sum(place.elements for place in self.layout.records[0].tensors) * self._dtype.itemsize
        self._least = self._meter.nbytes + self._prologue + gradient

    def weights(self, record: int) -> BorrowedRecord:
        """As ``PagedState.weights``."""
        return _FakeRecord(self._meter, self.layout.records[record], self._dtype)

    def gradient(self, record: int) -> BorrowedRecord:
        """As ``PagedState.gradient``."""
        return _FakeRecord(self._meter, self.layout.records[record], torch.float32)

    def submit(self, record: int, weights: BorrowedRecord, gradient: BorrowedRecord) -> None:
        """As ``PagedState.submit``."""
        del record
        weights.give_back()
        gradient.give_back()

    def reserve(self, blocks: int, hidden_nbytes: Sequence[int]) -> None:
        """As ``SavedInputs.reserve``."""

    def put(self, block: int, micro_batch: int, hidden: Tensor) -> None:
        """As ``SavedInputs.put``."""
        with self._meter.paused():
            self._inputs[block, micro_batch] = hidden.clone()

    def get(self, block: int, micro_batch: int, like: Tensor) -> Tensor:
        """As ``SavedInputs.get``."""
        del like
        return self._inputs[block, micro_batch]

    def finish(self, block: int) -> None:
        """As ``SavedInputs.finish``."""

    def release(self, block: int) -> None:
        """As ``SavedInputs.release``."""
