"""One pass of a model over all micro-batches of a step: its phases, and the order of all sums.

Orders of summation are part of the result:

* the loss is the fp32 sum over micro-batches (and their slices) in order;
* a gradient is the fp32 sum of the native gradients of the micro-batches in order;
* a tied table sums the head's gradients of all micro-batches first, then the embedding's;
* the gradient of a side input passes through the blocks that take it, last to first, and each use adds to it in the
  order of autograd; then it goes into the backward pass of what made it, with the gradient of the hidden state.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from megatrain_io.data.batch import MicroBatch, trained_tokens
from megatrain_io.errors import MegatrainIoError, UnsupportedModelError
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.models.side_inputs import BlockCall, SideGradients, side_inputs_of
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.gradient import Gradient, StopWeights, leaves_of
from megatrain_io.paging.protocols import Activations, Records
from megatrain_io.paging.ranks import OneRank, Ranks
from megatrain_io.store.schedule import Phase

__all__ = ["LOGITS_BYTES", "Step", "hidden_nbytes", "slice_tokens"]

LOGITS_BYTES = 128 << 20
"""Default bound on the bytes of the fp32 logits of one slice of tokens."""

# Random numbers follow from these words: with others, a run that has begun would go on with other bits.
_SEED_NAMES = {Phase.EMBEDDING: "prologue", Phase.HEAD: "epilogue"}

_P = ParamSpec("_P")
_R = TypeVar("_R")


def slice_tokens(partition: PartitionedModel, logits_bytes: int) -> int:
    """Tokens whose fp32 logits take at most ``logits_bytes``; at least one."""
    return max(1, logits_bytes // (4 * partition.vocab_size))


def hidden_nbytes(partition: PartitionedModel, micro_batches: Sequence[MicroBatch]) -> list[int]:
    """Bytes of the hidden state [B, T, H] of each micro-batch, between those blocks where it has most."""
    width = partition.hidden_size
    return [batch.input_ids.numel() * width * partition.hidden_dtype.itemsize for batch in micro_batches]


def _no_span(_name: str) -> AbstractContextManager[None]:
    return nullcontext()


def _phase(
    method: Callable[Concatenate["Step", _P], _R],
) -> Callable[Concatenate["Step", _P], _R]:
    """Trace a phase of the step under its name."""

    @wraps(method)
    def traced(step: "Step", /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with step.span(method.__name__):
            return method(step, *args, **kwargs)

    return traced


class Step:
    """One pass over all micro-batches: the phases, in the order in which they are called.

    Args:
        partition: the model without its parameters.
        state: where its weights come from and its gradients go.
        saved: where activation checkpoints are kept.
        micro_batches: each goes through the model as a whole.
        number: of the step; random numbers follow from it and ``seed``.
        seed: of all random numbers of training (dropout).
        slice_tokens: tokens whose logits exist at once.
        span: traces what is done inside it, by name.
        device: what computes.
        ranks: over which tokens, loss and gradients are summed; None = this process alone.
        updated: records that get gradients; None = all that are trained.
        carried: others that the schedule updates: without a gradient, so that what is in RAM alone is written.
    """

    def __init__(  # noqa: PLR0913 - each with a meaning of its own
        self,
        partition: PartitionedModel,
        state: Records,
        saved: Activations,
        micro_batches: Sequence[MicroBatch],
        *,
        slice_tokens: int,
        number: int = 1,
        seed: int = 0,
        span: Callable[[str], AbstractContextManager[None]] = _no_span,
        device: Device | None = None,
        ranks: Ranks | None = None,
        updated: Collection[int] | None = None,
        carried: Collection[int] = (),
    ) -> None:
        self._ranks = ranks or OneRank()
        self.num_items = self._ranks.sum_tokens(trained_tokens(micro_batches))
        if self.num_items == 0:
            raise MegatrainIoError("no token of this step has a label: there is nothing to train or measure")
        # Where a number is multiplied by its inverse, a tensor is divided by, as in stock loops.
        is_cuda = device is not None and device.torch_device.type == "cuda"
        self._divisor = torch.tensor(self.num_items, device="cuda") if is_cuda else self.num_items
        self.span = span
        self._partition = partition
        self._state = state
        self._saved = saved
        self._device = device or Cpu()
        self._layout = state.layout
        self._updated = frozenset(state.layout.trained if updated is None else updated)
        self._carried = frozenset(carried)
        self._micro_batches = micro_batches
        self._slice_tokens = slice_tokens
        self._number = number
        self._run_seed = seed
        self._hidden: list[Tensor] = []
        self._input_dtypes: list[torch.dtype] = []
        self._calls: list[list[BlockCall]] = []
        self._sides: list[SideGradients] = []
        self._last_block: StopWeights | None = None
        self._in_head: list[tuple[StopWeights, Gradient | None]] = []
        self._table_gradient: Gradient | None = None

    @_phase
    def embedding(self) -> None:
        """Compute the first hidden state [B, T, H] of every micro-batch, and the arguments of every block."""
        weights = StopWeights(self._state, self._layout.embedding)
        with torch.no_grad():
            for index, micro_batch in self._each(self._micro_batches):
                self._seed(index, Phase.EMBEDDING)
                hidden, calls = self._partition.record(self._as_trained(weights.tensors), micro_batch)
                self._hidden.append(hidden)
                self._calls.append(list(calls))
                self._sides.append(SideGradients(side_inputs_of(calls)))
                del hidden, calls
        weights.give_back()

    @_phase
    def forward(self, *, saving: bool) -> None:
        """Run all blocks, first to last; ``saving`` keeps their inputs. The last one's weights stay for backward."""
        last = self._layout.blocks - 1
        if saving:
            # Made before the step; this is for models whose hidden state has another size than they say.
            widest = self._partition.hidden_dtype.itemsize
            sizes = [hidden.numel() * max(hidden.itemsize, widest) for hidden in self._hidden]
            self._saved.reserve(self._layout.blocks, sizes)
        for block in self._each_block("forward", range(self._layout.blocks)):
            self._input_dtypes.append(self._hidden[0].dtype)
            if saving:
                # All before any is computed: so their way to the drive has the time of this block, too.
                for index in range(len(self._hidden)):
                    self._saved.put(block, index, self._hidden[index])
                self._saved.finish(block)
            weights = StopWeights(self._state, self._layout.block(block))
            leaves = self._as_trained(weights.tensors)
            with torch.no_grad():
                for index, calls in self._each(self._calls):
                    self._seed(index, Phase.FORWARD, block)
                    call = calls[block]
                    if saving:
                        # The others see what this block leaves for them, its own recomputation does not.
                        calls[block] = call.as_now()
                    self._hidden[index] = self._partition.run_block_forward(
                        block, leaves, self._hidden[index], call, training=saving
                    )
            leaves.clear()
            if saving and block == last:
                self._last_block = weights
            else:
                weights.give_back()

    @_phase
    def head(self, *, training: bool) -> Tensor:
        """The loss of the step, an fp32 scalar; with ``training`` also its gradients, by micro-batch and slice."""
        layout = self._layout
        tied = self._partition.tied_parameters
        own = None if layout.head is None else StopWeights(self._state, layout.head)
        table = StopWeights(self._state, layout.embedding) if tied else None
        weights = [borrowed for borrowed in (own, table) if borrowed is not None]
        own_gradient: Gradient | None = None
        if training and layout.head is not None:
            own_gradient = self._gradient(layout.head)
        if training and tied:
            self._table_gradient = self._gradient(layout.embedding, tied)
        gradients = [gradient for gradient in (own_gradient, self._table_gradient) if gradient is not None]
        total: Tensor | None = None
        with torch.set_grad_enabled(training):
            for index, _ in self._each(self._micro_batches):
                self._seed(index, Phase.HEAD)
                loss = self._head_slices(index, weights, gradients, training=training)
                total = loss if total is None else total + loss
        if total is None:
            raise MegatrainIoError("a step needs at least one micro-batch")
        if own is not None:
            self._in_head.append((own, own_gradient))
        if table is not None:
            self._in_head.append((table, None))
        return self._ranks.sum_loss(total)

    def leave_head(self) -> None:
        """Submit the gradient of the head, and give back the weights that it borrowed."""
        for weights, gradient in self._in_head:
            if gradient is not None:
                gradient.submit(weights)
            else:
                weights.give_back()
        self._in_head.clear()

    @_phase
    def backward(self) -> None:
        """Run all blocks backward, last to first: recompute, make gradients, submit them for the update.

        Blocks of which nothing is updated only pass the gradient of their output on to their input.
        """
        weights = self._last_block
        self._last_block = None
        for block in self._each_block("backward", reversed(range(self._layout.blocks))):
            stop = self._layout.block(block)
            weights = weights or StopWeights(self._state, stop)
            gradient = self._gradient(stop)
            for index, _ in self._each(self._micro_batches):
                self._seed(index, Phase.FORWARD, block)
                self._hidden[index] = self._block_backward(block, index, weights.tensors, gradient)
            self._saved.release(block)
            if gradient is None:
                weights.give_back()
            else:
                gradient.submit(weights)
            weights = None

    def first_gradients(self) -> list[Tensor]:
        """After ``backward``: the gradient [B, T, H] with respect to the first hidden state of each micro-batch."""
        return self._hidden

    @_phase
    def embedding_backward(self) -> None:
        """Make and submit the embedding's gradient from those of the first hidden states, if it is updated."""
        embedding = self._layout.embedding
        if (self._updated | self._carried).isdisjoint(self._layout.stops[embedding]):
            return
        weights = StopWeights(self._state, embedding)
        gradient = self._table_gradient or self._gradient(embedding)
        self._table_gradient = None
        if gradient is None:
            raise MegatrainIoError("an embedding that is updated without a gradient: this is a bug")
        for index, micro_batch in self._each(self._micro_batches if gradient.names else ()):
            self._seed(index, Phase.EMBEDDING)
            names = (*gradient.names, *self._unreached(weights.tensors))
            leaves = leaves_of({name: weights.tensors[name] for name in names})
            hidden, calls = self._partition.record(
                {**self._as_trained(weights.tensors), **leaves}, micro_batch
            )
            gradients = self._sides[index].through_embedding(
                hidden, calls, list(leaves.values()), self._hidden[index]
            )
            self._refuse_reached(dict(zip(leaves, gradients, strict=True)))
            gradient.add(gradient.names, gradients[: len(gradient.names)])
            del leaves, hidden, calls, gradients
        gradient.submit(weights)

    def _gradient(self, stop: int, expected: Sequence[str] | None = None) -> Gradient | None:
        """What gathers the gradients of a stop; None where nothing of it is updated."""
        if (self._updated | self._carried).isdisjoint(self._layout.stops[stop]):
            return None
        return Gradient(
            self._state, self._ranks, stop, expected, updated=self._updated, carried=self._carried
        )

    def _each(self, items: Iterable[_R]) -> Iterator[tuple[int, _R]]:
        """Number the items, one for each micro-batch, and trace the body of the loop over them."""
        for index, item in enumerate(items):
            with self.span(f"micro-batch {index}"):
                yield index, item

    def _each_block(self, phase: str, blocks: Iterable[int]) -> Iterator[int]:
        """Pass the blocks on, and trace the body of the loop over them."""
        for block in blocks:
            with self.span(f"{phase} block {block}"):
                yield block

    def _head_slices(
        self, index: int, weights: Sequence[StopWeights], gradients: Sequence[Gradient], *, training: bool
    ) -> Tensor:
        """Loss of one micro-batch; with ``training`` its hidden state gives way to the gradient with respect to it."""
        hidden, labels = self._hidden[index], self._micro_batches[index].shift_labels
        axis = self._partition.token_axis
        step = max(1, self._slice_tokens // labels.shape[0])
        total: Tensor | None = None
        of_hidden = []
        for start in range(0, labels.shape[1], step):
            part = slice(start, start + step)
            loss, of_part = self._head_slice(
                self._partition.tokens_of(hidden, part),
                labels[:, part],
                weights,
                gradients,
                training=training,
            )
            total = loss if total is None else total + loss
            if of_part is not None:
                of_hidden.append(of_part)
        if training:
            self._hidden[index] = of_hidden[0] if len(of_hidden) == 1 else torch.cat(of_hidden, dim=axis)
        if total is None:
            raise MegatrainIoError("a micro-batch without tokens")
        return total

    def _head_slice(
        self,
        hidden: Tensor,
        labels: Tensor,
        weights: Sequence[StopWeights],
        gradients: Sequence[Gradient],
        *,
        training: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of some tokens, and the gradient with respect to their hidden state.

        Nothing else outlives the call: the head's gradient is as large as the head, and must not meet the next slice's.
        """
        hidden = hidden.detach().requires_grad_(training)
        bound = {name: tensor for borrowed in weights for name, tensor in borrowed.tensors.items()}
        expected = [name for gradient in gradients for name in gradient.expected]
        unreached = self._unreached(bound) if training else ()
        leaves = leaves_of({name: bound[name] for name in (*expected, *unreached)})
        loss = self._partition.loss(self._as_trained(bound) | leaves, hidden, labels, self._divisor)
        if not training:
            return loss.detach(), None
        of_hidden, *of_leaves = torch.autograd.grad(loss, [hidden, *leaves.values()], allow_unused=True)
        by_name = dict(zip(leaves, of_leaves, strict=True))
        self._refuse_reached(by_name)
        for gradient in gradients:
            names = gradient.expected
            gradient.add(names, [by_name[name] for name in names])
        return loss.detach(), of_hidden

    def _block_backward(
        self, block: int, index: int, tensors: Mapping[str, Tensor], gradient: Gradient | None
    ) -> Tensor:
        """Gradient with respect to the block's input; those of its parameters are added to ``gradient``, if trained."""
        # The gradient of a block's output has the shape of its input.
        like = torch.empty(self._hidden[index].shape, dtype=self._input_dtypes[block], device="meta")
        saved = self._saved.get(block, index, like)
        hidden = saved.detach().requires_grad_()
        names = () if gradient is None else gradient.names
        leaves = leaves_of({name: tensors[name] for name in (*names, *self._unreached(tensors))})
        calls = self._calls[index]
        of_hidden, *of_leaves = self._sides[index].through_block(
            partial(self._partition.run_block, block, {**self._as_trained(tensors), **leaves}, hidden),
            calls[block],
            calls[block + 1] if block + 1 < len(calls) else None,
            [hidden, *leaves.values()],
            self._hidden[index],
        )
        if of_hidden is None:
            raise MegatrainIoError(f"no gradient reaches the input of block {block}")
        self._refuse_reached(dict(zip(leaves, of_leaves, strict=True)))
        if gradient is not None:
            gradient.add(names, of_leaves[: len(names)])
        return of_hidden

    def _as_trained(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights as they are in memory, where they require gradients unless all are frozen."""
        return {**tensors} if self._layout.is_frozen else self._partition.as_trained(tensors)

    def _unreached(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of ``names`` that no gradient reached when the model was probed: it is looked at that none does."""
        unreached = self._partition.unreached
        return tuple(name for name in names if name in unreached) if unreached else ()

    def _refuse_reached(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Refuse a gradient of what is not trained because none was thought to reach it."""
        for name in self._unreached(gradients):
            if gradients[name] is not None:
                raise UnsupportedModelError(
                    f"{self._partition.spec.model_type}: a gradient reaches parameter {name} in this step, and none "
                    "did in the small copy that the model was probed with: models in which that depends on the data "
                    "cannot be trained here yet"
                )

    def _seed(self, index: int, phase: Phase, block: int = 0) -> None:
        """Seed the generator for this step, micro-batch and block, so that the recomputation draws the same numbers."""
        text = f"{self._run_seed}/{self._number}/{index}/{_SEED_NAMES.get(phase, phase)}/{block}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        self._device.seed(seed)
