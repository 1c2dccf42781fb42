"""The proof that a model can be partitioned: how it calls its blocks, and that block by block equals in memory.

The model in memory is called with a micro-batch as a whole; the partitioned one in parts. All losses and gradients
must agree to the bit.
"""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from megatrain_io.data.batch import IGNORE_INDEX, MicroBatch
from megatrain_io.models.meta_model import module_lists
from megatrain_io.models.partition import PartitionedModel, PartitionSpec
from megatrain_io.models.side_inputs import (
    HANDED,
    BlockCall,
    SideGradients,
    SideInputs,
    mappings_of,
    side_inputs_of,
)

__all__ = [
    "CannotBePartitionedError",
    "InMemoryLoss",
    "Observation",
    "RefusedError",
    "are_alike",
    "find_unreached",
    "noisy",
    "observe",
    "prove",
    "random_tokens",
    "refuse_unless_positions_are_alone",
]

InMemoryLoss = Callable[[MicroBatch, int], Tensor]
"""``loss(micro_batch, num_items)``: of the model in memory, the sum of the token losses divided by ``num_items``."""

# Relative change of a score: rounding makes less of a token out of sight, a token in sight makes more.
_IN_SIGHT = 1e-4

# Of hidden states, as far as models are known.
_AXES = ("BTH", "TBH", "ABTH", "BTAH")


class RefusedError(Exception):
    """Says why a model is refused; who catches it puts its name in front."""


class CannotBePartitionedError(RefusedError):
    """Says why its blocks cannot run one by one; who catches it says what to do besides."""


@dataclass(frozen=True)
class Observation:
    """How a model calls its blocks.

    Attributes:
        output_entries: None where blocks return the hidden state, else the length of their tuple.
        embedding: names of the parameters that the first hidden state and side inputs depend on.
        head: names of the parameters that the loss depends on behind the last block.
        unused: names of the parameters outside the blocks that the loss does not depend on.
        kept: attributes of blocks, by dotted path, in which they keep tensors from call to call.
        sides: what blocks take besides the hidden state, and that carries gradient.
        axes: of the hidden state: B sequences, T tokens, H entries, and A where it is several.
        shares: whether several blocks have parameters in common.
        skipped: numbers of the blocks that a text does not pass.
    """

    output_entries: int | None
    embedding: frozenset[str]
    head: frozenset[str]
    unused: tuple[str, ...]
    kept: frozenset[str]
    sides: SideInputs
    axes: str
    shares: bool
    skipped: frozenset[int]


def random_tokens(vocabulary: int, batch: int, tokens: int) -> MicroBatch:
    """A text [batch, tokens] of tokens below ``vocabulary``; those of the first third are not trained."""
    text = torch.randint(1, vocabulary, (batch, tokens))
    shift_labels = torch.cat([text[:, 1:], torch.full((batch, 1), IGNORE_INDEX)], dim=1)
    shift_labels[:, : tokens // 3] = IGNORE_INDEX
    return MicroBatch(text, shift_labels)


def noisy(parameter: Tensor) -> Tensor:
    """A parameter with noise: initial weights hide mistakes (biases of zero, norms of one, attention that is even)."""
    return parameter.add(torch.randn_like(parameter), alpha=0.05)


def are_alike(some: Tensor, others: Tensor) -> bool:
    """Whether scores differ by no more than rounding."""
    return bool((some - others).abs().max() < _IN_SIGHT * some.abs().max())


def observe(stock: nn.Module, micro_batch: MicroBatch, block_list: str, loss_of: InMemoryLoss) -> Observation:
    """Watch a model in memory call its blocks.

    Args:
        stock: the model.
        micro_batch: that it is called with.
        block_list: name of the module list of its blocks.
        loss_of: its loss.

    Raises:
        RefusedError: it has no such list, or its blocks cannot be run one by one.
    """
    try:
        blocks = list(cast("nn.ModuleList", stock.get_submodule(block_list)))
    except (AttributeError, TypeError):
        there = ", ".join(module_lists(stock)) or "none"
        raise RefusedError(
            f"it has no module list {block_list} (model_options.block_list): it has {there}"
        ) from None
    resident = {
        name: parameter
        for name, parameter in stock.named_parameters()
        if not name.startswith(f"{block_list}.")
    }
    frozen = [parameter for parameter in resident.values() if not parameter.requires_grad]
    witness = _Witness(len(blocks))
    saved = {name: buffer.clone() for name, buffer in _saved_buffers(stock).items()}
    with ExitStack() as undo:
        for parameter in frozen:
            parameter.requires_grad_()
            undo.callback(parameter.requires_grad_, False)
        for index, block in enumerate(blocks):
            before, after = partial(witness.before, index), partial(witness.after, index)
            undo.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(block.register_forward_hook(after, with_kwargs=True).remove)
        loss = loss_of(micro_batch, 1)
        for name, buffer in _saved_buffers(stock).items():
            if not torch.equal(buffer, saved[name]):
                raise CannotBePartitionedError(
                    f"its forward pass changes buffer {name}, and the state of a run keeps parameters alone"
                )
        skipped = frozenset(range(len(blocks) - 1)).difference(witness.called)
        if witness.called != [index for index in range(len(blocks)) if index not in skipped]:
            raise CannotBePartitionedError(
                f"its forward pass calls the blocks of {block_list} in the order {witness.called}"
            )
        if _gradients(loss, witness.first_hidden, retain_graph=True)[0] is not None:
            raise CannotBePartitionedError("what enters its first block is used behind the last one, too")
        witness.refuse_sides_of_blocks()
        sides = [tensor for _, _, tensor in witness.sides]
        if sides and any(each is not None for each in _gradients(loss, sides, retain_graph=True)):
            raise CannotBePartitionedError("what enters its blocks is used behind the last one, too")
        embedding, head = _used([*witness.first_hidden, *sides], resident), _used([loss], resident)
    if len(witness.output_entries) != 1:
        raise CannotBePartitionedError(
            "its blocks return now a tensor, now a tuple, or tuples of two lengths"
        )
    return Observation(
        output_entries=witness.output_entries.pop(),
        embedding=embedding,
        head=head,
        unused=tuple(name for name in resident if name not in embedding | head),
        kept=frozenset(witness.kept),
        sides=SideInputs(frozenset(path for _, path, _ in witness.sides), frozenset(witness.mappings)),
        axes=_axes(witness.first_hidden[0], micro_batch),
        shares=_share(blocks),
        skipped=skipped,
    )


def _axes(hidden: Tensor, micro_batch: MicroBatch) -> str:
    """What the dimensions of a hidden state are, of a text that has not as many tokens as rows."""
    sizes = dict(zip("BT", micro_batch.input_ids.shape, strict=True))
    for axes in _AXES:
        if len(axes) == hidden.dim() and all(hidden.shape[axes.index(axis)] == sizes[axis] for axis in "BT"):
            return axes
    raise CannotBePartitionedError(
        f"for tokens {list(micro_batch.input_ids.shape)} what enters its first block has the shape {list(hidden.shape)}"
    )


def _share(blocks: Sequence[nn.Module]) -> bool:
    """Whether several blocks have parameters in common."""
    counts = Counter(id(parameter) for block in blocks for parameter in block.parameters())
    return any(count > 1 for count in counts.values())


def _saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are saved with a model: others are made anew by its constructor."""
    saved = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


@dataclass
class _Witness:
    """Hooks that note how blocks are called, and cut the graph behind the last one."""

    count: int
    called: list[int] = field(default_factory=list)
    first_hidden: list[Tensor] = field(default_factory=list)
    output_entries: set[int | None] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    # Block, path among its arguments, and tensor of each side input.
    sides: list[tuple[int, str, Tensor]] = field(default_factory=list)
    mappings: set[str] = field(default_factory=set)
    outputs: list[Tensor] = field(default_factory=list)
    # What blocks returned besides, all alive, so that no other tensor gets its ``id``.
    _returned: list[Tensor] = field(default_factory=list)
    _in_mappings: dict[str, list[int]] = field(default_factory=dict)
    _held: dict[str, list[int]] = field(default_factory=dict)

    def before(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = tree_leaves((args, kwargs))[0]
        if not self.called:
            self.first_hidden.append(hidden)
        self.called.append(index)
        self._held = _held_tensors(block)
        named = {name: value for name, value in kwargs.items() if value is not hidden}
        others = (args[1:], {name: value for name, value in named.items() if name not in mappings_of(named)})
        for path, leaf in tree_flatten_with_path(others)[0]:
            if any(leaf is returned for returned in self._returned):
                self.mappings.add(HANDED)
            elif isinstance(leaf, Tensor) and leaf.requires_grad:
                self.sides.append((index, keystr(path), leaf))
        self._in_mappings = _ids_in_mappings(named)

    def refuse_sides_of_blocks(self) -> None:
        """Refuse what a block hands to a later one by the model's own code."""
        for taker, path, tensor in self.sides:
            reached = (
                _gradients([tensor], self.outputs[:taker], [torch.ones_like(tensor)], retain_graph=True)
                if taker
                else ()
            )
            for maker, gradient in enumerate(reached):
                if gradient is not None:
                    raise CannotBePartitionedError(
                        f"block {taker} takes an input ({path}) besides the hidden state that carries gradient to "
                        f"block {maker}"
                    )

    def after(  # as torch calls a hook
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> object:
        del args
        for name, ids in _ids_in_mappings(kwargs).items():
            if ids != self._in_mappings.get(name):
                self.mappings.add(name)
        self.kept |= {name for name, held in _held_tensors(block).items() if held != self._held.get(name, [])}
        is_tuple = isinstance(output, tuple | list)
        self.output_entries.add(len(output) if is_tuple else None)
        self.outputs.append(output[0] if is_tuple else output)
        self._returned += [each for each in output[1:] if isinstance(each, Tensor)] if is_tuple else []
        if index < self.count - 1:
            return output
        return (output[0].detach(), *output[1:]) if is_tuple else output.detach()


def _ids_in_mappings(kwargs: Mapping[str, object]) -> dict[str, list[int]]:
    """The tensors in each keyword argument in which a block may leave something for others."""
    return {
        name: [id(leaf) for leaf in tree_leaves(list(mapping.values())) if isinstance(leaf, Tensor)]
        for name, mapping in mappings_of(kwargs).items()
    }


# What torch itself keeps in a module; parameters and buffers are looked at elsewhere.
_OF_TORCH = frozenset(vars(nn.Module()))


def _held_tensors(block: nn.Module) -> dict[str, list[int]]:
    """The tensors in each attribute of a block and of what is in it, by dotted path."""
    held = {
        f"{name}.{attribute}".removeprefix("."): [
            id(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)
        ]
        for name, module in block.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in _OF_TORCH
    }
    return {name: tensors for name, tensors in held.items() if tensors}


def _used(outputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the parameters that the outputs depend on."""
    ones = [torch.ones_like(output) for output in outputs]
    gradients = _gradients(outputs, list(parameters.values()), ones)
    return frozenset(
        name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None
    )


def _gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Any = None,
    *,
    retain_graph: bool | None = None,
) -> tuple[Tensor | None, ...]:
    """What `torch.autograd.grad` returns, with None for inputs that are not used, which it does not declare."""
    return torch.autograd.grad(outputs, inputs, grad_outputs, retain_graph=retain_graph, allow_unused=True)


def find_unreached(
    stock: nn.Module,
    micro_batches: Sequence[MicroBatch],
    block_list: str,
    loss_of: InMemoryLoss,
    skipped: Collection[int] = (),
) -> frozenset[str]:
    """Names of trained parameters that no gradient reaches; of those in blocks the name that each has in its block.

    Args:
        stock: the model in memory.
        micro_batches: that it is called with.
        block_list: name of the module list of its blocks.
        loss_of: its loss.
        skipped: numbers of blocks that are not looked at, as none of theirs is reached.

    Raises:
        RefusedError: a gradient reaches a parameter in one block, and in another block none.
    """
    left_out = tuple(f"{block_list}.{index}." for index in skipped)
    parameters = {
        name: p for name, p in stock.named_parameters() if p.requires_grad and not name.startswith(left_out)
    }
    reached: set[str] = set()
    for micro_batch in micro_batches:
        gradients = _gradients(loss_of(micro_batch, 1), list(parameters.values()))
        reached |= {name for name, grad in zip(parameters, gradients, strict=True) if grad is not None}

    def in_block(name: str) -> str:
        inside = name.removeprefix(f"{block_list}.")
        return name if inside == name else inside.partition(".")[2]

    unreached = {in_block(name): name for name in parameters if name not in reached}
    for name in reached:
        if (other := unreached.get(in_block(name))) is not None:
            raise RefusedError(
                f"no gradient reaches parameter {other}, while one reaches {name}: models in which blocks differ so "
                "cannot be trained here yet"
            )
    return frozenset(unreached)


def prove(
    stock: nn.Module,
    spec: PartitionSpec,
    partitioned: Callable[[PartitionSpec], PartitionedModel],
    micro_batches: Sequence[MicroBatch],
    loss_of: InMemoryLoss,
) -> tuple[PartitionSpec, PartitionedModel]:
    """Compare losses and gradients in memory and block by block, if need be with a graph in the forward pass.

    Args:
        stock: the model in memory.
        spec: how it is partitioned.
        partitioned: makes the same model without its parameters.
        micro_batches: of one step.
        loss_of: the loss of the model in memory.

    Returns:
        The specification that was proved, and its model.

    Raises:
        RefusedError: a bit differs.
    """
    partition = partitioned(spec)
    try:
        _refuse_unless_equal(stock, partition, micro_batches, loss_of)
    except CannotBePartitionedError:
        if spec.sides:
            raise  # what blocks leave for others would keep the graphs
        with_graph = replace(spec, forward_grad=True)
        partition = partitioned(with_graph)
        with suppress(RefusedError):
            _refuse_unless_equal(stock, partition, micro_batches, loss_of)
            return with_graph, partition
        raise
    return spec, partition


def _refuse_unless_equal(
    stock: nn.Module,
    partition: PartitionedModel,
    micro_batches: Sequence[MicroBatch],
    loss_of: InMemoryLoss,
) -> None:
    """Compare losses and gradients of a model in memory and block by block.

    Raises:
        RefusedError: a bit differs.
    """
    trained = {
        name: parameter for name, parameter in stock.named_parameters() if name not in partition.frozen
    }
    items = sum(int((micro_batch.shift_labels != IGNORE_INDEX).sum()) for micro_batch in micro_batches)
    leaves = {name: parameter.detach() for name, parameter in stock.named_parameters()}
    for name in trained:
        leaves[name].requires_grad_()
    passes = _layer_major(partition, leaves, micro_batches, items)
    for micro_batch, own in zip(micro_batches, passes, strict=True):
        loss = loss_of(micro_batch, items)
        if not torch.equal(own.loss, loss):
            raise CannotBePartitionedError(f"block by block its loss is {own.loss}, not {loss} as in memory")
        gradients = _gradients(loss, list(trained.values()))
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is None:
                raise RefusedError(
                    f"a gradient reaches parameter {name} in some micro-batches and not in others, and such models "
                    "cannot be trained here yet"
                )
            if name not in own.gradients or not torch.equal(own.gradients[name], gradient):
                raise CannotBePartitionedError(f"block by block the gradient of {name} is not as in memory")
    _refuse_kept_weights(partition, leaves, micro_batches[0])


@torch.no_grad()
def refuse_unless_positions_are_alone(
    partition: PartitionedModel, parameters: Mapping[str, Tensor], micro_batch: MicroBatch
) -> None:
    """Refuse a head whose scores of a token depend on other tokens: it gets them slice by slice.

    Args:
        partition: the model without its parameters.
        parameters: all of them, by name.
        micro_batch: of four tokens a row, at least.

    Raises:
        RefusedError: they do.
    """
    hidden, part = torch.randn_like(partition.record(parameters, micro_batch)[0]), slice(2, 4)
    of_all = partition.logits(parameters, hidden)[:, part]
    of_part = partition.logits(parameters, partition.tokens_of(hidden, part))
    if of_all.shape != of_part.shape or not are_alike(of_all, of_part):
        raise RefusedError(
            "behind its blocks scores of one token depend on others: each position must have its own, as long texts "
            "pass there in slices"
        )


def _refuse_kept_weights(
    partition: PartitionedModel, leaves: Mapping[str, Tensor], micro_batch: MicroBatch
) -> None:
    """Refuse blocks that hold their weights behind a call: the memory of these is needed for the next block's."""
    with torch.no_grad():
        hidden, calls = partition.record(leaves, micro_batch)
    weights = {leaf.untyped_storage().data_ptr(): name for name, leaf in leaves.items()}
    for side in side_inputs_of(calls):
        if name := weights.get(side.untyped_storage().data_ptr()):
            raise CannotBePartitionedError(
                f"its blocks take {name} itself, which is no parameter of theirs: its memory is needed before they run"
            )
    for index, shared in enumerate(calls):
        call = shared.as_now()
        own = {name: leaves[name].detach().clone() for name, _ in partition.block_parameters(index)}
        own = partition.as_trained(own)
        lives = {name: weakref.ref(tensor) for name, tensor in own.items()}
        before = hidden
        entering = hidden.detach().requires_grad_()
        output = partition.run_block(index, own, entering, call)
        _gradients(output, [entering], torch.ones_like(output))
        hidden = output.detach()
        del call, output, entering
        own.clear()
        if any(live() is not None for live in lives.values()):
            gc.collect()
        if index < len(calls) - 1 and partition.spec.sides.mappings:
            with torch.no_grad():
                partition.run_block(index, leaves, before, shared)
        if held := [name for name, live in lives.items() if live() is not None]:
            raise CannotBePartitionedError(
                f"block {index} keeps tensors that hold {held[0]} behind its call, where the memory of its weights is "
                "needed for those of the next block"
            )


@dataclass
class _Pass:
    """One micro-batch on its way: gradients are not summed over micro-batches, so orders do not matter."""

    calls: list[BlockCall]
    hiddens: list[Tensor]
    sides: SideGradients
    loss: Tensor = field(init=False)
    grad_hidden: Tensor | None = field(init=False)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def add(self, names: Sequence[str], gradients: Sequence[Tensor | None]) -> None:
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                before = self.gradients.get(name)
                self.gradients[name] = gradient if before is None else before + gradient


def _layer_major(
    partition: PartitionedModel, leaves: Mapping[str, Tensor], micro_batches: Sequence[MicroBatch], items: int
) -> list[_Pass]:
    """Forward and backward through the partitioned model, all micro-batches through one block before the next."""
    passes = []
    trained = partition.as_trained(leaves)
    with torch.no_grad():
        for micro_batch in micro_batches:
            hidden, calls = partition.record(trained, micro_batch)
            passes.append(_Pass(list(calls), [hidden], SideGradients(side_inputs_of(calls))))
        for index in range(len(partition.blocks)):
            for each in passes:
                call = each.calls[index]
                each.calls[index] = call.as_now()
                each.hiddens.append(
                    partition.run_block_forward(index, trained, each.hiddens[-1], call, training=True)
                )
    names = [name for name, _ in partition.head_parameters] + list(partition.tied_parameters)
    names = [name for name in names if leaves[name].requires_grad]
    for each, micro_batch in zip(passes, micro_batches, strict=True):
        hidden = each.hiddens.pop().requires_grad_()
        loss = partition.loss(leaves, hidden, micro_batch.shift_labels, items)
        each.grad_hidden, *gradients = _gradients(loss, [hidden, *(leaves[name] for name in names)])
        each.loss = loss.detach()
        each.add(names, gradients)
    for index in reversed(range(len(partition.blocks))):
        names = [name for name, _ in partition.block_parameters(index) if leaves[name].requires_grad]
        for each in passes:
            hidden = each.hiddens.pop().requires_grad_()
            inputs = [hidden, *(leaves[name] for name in names)]
            if each.grad_hidden is None:
                raise CannotBePartitionedError(f"no gradient comes to block {index} from behind it")
            each.grad_hidden, *gradients = each.sides.through_block(
                partial(partition.run_block, index, leaves, hidden),
                each.calls[index],
                each.calls[index + 1] if index + 1 < len(each.calls) else None,
                inputs,
                each.grad_hidden,
            )
            each.add(names, gradients)
    names = [name for name, _ in partition.embedding_parameters if leaves[name].requires_grad]
    for each, micro_batch in zip(passes, micro_batches, strict=True):
        hidden, again = partition.record(leaves, micro_batch)
        if each.grad_hidden is None:
            raise CannotBePartitionedError("no gradient comes to what enters its first block")
        inputs = [leaves[name] for name in names]
        each.add(names, each.sides.through_embedding(hidden, again, inputs, each.grad_hidden))
    return passes
