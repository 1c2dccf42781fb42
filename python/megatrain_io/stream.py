"""The step: a model that passes through RAM block by block, with the results of training in memory.

Layer-major: each block meets all micro-batches of the step before the next block is needed, so the bytes
moved do not depend on the number of micro-batches. Orders of summation are part of the result:

* the loss is the fp32 sum over micro-batches (and their slices) in order;
* a gradient is the fp32 sum of the native gradients of the micro-batches in order;
* a tied table sums the head's gradients of all micro-batches first, then the embedding's.
"""

import hashlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from megatrain_io.checkpoint import SavedInputs, SavedInputsBudget
from megatrain_io.errors import MegatrainIoError, TrainingDivergedError, UnsupportedModelError
from megatrain_io.gradient import Gradient, leaves_of
from megatrain_io.model import BlockCall, CutModel, MicroBatch
from megatrain_io.rehearsal import CANNOT_REHEARSE, Rehearsal
from megatrain_io.schedule import Phase, PoolSizes, Residents, build_schedule, pool_sizes
from megatrain_io.swap import AdamWStep, BorrowedRecord, CheckedSchedule, Engine, PagedState
from megatrain_io.trace import Trace
from megatrain_io.workspace import WorkspaceMeter

__all__ = ["IGNORED", "PagedModel", "StepLoss", "clear_frames", "model_parts", "trained_tokens"]

IGNORED = -100
"""Label of a token that is not trained."""

_LOGITS_BYTES = 128 << 20

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class StepLoss:
    """Mean loss over the trained tokens of all micro-batches (a float that is exact as fp32)."""

    loss: float
    trained_tokens: int


def model_parts(cut: CutModel) -> list[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]]:
    """Name and tensors of each record of a cut model, in the order of the parameter space.

    Raises:
        UnsupportedModelError: the architecture keeps some of its parameters from being trained.
    """
    if cut.frozen:
        raise UnsupportedModelError(
            f"{cut.facts.model_type}: {len(cut.frozen)} of its parameters are not trained, the first is "
            f"{min(cut.frozen)}; models with frozen parameters cannot be trained here yet"
        )
    parts = [("prologue", cut.prologue_parameters)]
    parts += [(f"block {index}", cut.block_parameters(index)) for index in range(len(cut.blocks))]
    if cut.epilogue_parameters:
        parts.append(("epilogue", cut.epilogue_parameters))
    return parts


def trained_tokens(micro_batches: Sequence[MicroBatch]) -> int:
    """Number of tokens with a label."""
    return sum(int((batch.shift_labels != IGNORED).sum()) for batch in micro_batches)


def clear_frames(error: BaseException | None) -> None:
    """Drop the locals of all frames that an error has left, and those that led to it."""
    cleared: set[int] = set()
    waiting = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and id(found) not in cleared:
            cleared.add(id(found))
            traceback.clear_frames(found.__traceback__)
            waiting += [found.__cause__, found.__context__]


class PagedModel:
    """A cut model over a paged state: training steps and losses.

    Args:
        cut: the model without its parameters.
        state: where they are.
        seed: of all random numbers of training (dropout).
        logits_bytes: bound on the fp32 logits of one slice of tokens. A micro-batch within it is one
            slice, and then every bit is that of stock training.
        saved_inputs: RAM for the inputs of blocks, and the file for what is beyond it; None = all in RAM.
        trace: gets a span for each step, phase, block and micro-batch.
    """

    def __init__(
        self,
        cut: CutModel,
        state: PagedState,
        *,
        seed: int = 0,
        logits_bytes: int = _LOGITS_BYTES,
        saved_inputs: SavedInputsBudget | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.cut = cut
        self.state = state
        self.seed = seed
        self._engine: Engine = "uring" if state.engine[0] == "uring" else "threads"
        self.saved = SavedInputs(state.ledger, saved_inputs, self._engine)
        self._trace = trace
        vocabulary = cut.config.get_text_config().vocab_size
        self.borrows_prologue = bool(cut.epilogue_borrowed)
        self.slice_tokens = max(1, logits_bytes // (4 * vocabulary))
        borrows = self.borrows_prologue
        self.training_schedule = build_schedule(state.layout, borrows_prologue=borrows, training=True)
        self.forward_schedule = build_schedule(state.layout, borrows_prologue=borrows, training=False)
        self._metered_size = (False, 0, 0)
        self._activations = 0
        self._training = state.check(self.training_schedule)
        self._forward = state.check(self.forward_schedule)

    def pool_sizes(
        self,
        *,
        training: bool,
        residents: Residents = Residents(),  # noqa: B008 - it never changes
        block_buffers: int = 3,
        chunk_slots: int = 4,
        block_gradients: int = 2,
    ) -> PoolSizes:
        """Sizes of a pool for this model; see ``schedule.pool_sizes``."""
        return pool_sizes(
            self.state.layout,
            borrows_prologue=self.borrows_prologue,
            training=training,
            residents=residents,
            block_buffers=block_buffers,
            chunk_slots=chunk_slots,
            block_gradients=block_gradients,
        )

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        adamw: AdamWStep,
        blob: Callable[[float], bytes] | None,
    ) -> StepLoss:
        """One optimizer step. With ``blob`` it is committed while the next step begins.

        Args:
            micro_batches: each goes through the model as a whole; at least one token must be trained.
            adamw: hyperparameters of the update.
            blob: makes the trainer's state after this step from the step's loss; None = the step becomes
                durable with the next commit.

        Raises:
            TrainingDivergedError: the loss is not finite. Nothing of the step remains.
            ConfigError, NoSpaceError: the inputs of its blocks do not fit the RAM that they may take, or the drive.
                Nothing was begun.
            CorruptionError: an input came back from the drive with other bytes. Nothing of the step remains.
        """
        self.cut.train()
        self.saved.reserve(self.state.layout.blocks, self.hidden_nbytes(micro_batches))
        with self._step(micro_batches, self._training, adamw, commits=blob is not None) as step:
            step.prologue()
            step.forward(saving=True)
            loss = step.epilogue(training=True)
            if not loss.isfinite():
                # Before anything is updated: nothing was written of this step.
                raise TrainingDivergedError(
                    f"the loss of step {adamw.step} is {loss.item()}. The step was dropped; the last committed step "
                    f"stands. Lower the learning rate (it was {adamw.learning_rate:g}) or look at the data of this "
                    "step"
                )
            step.leave_epilogue()
            step.backward()
            step.prologue_backward()
            self.state.end(None if blob is None else blob(loss.item()))
        return StepLoss(loss.item(), step.num_items)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> StepLoss:
        """The loss alone, without dropout; nothing is written."""
        self.cut.train(False)
        with self._step(micro_batches, self._forward, AdamWStep(1, 0.0), commits=False) as step:
            step.prologue()
            step.forward(saving=False)
            loss = step.epilogue(training=False)
            step.leave_epilogue()
            self.state.end(None)
        return StepLoss(loss.item(), step.num_items)

    def rehearse(self, micro_batches: Sequence[MicroBatch]) -> int | None:
        """Bytes of tensors that a training step needs at once, beside pool, residents and saved inputs.

        Nothing is read, and all but the masks is computed on shapes alone. None where the model's shapes
        depend on its data, so that only a real step can tell.
        """
        self.cut.train()
        rehearsal = Rehearsal(self.state.layout)
        step = _Step(self, micro_batches, 1, rehearsal)
        random_state = torch.get_rng_state()
        try:
            with rehearsal.prologue():
                step.prologue()
            with rehearsal.blocks():
                step.forward(saving=True)
                step.epilogue(training=True)
                step.leave_epilogue()
                step.backward()
        except CANNOT_REHEARSE:
            return None
        finally:
            torch.set_rng_state(random_state)
        return rehearsal.peak_nbytes

    def hidden_nbytes(self, micro_batches: Sequence[MicroBatch]) -> list[int]:
        """Bytes of the hidden state [B, T, H] of each micro-batch."""
        width = self.cut.config.get_text_config().hidden_size
        itemsize = 2 if self.state.layout.format == "bf16" else 4
        return [batch.input_ids.numel() * width * itemsize for batch in micro_batches]

    def limit_saved_inputs(self, budget: SavedInputsBudget) -> None:
        """Set how much RAM saved inputs may take, and where the rest goes; between steps."""
        self.saved.close()
        self.saved = SavedInputs(self.state.ledger, budget, self._engine)

    def close(self) -> None:
        """Give back what saved inputs take in RAM and on the drive. The state stays open."""
        self.saved.close()

    def span(self, name: str) -> AbstractContextManager[None]:
        """Trace what is done in the meantime, if there is a trace."""
        return nullcontext() if self._trace is None else self._trace.span(name)

    @contextmanager
    def _step(
        self,
        micro_batches: Sequence[MicroBatch],
        schedule: CheckedSchedule,
        adamw: AdamWStep,
        *,
        commits: bool,
    ) -> Iterator["_Step"]:
        step = _Step(self, micro_batches, adamw.step)
        random_state = torch.get_rng_state()
        self.state.begin(schedule, adamw, commits=commits)
        try:
            name = f"step {adamw.step}" if schedule is self._training else "evaluation"
            with self._metered(micro_batches, schedule), self.span(name):
                yield step
        except BaseException as error:
            # Tensors in the frames of the failed step would keep their buffers from the next one.
            clear_frames(error)
            try:
                self.state.abort()
            except MegatrainIoError as refused:
                # The first error is the one to tell; this says what became of the state.
                error.add_note(str(refused))
            raise
        finally:
            torch.set_rng_state(random_state)

    @contextmanager
    def _metered(self, micro_batches: Sequence[MicroBatch], schedule: CheckedSchedule) -> Iterator[None]:
        """Measure the RAM that compute needs whenever a step is larger than any before."""
        largest = max(batch.input_ids.numel() for batch in micro_batches)
        size = (schedule is self._training, largest, sum(batch.input_ids.numel() for batch in micro_batches))
        if size <= self._metered_size:
            yield
            return
        with WorkspaceMeter() as meter:
            yield
        self._metered_size = size
        self._activations = max(self._activations, meter.peak_nbytes)
        self.state.ledger.set("activations", self._activations)


def _phase(
    method: Callable[Concatenate["_Step", _P], _R],
) -> Callable[Concatenate["_Step", _P], _R]:
    """Trace a phase under its name."""

    @wraps(method)
    def traced(step: "_Step", /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with step.span(method.__name__):
            return method(step, *args, **kwargs)

    return traced


class _Step:
    """One pass over all micro-batches: the phases, in the order in which they are called."""

    def __init__(
        self,
        model: PagedModel,
        micro_batches: Sequence[MicroBatch],
        number: int,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self.num_items = trained_tokens(micro_batches)
        if self.num_items == 0:
            raise MegatrainIoError("no token of this step has a label: there is nothing to train or measure")
        self._model = model
        self.span = model.span if rehearsal is None else lambda _name: nullcontext()
        self._cut = model.cut
        self._state = rehearsal or model.state
        self._saved = rehearsal or model.saved
        self._layout = self._state.layout
        self._micro_batches = micro_batches
        self._number = number
        self._hidden: list[Tensor] = []
        self._calls: list[tuple[BlockCall, ...]] = []
        self._last_block: BorrowedRecord | None = None
        self._in_epilogue: list[tuple[BorrowedRecord, Gradient | None]] = []
        self._table_gradient: Gradient | None = None

    @_phase
    def prologue(self) -> None:
        """The first hidden state of every micro-batch, and the arguments of every block."""
        weights = self._state.weights(self._layout.prologue)
        with torch.no_grad():
            for index, micro_batch in self._each(self._micro_batches):
                self._seed(index, Phase.PROLOGUE)
                hidden, calls = self._cut.record(weights.tensors, micro_batch)
                self._hidden.append(hidden)
                self._calls.append(calls)
                del hidden, calls
        weights.give_back()

    @_phase
    def forward(self, *, saving: bool) -> None:
        """All blocks, first to last. The last one's weights stay for the backward pass."""
        last = self._layout.blocks - 1
        if saving:
            # Made before the step; this is for models whose hidden state has another size than they say.
            self._saved.reserve(self._layout.blocks, [hidden.nbytes for hidden in self._hidden])
        for block in self._each_block("forward", range(self._layout.blocks)):
            if saving:
                # All before any is computed: so their way to the drive has the time of this block, too.
                for index in range(len(self._hidden)):
                    self._saved.put(block, index, self._hidden[index])
                self._saved.finish(block)
            weights = self._state.weights(self._layout.block(block))
            with torch.no_grad():
                for index, calls in self._each(self._calls):
                    self._seed(index, Phase.FORWARD, block)
                    self._hidden[index] = self._cut.run_block(
                        block, weights.tensors, self._hidden[index], calls[block]
                    )
            if saving and block == last:
                self._last_block = weights
            else:
                weights.give_back()

    @_phase
    def epilogue(self, *, training: bool) -> Tensor:
        """The loss of the step; with ``training``, its gradients too, by micro-batch and slice."""
        layout = self._layout
        own = None if layout.epilogue is None else self._state.weights(layout.epilogue)
        table = self._state.weights(layout.prologue) if self._cut.epilogue_borrowed else None
        weights = [borrowed for borrowed in (own, table) if borrowed is not None]
        gradients = []
        if training and own is not None and layout.epilogue is not None:
            gradients.append(Gradient(self._state, layout.epilogue))
        if training and table is not None:
            self._table_gradient = Gradient(self._state, layout.prologue, self._cut.epilogue_borrowed)
            gradients.append(self._table_gradient)
        total: Tensor | None = None
        with torch.set_grad_enabled(training):
            for index, _ in self._each(self._micro_batches):
                self._seed(index, Phase.EPILOGUE)
                loss = self._epilogue_slices(index, weights, gradients)
                total = loss if total is None else total + loss
        if total is None:
            raise MegatrainIoError("a step needs at least one micro-batch")
        if own is not None:
            self._in_epilogue.append((own, gradients[0] if training else None))
        if table is not None:
            self._in_epilogue.append((table, None))
        return total

    def leave_epilogue(self) -> None:
        """Hand its own gradients over, and give back what was borrowed for it."""
        for weights, gradient in self._in_epilogue:
            if gradient is not None:
                gradient.submit(weights)
            else:
                weights.give_back()
        self._in_epilogue.clear()

    @_phase
    def backward(self) -> None:
        """All blocks, last to first: recompute, gradients, hand them over for the update."""
        weights = self._last_block
        self._last_block = None
        for block in self._each_block("backward", reversed(range(self._layout.blocks))):
            record = self._layout.block(block)
            weights = weights or self._state.weights(record)
            gradient = Gradient(self._state, record)
            for index, _ in self._each(self._micro_batches):
                self._seed(index, Phase.FORWARD, block)
                self._hidden[index] = self._block_backward(block, index, weights.tensors, gradient)
            self._saved.release(block)
            gradient.submit(weights)
            weights = None

    @_phase
    def prologue_backward(self) -> None:
        """Gradients of the prologue from those of the first hidden state."""
        weights = self._state.weights(self._layout.prologue)
        gradient = self._table_gradient or Gradient(self._state, self._layout.prologue)
        self._table_gradient = None
        for index, micro_batch in self._each(self._micro_batches):
            self._seed(index, Phase.PROLOGUE)
            leaves = leaves_of(weights.tensors)
            hidden, _ = self._cut.record(leaves, micro_batch)
            gradient.add(leaves, torch.autograd.grad(hidden, list(leaves.values()), self._hidden[index]))
            del leaves, hidden
        gradient.submit(weights)

    def _each(self, items: Iterable[_R]) -> Iterator[tuple[int, _R]]:
        """What there is one of for each micro-batch, counted; the body of the loop is traced."""
        for index, item in enumerate(items):
            with self.span(f"micro-batch {index}"):
                yield index, item

    def _each_block(self, phase: str, blocks: Iterable[int]) -> Iterator[int]:
        """The blocks; the body of the loop is traced."""
        for block in blocks:
            with self.span(f"{phase} block {block}"):
                yield block

    def _epilogue_slices(
        self, index: int, weights: Sequence[BorrowedRecord], gradients: Sequence[Gradient]
    ) -> Tensor:
        """Loss of one micro-batch; replaces its hidden state by the gradient, if gradients are wanted."""
        hidden, labels = self._hidden[index], self._micro_batches[index].shift_labels
        step = max(1, self._model.slice_tokens // hidden.shape[0])
        total: Tensor | None = None
        of_hidden = []
        for start in range(0, hidden.shape[1], step):
            part = hidden[:, start : start + step].detach()
            label = labels[:, start : start + step]
            bound = {name: tensor for borrowed in weights for name, tensor in borrowed.tensors.items()}
            wanted = {name: bound[name] for gradient in gradients for name in gradient.expected}
            leaves = leaves_of(wanted)
            part.requires_grad_(bool(gradients))
            loss = self._cut.loss(bound | leaves, part, label, self.num_items)
            if gradients:
                of_part, *of_leaves = torch.autograd.grad(loss, [part, *leaves.values()])
                of_hidden.append(of_part)
                by_name = dict(zip(leaves, of_leaves, strict=True))
                for gradient in gradients:
                    names = gradient.expected
                    gradient.add(names, [by_name[name] for name in names])
            total = loss.detach() if total is None else total + loss.detach()
        if gradients:
            self._hidden[index] = of_hidden[0] if len(of_hidden) == 1 else torch.cat(of_hidden, dim=1)
        if total is None:
            raise MegatrainIoError("a micro-batch without tokens")
        return total

    def _block_backward(
        self, block: int, index: int, tensors: Mapping[str, Tensor], gradient: Gradient
    ) -> Tensor:
        """Gradient of the block's input; those of its parameters are added to ``gradient``."""
        # The gradient of a block's output has the shape and dtype of its input.
        saved = self._saved.get(block, index, like=self._hidden[index])
        hidden = saved.detach().requires_grad_()
        leaves = leaves_of(tensors)
        out = self._cut.run_block(block, leaves, hidden, self._calls[index][block])
        of_hidden, *of_leaves = torch.autograd.grad(
            out, [hidden, *leaves.values()], self._hidden[index], allow_unused=True
        )
        gradient.add(leaves, of_leaves)
        return of_hidden

    def _seed(self, index: int, phase: Phase, block: int = 0) -> None:
        """One stream of random numbers for each (step, micro-batch, block): the recompute replays it."""
        text = f"{self._model.seed}/{self._number}/{index}/{phase}/{block}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        torch.default_generator.manual_seed(seed)
