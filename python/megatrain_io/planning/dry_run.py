"""A step without a store: on made-up weights, or on shapes that have no memory, to count what it allocates."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from megatrain_io.data.batch import MicroBatch
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.step import Step
from megatrain_io.paging.tensor_meter import TensorMeter
from megatrain_io.store.dtypes import dtype_of
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import BorrowedRecord

__all__ = ["CANNOT_DRY_RUN", "DryRun", "FakeStore", "dry_run", "fake_store_nbytes", "shortened"]

CANNOT_DRY_RUN = (DataDependentOutputException, GuardOnDataDependentSymNode, NotImplementedError)
"""A model whose shapes depend on its data (a mixture of experts that looks at its routing) raises one of these."""

_ENOUGH_BLOCKS = 2


def shortened(layout: ModelLayout) -> ModelLayout:
    """The same model with two blocks, if all are alike: a step needs no more at once with a hundred."""
    blocks = [layout.records[layout.block(index)] for index in range(layout.blocks)]
    shapes = {tuple(place.shape for place in block.tensors) for block in blocks}
    if len(blocks) <= _ENOUGH_BLOCKS or len(shapes) > 1:
        return layout
    head = layout.records[1 + layout.blocks :]
    return replace(
        layout, records=(layout.records[0], *blocks[:_ENOUGH_BLOCKS], *head), blocks=_ENOUGH_BLOCKS
    )


def fake_store_nbytes(layout: ModelLayout) -> int:
    """Bytes of a fake store's weights and gradients."""
    sizes = [sum(place.elements for place in record.tensors) for record in shortened(layout).records]
    return layout.weight_bytes * sum(sizes) + 4 * max(sizes) * (not layout.is_frozen)


class _FakeRecord(BorrowedRecord):
    """Stands for a borrowed record."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def give_back(self) -> None:
        self.tensors = {}


class FakeStore:
    """Stands for store, pool and activation checkpoints in a step that trains nothing: weights that are made up.

    Attributes:
        layout: of the model, shortened where its blocks are alike.
    """

    def __init__(self, layout: ModelLayout) -> None:
        self.layout = shortened(layout)
        self._dtype = dtype_of(layout)
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._kept: dict[int, dict[str, Tensor]] = {}

    def weights(self, record: int) -> BorrowedRecord:
        """As ``PagedStore.weights``."""
        return self._made_up(record, self._dtype, is_gradient=False)

    def gradient(self, record: int) -> BorrowedRecord:
        """As ``PagedStore.gradient``."""
        return self._made_up(record, torch.float32, is_gradient=True)

    def _made_up(self, record: int, dtype: torch.dtype, *, is_gradient: bool) -> BorrowedRecord:
        places = self.layout.records[record].tensors
        if is_gradient:
            # One for all: nobody looks at what is in it.
            return _FakeRecord(
                {p.name: self._gradient[p.offset : p.offset + p.elements].view(p.shape) for p in places}
            )
        if record not in self._kept:
            self._kept[record] = {place.name: torch.full(place.shape, 0.01, dtype=dtype) for place in places}
        return _FakeRecord(dict(self._kept[record]))

    @cached_property
    def _gradient(self) -> Tensor:
        return torch.zeros(max(record.parameters for record in self.layout.records))

    def submit(self, record: int, weights: BorrowedRecord, gradient: BorrowedRecord) -> None:
        """As ``PagedStore.submit``."""
        del record
        weights.give_back()
        gradient.give_back()

    def reserve(self, blocks: int, hidden_nbytes: Sequence[int]) -> None:
        """As ``SavedActivations.reserve``."""

    def put(self, block: int, micro_batch: int, hidden: Tensor) -> None:
        """As ``SavedActivations.put``."""
        self._inputs[block, micro_batch] = hidden.clone()

    def get(self, block: int, micro_batch: int, like: Tensor) -> Tensor:
        """As ``SavedActivations.get``."""
        del like
        return self._inputs[block, micro_batch]

    def finish(self, block: int) -> None:
        """As ``SavedActivations.finish``."""

    def release(self, block: int) -> None:
        """As ``SavedActivations.release``."""


class DryRun(FakeStore):
    """A fake store whose tensors have shapes and no memory, and that counts what the step allocates.

    Attributes:
        peak_nbytes: most bytes of tensors that were alive at once, without those of pool and activation checkpoints.
    """

    def __init__(self, layout: ModelLayout) -> None:
        super().__init__(layout)
        self._meter = TensorMeter()
        self._again = 0
        self._least = 0

    @property
    def peak_nbytes(self) -> int:
        """So far."""
        return max(self._meter.peak_nbytes, self._least)

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Inside, torch computes: masks are made by code that looks at its data."""
        with self._meter:
            yield

    def span(self, name: str) -> AbstractContextManager[None]:
        """Of the step: that of a micro-batch is measured by itself."""
        return self._alone() if name.startswith("micro-batch") else nullcontext()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        meter = self._meter
        before, peak = meter.nbytes, meter.peak_nbytes
        meter.peak_nbytes = before
        yield
        self._again = max(self._again, meter.peak_nbytes - before)
        meter.peak_nbytes = max(peak, meter.peak_nbytes)

    @contextmanager
    def blocks(self) -> Iterator[None]:
        """Inside, torch computes shapes alone. What the embedding's backward pass takes comes on top."""
        again = self._again
        with FakeTensorMode(allow_non_fake_inputs=True), self._meter:
            yield
        gradient = sum(place.elements for place in self.layout.records[0].tensors) * self._dtype.itemsize
        self._least = self._meter.nbytes + (0 if self.layout.is_frozen else again + gradient)

    def put(self, block: int, micro_batch: int, hidden: Tensor) -> None:
        """As ``SavedActivations.put``."""
        with self._meter.paused():
            super().put(block, micro_batch, hidden)

    def _made_up(self, record: int, dtype: torch.dtype, *, is_gradient: bool) -> BorrowedRecord:
        """Zeros, which nobody counts: they have no memory until written to, and reading touches a few rows."""
        del is_gradient
        with self._meter.paused():
            places = self.layout.records[record].tensors
            return _FakeRecord({place.name: torch.zeros(place.shape, dtype=dtype) for place in places})


# Micro-batches; what more of the same take is worked out.
_COUNTED = 3


def dry_run(
    partition: PartitionedModel,
    layout: ModelLayout,
    micro_batches: Sequence[MicroBatch],
    *,
    slice_tokens: int,
) -> int | None:
    """Bytes of tensors that a training step needs at once, beside pool, residents and activation checkpoints.

    Nothing is read, and all but the masks is computed on shapes alone. None where the model's shapes depend on
    its data, so that only a real step can tell.
    """
    count = len(micro_batches)
    if count <= _COUNTED or any(batch is not micro_batches[0] for batch in micro_batches):
        return _dry_run(partition, layout, micro_batches, slice_tokens)
    # Each of the same takes the same more.
    two, three = (
        _dry_run(partition, layout, micro_batches[:n], slice_tokens) for n in (_COUNTED - 1, _COUNTED)
    )
    return None if two is None or three is None else three + (count - _COUNTED) * (three - two)


def _dry_run(
    partition: PartitionedModel, layout: ModelLayout, micro_batches: Sequence[MicroBatch], slice_tokens: int
) -> int | None:
    partition.train()
    run = DryRun(layout)
    step = Step(partition, run, run, micro_batches, slice_tokens=slice_tokens, span=run.span)
    random_state = torch.get_rng_state()
    try:
        with run.embedding():
            step.embedding()
        with run.blocks():
            step.forward(saving=True)
            step.head(training=True)
            step.leave_head()
            step.backward()
    except CANNOT_DRY_RUN:
        return None
    finally:
        torch.set_rng_state(random_state)
    return run.peak_nbytes
