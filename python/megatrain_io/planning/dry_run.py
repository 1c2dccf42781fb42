"""A step without a store: on made-up weights to measure its time, or on shapes alone to count its memory."""

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import MegatrainIoError
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.step import Step
from megatrain_io.paging.tensor_meter import TensorMeter
from megatrain_io.store.dtypes import dtype_of
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import BorrowedRecord

__all__ = ["DryRun", "FakeStore", "dry_run", "fake_store_nbytes", "shortened", "with_all_neighbours"]

# Asked in this order where the shape function of an operator refuses the dtype that computes.
_OTHER_DTYPES = (torch.bfloat16, torch.float32)

_ENOUGH_BLOCKS = 2


def shortened(layout: ModelLayout) -> ModelLayout:
    """The layout with two blocks, if all blocks have the same shapes: a step needs no more at once with a hundred."""
    alike = len(set(_shapes_of_blocks(layout))) == 1
    return _first_blocks(layout, _ENOUGH_BLOCKS) if alike else layout


def with_all_neighbours(layout: ModelLayout) -> ModelLayout:
    """The layout with its first blocks, as many as show every kind of block, and every kind behind every other.

    Blocks are of one kind if they have the same shapes. No later one finds more in memory than these do.
    """
    shapes = _shapes_of_blocks(layout)
    pairs = list(pairwise(shapes))
    enough = max((pairs.index(pair) for pair in set(pairs)), default=0) + _ENOUGH_BLOCKS
    return _first_blocks(layout, enough)


def _shapes_of_blocks(layout: ModelLayout) -> list[Hashable]:
    return [
        tuple(
            (record.format, *(place.shape for place in record.tensors))
            for record in (layout.records[number] for number in layout.stops[layout.block(index)])
        )
        for index in range(layout.blocks)
    ]


def _first_blocks(layout: ModelLayout, count: int) -> ModelLayout:
    """The layout without the blocks behind the first ``count``."""
    if layout.blocks <= count:
        return layout
    stops = [tuple(layout.records[record] for record in stop) for stop in layout.stops]
    return layout.with_stops([*stops[: 1 + count], *stops[1 + layout.blocks :]], count)


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

    def skip(self, record: int, weights: BorrowedRecord) -> None:
        """Give the weights back; see ``Records.skip``."""
        del record
        weights.give_back()

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


class _AnyDtype(TorchDispatchMode):
    """Shapes of operators whose shape function knows fewer dtypes than their kernel does.

    That of ``_grouped_mm``, by which mixtures of experts compute, takes bf16 alone, its kernel fp32 as well.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation; what it refuses in one dtype is asked in another, and has the first one's bytes."""
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            floats = {each.dtype for each in inputs if each.is_floating_point()}
            for other in _OTHER_DTYPES if len(floats) == 1 else ():
                with suppress(RuntimeError):
                    result = func(*_as(other, args), **_as(other, kwargs))
                    return _as(next(iter(floats)), result)
            raise


def _as(dtype: torch.dtype, values: Any) -> Any:
    """The same values with tensors of numbers in ``dtype``; what is in them is lost."""
    return tree_map_only(
        Tensor,
        lambda each: torch.empty_like(each, dtype=dtype) if each.is_floating_point() else each,
        values,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's own report of a shape function that refuses: it is asked otherwise, or the run given up."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class DryRun(FakeStore):
    """A fake store whose tensors have shapes and no memory, and that counts what a step allocates.

    Args:
        layout: of the model.
        grows: whether a step keeps more with each block (gradients of side inputs): then all blocks are passed.
    """

    def __init__(self, layout: ModelLayout, *, grows: bool = False) -> None:
        super().__init__(layout)
        self.layout = layout if grows else with_all_neighbours(layout)
        self._meter = TensorMeter()
        self._grows = grows
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
        before, peak, made = meter.nbytes, meter.peak_nbytes, meter.made_nbytes
        meter.peak_nbytes = before
        yield
        # Where the embedding computes much, autograd keeps what it makes until the backward pass is through it.
        own = meter.made_nbytes - made if self._grows else meter.peak_nbytes - before
        self._again = max(self._again, own)
        meter.peak_nbytes = max(peak, meter.peak_nbytes)

    @contextmanager
    def blocks(self) -> Iterator[None]:
        """Count what is allocated inside, on shapes alone. What the embedding's backward pass takes is added."""
        again = self._again
        any_dtype = _AnyDtype()  # type: ignore[no-untyped-call]  # torch has no types here
        with _quiet(), FakeTensorMode(allow_non_fake_inputs=True), any_dtype, self._meter:
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
        None where the model does not run on shapes alone (they depend on its data, as in some mixtures of experts, or
        an operator has no shapes without data), so that only a real step can tell.
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
    run = DryRun(layout, grows=bool(partition.spec.sides or partition.spec.shares))
    step = Step(partition, run, run, micro_batches, slice_tokens=slice_tokens, span=run.span)
    try:
        with partition.preserved():
            partition.train()
            _rehearse(step, run)
    except MegatrainIoError:
        raise
    except Exception:  # noqa: BLE001 - whatever a model's code does on shapes without data
        return None
    return run.peak_nbytes


def _rehearse(step: Step, run: DryRun) -> None:
    with run.embedding():
        step.embedding()
    with run.blocks():
        step.forward(saving=True)
        step.head(training=True)
        step.leave_head()
        step.backward()
