"""Side inputs: tensors that blocks take besides the hidden state, and that carry gradient.

The embedding makes them (per-layer inputs), or a block leaves them in a mapping that later blocks read (keys and values
that several blocks share), or they are parameters that several blocks have in common. The gradient of one passes
through the blocks that take it, last to first, and each adds to it what autograd adds in the order of autograd: so the
sum has the bits that it has in memory.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map, tree_map_with_path

__all__ = [
    "HANDED",
    "NO_SIDE_INPUTS",
    "BlockCall",
    "Handed",
    "SideGradients",
    "SideInputs",
    "mappings_of",
    "side_inputs_of",
]

HANDED = "handed on by blocks"
"""Name of the mapping that takes what blocks return besides the hidden state, where later ones are given that."""


@dataclass(frozen=True)
class Handed:
    """Stands among the arguments of a block for entry ``entry`` of what block ``block`` returned."""

    block: int
    entry: int


@dataclass(frozen=True)
class SideInputs:
    """Where side inputs are among the arguments of blocks.

    Attributes:
        arguments: paths of those that the embedding makes, in ``(args, kwargs)`` less the hidden state.
        mappings: names of the keyword arguments in which blocks leave tensors for later blocks; ``HANDED`` where these
            are further entries of what they return.
    """

    arguments: frozenset[str] = frozenset()
    mappings: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.arguments or self.mappings)


NO_SIDE_INPUTS = SideInputs()


@dataclass(frozen=True, eq=False)
class BlockCall:
    """What the model's `forward` hands to one block besides the hidden state.

    Masks, rotary tables, the cache and the mappings in which blocks leave tensors are shared between the calls of one
    recording. ``generates`` says that there is a cache: then what blocks keep from call to call belongs to the text
    that is generated. ``sides`` says which of all that carries gradient. ``shared`` has the parameters that the block
    has in common with others, by their names in it. ``is_skipped`` says that `forward` leaves the block out.
    """

    args: tuple[object, ...]
    kwargs: dict[str, object]
    generates: bool = False
    sides: SideInputs = NO_SIDE_INPUTS
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    is_skipped: bool = False

    def as_now(self) -> "BlockCall":
        """The same with mappings of its own, in which is what earlier blocks have left until now."""
        return self._with({name: copy.copy(value) for name, value in self._mappings()})

    def tensors(self) -> list[Tensor]:
        """The side inputs, each once, in the order of the arguments."""
        found = list(side_inputs_of((self,)))
        for _, mapping in self._mappings():
            found += [leaf for leaf in tree_leaves(list(mapping.values())) if _carries(leaf)]
        return list({id(tensor): tensor for tensor in found}.values())

    def exchanged(self, tensors: Mapping[int, Tensor]) -> "BlockCall":
        """The same with mappings of its own, and other tensors in place of side inputs, by their ``id``."""

        def other(path: tuple[Any, ...], leaf: object) -> object:
            return tensors.get(id(leaf), leaf) if keystr(path) in self.sides.arguments else leaf

        args, kwargs = tree_map_with_path(other, (self.args, self.kwargs))
        shared = {name: tensors.get(id(tensor), tensor) for name, tensor in self.shared.items()}
        mappings = {}
        for name, mapping in self._mappings():
            mappings[name] = copy.copy(mapping)
            for key, value in mapping.items():
                mappings[name][key] = tree_map(lambda leaf: tensors.get(id(leaf), leaf), value)
        return replace(self, args=args, kwargs={**kwargs, **mappings}, shared=shared)

    def left_since(self, before: "BlockCall") -> list[object]:
        """What was left in the mappings after ``before`` was noted, in their order."""
        earlier = dict(before._mappings())  # noqa: SLF001 - of the same class
        left: list[object] = []
        for name, mapping in self._mappings():
            known = {id(leaf) for leaf in tree_leaves(list(earlier[name].values()))}
            left += [leaf for leaf in tree_leaves(list(mapping.values())) if id(leaf) not in known]
        return left

    def _mappings(self) -> Iterator[tuple[str, MutableMapping[Any, Any]]]:
        for name, mapping in mappings_of(self.kwargs).items():
            if name in self.sides.mappings:
                yield name, mapping

    def _with(self, mappings: dict[str, MutableMapping[Any, Any]]) -> "BlockCall":
        return replace(self, kwargs={**self.kwargs, **mappings}) if mappings else self


def mappings_of(kwargs: Mapping[str, object]) -> dict[str, MutableMapping[Any, Any]]:
    """The keyword arguments in which a block may leave something for others."""
    return {name: value for name, value in kwargs.items() if isinstance(value, MutableMapping)}


def side_inputs_of(calls: Sequence[BlockCall]) -> list[Tensor]:
    """The side inputs that the embedding makes for some blocks, each once, in the order of the blocks."""
    found: dict[int, Tensor] = {}
    for call in calls:
        if call.sides.arguments:
            for path, leaf in tree_flatten_with_path((call.args, call.kwargs))[0]:
                if keystr(path) in call.sides.arguments and _carries(leaf):
                    found[id(leaf)] = leaf
        found |= {id(tensor): tensor for tensor in call.shared.values()}
    return list(found.values())


def _carries(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@dataclass
class SideGradients:
    """Gradients of one micro-batch's side inputs, on their way back to what made them.

    Attributes:
        made: the side inputs that the embedding made, in the order of ``side_inputs_of``.
    """

    made: list[Tensor] = field(default_factory=list)
    _of: dict[int, Tensor] = field(default_factory=dict)

    def through_block(
        self,
        run: Callable[[BlockCall], Tensor],
        call: BlockCall,
        after: BlockCall | None,
        inputs: Sequence[Tensor],
        of_output: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Recompute a block and pass gradients back through it.

        Args:
            run: the block, on ``inputs``; what it leaves for others goes into the mappings of its argument.
            call: as it was when the block ran forward.
            after: as it was for the next block; None for the last one.
            inputs: whose gradients are returned; None for one that is not used.
            of_output: gradient of what it returns.
        """
        has_sides = bool(call.sides or call.shared)
        taken = call.tensors() if has_sides else []
        leaves = [tensor.detach().requires_grad_() for tensor in taken]
        # Not leaves: a gradient that comes from later blocks is the first one of autograd's own sum.
        passing = [leaf.view_as(leaf) for leaf in leaves]
        before = (
            call.exchanged({id(t): each for t, each in zip(taken, passing, strict=True)})
            if has_sides
            else call
        )
        entered = before.as_now()
        outputs, gradients = [run(entered)], [of_output]
        ends = list(zip(taken, passing, strict=True))
        if after is not None and call.sides.mappings:
            ends += cast(
                "list[tuple[Tensor, Tensor]]",
                list(zip(after.left_since(call), entered.left_since(before), strict=True)),
            )
        for kept, end in ends:
            of_side = self._of.pop(id(kept), None)
            if of_side is not None:
                outputs.append(end)
                gradients.append(of_side)
        found = torch.autograd.grad(outputs, [*inputs, *leaves], gradients, allow_unused=True)
        for kept, gradient in zip(taken, found[len(inputs) :], strict=True):
            if gradient is not None:
                self._of[id(kept)] = gradient
        return found[: len(inputs)]

    def through_embedding(
        self,
        hidden: Tensor,
        calls: Sequence[BlockCall],
        inputs: Sequence[Tensor],
        of_hidden: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Pass gradients back through the embedding, recomputed with grad: ``hidden`` and ``calls`` are its outputs.

        Returns:
            Those of ``inputs``; None for one that is not used.
        """
        outputs, gradients = [hidden], [of_hidden]
        for kept, end in zip(self.made, side_inputs_of(calls), strict=True):
            of_side = self._of.pop(id(kept), None)
            if of_side is not None and end.requires_grad:  # not where it is of what is not trained
                outputs.append(end)
                gradients.append(of_side)
        # What is made of nothing that is trained leads to none of the inputs, and autograd refuses to begin there.
        ends = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        if not ends:
            return (None,) * len(inputs)
        return torch.autograd.grad(
            [end for end, _ in ends], inputs, [each for _, each in ends], allow_unused=True
        )
