"""A step without a store: on made-up weights to measure its time, or on shapes alone to count its memory."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
"""What a model raises whose shapes depend on its data, such as a mixture of experts that looks at its routing."""

_ENOUGH_BLOCKS = 2


def shortened(layout: ModelLayout) -> ModelLayout:
    """The layout with two blocks, if all blocks have the same shapes: a step needs no more at once with a hundred."""
    stops = [tuple(layout.records[record] for record in stop) for stop in layout.stops]
    embedding, blocks, head = stops[0], stops[1 : 1 + layout.blocks], stops[1 + layout.blocks :]
    shapes = {
        tuple((record.format, *(place.shape for place in record.tensors)) for record in block)
        for block in blocks
    }
    if len(blocks) <= _ENOUGH_BLOCKS or len(shapes) > 1:
        return layout
    return layout.with_stops([embedding, *blocks[:_ENOUGH_BLOCKS], *head], _ENOUGH_BLOCKS)


def fake_store_nbytes(layout: ModelLayout) -> int:
    """Bytes of a fake store's weights, and of its one gradient buffer."""
    layout = shortened(layout)
    sizes = [sum(place.elements for place in record.tensors) for record in layout.records]
    weights = sum(
        size * dtype_of(record.format).itemsize for size, record in zip(sizes, layout.records, strict=True)
    )
    return weights + 4 * max((sizes[record] for record in layout.trained), default=0)


class _FakeRecord(BorrowedRecord):
    """A borrowed record over tensors that no store holds."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def give_back(self) -> None:
        self.tensors = {}


class FakeStore:
    """Records and activation checkpoints for a step that trains nothing, on made-up weights.

    It stands for ``PagedStore`` and ``SavedActivations`` (``paging.protocols``).

    Attributes:
        layout: of the model, shortened where its blocks are alike.
    """

    def __init__(self, layout: ModelLayout) -> None:
        self.layout = shortened(layout)
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._kept: dict[int, dict[str, Tensor]] = {}

    def weights(self, record: int) -> BorrowedRecord:
        """The weights of a record, made up once and kept; see ``Records.weights``."""
        return self._made_up(record, dtype_of(self.layout.records[record].format), is_gradient=False)

    def gradient(self, record: int) -> BorrowedRecord:
        """Memory for the gradient of a record, the same for all; see ``Records.gradient``."""
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
        """Drop the gradient and give the weights back; see ``Records.submit``."""
        del record
        weights.give_back()
        gradient.give_back()

    def reserve(self, blocks: int, hidden_nbytes: Sequence[int]) -> None:
        """Reserve nothing: inputs are copied when they are put; see ``Activations.reserve``."""

    def put(self, block: int, micro_batch: int, hidden: Tensor) -> None:
        """Keep a copy of the input of a block; see ``Activations.put``."""
        self._inputs[block, micro_batch] = hidden.clone()

    def get(self, block: int, micro_batch: int, like: Tensor) -> Tensor:
        """The input of a block that was put; see ``Activations.get``."""
        del like
        return self._inputs[block, micro_batch]

    def finish(self, block: int) -> None:
        """Move nothing: all inputs stay in memory; see ``Activations.finish``."""

    def release(self, block: int) -> None:
        """Keep the inputs until the next step puts others; see ``Activations.release``."""


class DryRun(FakeStore):
    """A fake store whose tensors have shapes and no memory, and that counts what a step allocates."""

    def __init__(self, layout: ModelLayout) -> None:
        super().__init__(layout)
        self._meter = TensorMeter()
        self._again = 0
        self._least = 0

    @property
    def peak_nbytes(self) -> int:
        """Most bytes of tensors that were alive at once so far, without those of pool and activation checkpoints."""
        return max(self._meter.peak_nbytes, self._least)

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Count what is allocated inside. Torch computes in full here: code that makes masks looks at its data."""
        with self._meter:
            yield

    def span(self, name: str) -> AbstractContextManager[None]:
        """Measure a span of the step by itself, if it is that of a micro-batch."""
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
        """Count what is allocated inside, on shapes alone. What the embedding's backward pass takes is added."""
        again = self._again
        with FakeTensorMode(allow_non_fake_inputs=True), self._meter:
            yield
        records = [self.layout.records[number] for number in self.layout.trained_of(self.layout.embedding)]
        gradient = sum(
            place.elements * dtype_of(record.format).itemsize
            for record in records
            for place in record.tensors
        )
        self._least = self._meter.nbytes + (again + gradient if records else 0)

    def put(self, block: int, micro_batch: int, hidden: Tensor) -> None:
        """Keep a copy of the input of a block, which is not counted."""
        with self._meter.paused():
            super().put(block, micro_batch, hidden)

    def _made_up(self, record: int, dtype: torch.dtype, *, is_gradient: bool) -> BorrowedRecord:
        """Zeros that are not counted: they take no memory until written to, and reading touches a few rows."""
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

    Nothing is read from a store, and all but the masks is computed on shapes alone.

    Args:
        partition: the model without its parameters.
        layout: of its store.
        micro_batches: of the step.
        slice_tokens: tokens whose logits exist at once.

    Returns:
        None where shapes inside the model depend on its data, so that only a real step can tell.
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
