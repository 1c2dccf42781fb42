"""Names and places: which tensors of a checkpoint make up which parameters of the model.

Checkpoints and models do not agree on names, nor on what is one tensor: a mixture of experts is one tensor
for each expert in the files and one for all in memory. transformers knows the rules; this module alone asks
it for them (they are not a public interface), and turns each into boxes: a tensor of the files is a box in a
tensor of the model, so either can be read or written in pieces of any size.
"""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NoReturn, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from megatrain_io.errors import ModelFilesError, UnsupportedModelError
from megatrain_io.models.meta_model import build_meta_model

__all__ = ["HubNames", "NamePlan", "Piece"]

Shape = tuple[int, ...]

_NAMED_AT_MOST = 3
_WITHOUT = (
    "Save the model inside it, {}.save_pretrained(OUT), or rename the tensors to what is left without {}; then import "
    "that"
)
# Marks in names of tensors: what left them there, and what to do.
_WRAPPERS = {
    "_orig_mod.": ("from a model wrapped by torch.compile", _WITHOUT.format("model._orig_mod", "_orig_mod.")),
    "_fsdp_wrapped_module.": (
        "from a model wrapped by FSDP",
        "Gather its full state, rename the tensors to what is left without _fsdp_wrapped_module.; then import that",
    ),
    "_checkpoint_wrapped_module.": (
        "from a model whose blocks are wrapped for activation checkpointing",
        "Rename the tensors to what is left without _checkpoint_wrapped_module.; then import that",
    ),
    "_forward_module.": (
        "from a model wrapped by Lightning",
        _WITHOUT.format("model._forward_module", "_forward_module."),
    ),
    "lora_": (
        "with the adapter beside the model",
        "Merge it first (peft: merge_and_unload), save that with save_pretrained(OUT), and import OUT",
    ),
    "base_model.model.": (
        "from a model wrapped by peft",
        "Merge the adapter (merge_and_unload), save that with save_pretrained(OUT), and import OUT",
    ),
    "module.": (
        "from a model wrapped by DistributedDataParallel, DataParallel or DeepSpeed",
        _WITHOUT.format("model.module", "module."),
    ),
    "v_head.": (
        "with a value head, as reinforcement learning adds one",
        "Save the model without it (trl: model.pretrained_model.save_pretrained(OUT)) and import OUT",
    ),
    "value_head.": (
        "with a value head",
        "Save the model without it and import that: a value head is not trained here",
    ),
    "score.": (
        "with a head that classifies, such as that of a reward model",
        "Import a causal language model: such a head is not trained here",
    ),
    "classifier.": (
        "with a head that classifies",
        "Import a causal language model: such a head is not trained here",
    ),
}
# Tables of positions and masks, as older versions of transformers saved them.
_DERIVED = re.compile(r"(^|\.)(inv_freq|position_ids|((attn|attention)\.(masked_)?bias))$")
# The projection that is in each layer that predicts further tokens, and in no other.
_NEXT_TOKEN_LAYER = re.compile(r"((?:.*\.)?layers\.\d+\.)eh_proj\.weight")
# So many are always looked at, whatever the model, to say which are wrong.
_TENSORS_LEAST = 4096


@dataclass(frozen=True)
class Piece:
    """A tensor of the files as a box in a tensor of the model; both are read row by row.

    Attributes:
        name: of the tensor in the files.
        shape: of the model's tensor.
        start: of the box, in each dimension.
        size: of the box; it has as many elements as the tensor in the files, in the same order.
    """

    name: str
    shape: Shape
    start: Shape
    size: Shape

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """What of the box lies within elements ``start``..``stop`` of the model's tensor.

        Yields:
            ``(place, source, count)``: so many elements lie from ``place`` on in the model's tensor and from
            ``source`` on in the files' tensor.
        """
        run, count = self._run, prod(self.size) // self._run
        # Runs lie in the same order in both tensors.
        for number in range(bisect_right(range(count), start - run, key=self._place), count):
            place = self._place(number)
            begin, end = max(start, place), min(stop, place + run)
            if begin >= end:
                return
            yield begin, number * run + begin - place, end - begin

    @cached_property
    def _outer(self) -> int:
        """Number of dimensions that interrupt a run: all before the last one that the box does not fill."""
        axis = len(self.shape) - 1
        while axis > 0 and self.size[axis] == self.shape[axis]:
            axis -= 1
        return max(axis, 0)

    @cached_property
    def _run(self) -> int:
        """Elements that lie together in the model's tensor, as they do in the files'."""
        return prod(self.size[self._outer :])

    def _place(self, number: int) -> int:
        """Element of the model's tensor at which a run begins."""
        place = 0
        for axis in reversed(range(len(self.shape))):
            at = self.start[axis]
            if axis < self._outer:
                number, index = divmod(number, self.size[axis])
                at += index
            place += at * prod(self.shape[axis + 1 :])
        return place


@dataclass(frozen=True)
class NamePlan:
    """Where everything in the files belongs.

    Attributes:
        parameters: the pieces of each parameter of the model; together they cover it exactly.
        aliases: (parameter, pieces) of tied weights that are in the files a second time.
        buffers: name in the files -> persistent buffer of the model.
        carried: tensors of the files that the model does not compute with, in the order of the files.
        derived: tensors of the files that the model makes anew, so that nobody needs them.
    """

    parameters: Mapping[str, tuple[Piece, ...]]
    aliases: Sequence[tuple[str, tuple[Piece, ...]]]
    buffers: Mapping[str, str]
    carried: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Virtual:
    """A tensor that is put together from tensors of the files, without any data."""

    shape: Shape
    boxes: tuple[tuple[str, Shape, Shape], ...]  # name, start, size


@dataclass(frozen=True)
class _Others:
    """Names of the files that are not of a tensor that is computed with.

    Attributes:
        unknown: they fit nowhere.
        ignored: transformers, too, passes over them.
        carried: they are of another tensor of the model.
    """

    unknown: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)


class HubNames:
    """The names that one model has in its files, both ways."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        """Build the model of ``config`` in ``dtype`` without memory for its parameters.

        Raises:
            UnsupportedModelError: transformers cannot build it.
        """
        self._of(build_meta_model(config, dtype, "eager"))

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Self:
        """The names of a model that was built without memory for its parameters."""
        names = cls.__new__(cls)
        names._of(model)  # noqa: SLF001 - of its own class
        return names

    def _of(self, model: PreTrainedModel) -> None:
        self._model = model
        self.architecture = type(self._model).__name__
        self._owners = {id(p): name for name, p in self._model.named_parameters()}
        self._names_of: dict[str, list[str]] = {name: [name] for name in self._owners.values()}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if (owner := self._owners[id(parameter)]) != name:
                self._names_of[owner].append(name)
        self._tensors: dict[str, Tensor] = {
            **dict(self._model.named_buffers()),
            **dict(self._model.named_parameters(remove_duplicate=False)),
        }
        self._persistent = self._model.state_dict().keys()

    @property
    def parameters(self) -> dict[str, Shape]:
        """Name and shape of each parameter; a tied one has one name."""
        return {name: tuple(self._tensors[name].shape) for name in self._owners.values()}

    def buffer(self, name: str) -> Tensor:
        """A buffer of the model, with the values that its constructor gives it."""
        return self._tensors[name]

    def file_shapes(self) -> dict[str, Shape]:
        """Name and shape of each tensor of ``file_tensors``."""
        return {name: tuple(tensor.shape) for name, tensor in self.file_tensors().items()}

    def file_tensors(self) -> dict[str, Tensor]:
        """Each tensor that ``save_pretrained`` would write, by name and in its order: its shape and dtype.

        Raises:
            UnsupportedModelError: transformers cannot convert the model back.
        """
        try:
            return dict(revert_weight_conversion(self._model, self._own_tensors()))
        except Exception as cause:
            raise UnsupportedModelError(
                f"{self._model.config.model_type}: transformers cannot convert its weights to the form of the "
                f"hub: {cause}"
            ) from cause

    def exported(self) -> tuple[dict[str, Shape], NamePlan]:
        """Name and shape of each tensor of an export, and where each belongs.

        They are those that ``save_pretrained`` writes; where these must be rearranged in a way that cannot be done
        piece by piece, those of ``save_pretrained(save_original_format=False)``.

        Raises:
            UnsupportedModelError: transformers rearranges these, too.
        """
        shapes = self.file_shapes()
        try:
            return shapes, self.plan(shapes)
        except UnsupportedModelError:
            shapes = {name: tuple(tensor.shape) for name, tensor in self._own_tensors().items()}
        try:
            return shapes, self.plan(shapes)
        except UnsupportedModelError as cause:
            raise UnsupportedModelError(
                f"{self._model.config.model_type}: transformers rearranges its weights when they are loaded, in the "
                "form of the hub and in its own, and here that is done piece by piece, which these are not; choose "
                "another model"
            ) from cause

    def _own_tensors(self) -> dict[str, Tensor]:
        """What is saved of the model, by its own names."""
        return {name: self._tensors[name] for name in self._persistent if not self._is_alias(name)}

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a parameter or buffer of the model."""
        return self._tensors[name].dtype

    @property
    def saved(self) -> set[str]:
        """Names of all parameters, aliases included, and of the buffers that are saved."""
        return {*self._persistent}

    def owner_of(self, name: str) -> str:
        """The one name of a parameter that may have several; that of a buffer is its own."""
        return self._owners.get(id(self._tensors[name]), name)

    def plan(self, shapes: Mapping[str, Shape], wanted: AbstractSet[str] | None = None) -> NamePlan:
        """Find the place of each tensor of the files.

        Args:
            shapes: of all tensors in the files, by name.
            wanted: names of the tensors of the model that are computed with; those of others are carried. None = all.

        Raises:
            ModelFilesError: tensors are missing, too many, or of another shape than the model's.
            UnsupportedModelError: the files must be rearranged in a way that cannot be done piece by piece.
        """
        if len(shapes) > (most := self._tensors_at_most()):
            raise ModelFilesError(
                f"the files hold {len(shapes):,} tensors, and a {self.architecture} of their config.json is made of "
                f"{most:,} at most. Fetch config.json and the weights again, from one place"
            )
        found, others = self._assign(shapes, wanted)
        unknown, ignored = others.unknown, others.ignored
        buffers: dict[str, str] = {}
        derived = {name for name in ignored if _DERIVED.search(name)}
        pieces: dict[str, tuple[Piece, ...]] = {}
        wrong = [f"{name} {_text(shapes[name])} has no place in the model" for name in unknown]
        for target, tensor in found.items():
            expected = tuple(self._tensors[target].shape)
            if tensor.shape != expected:
                wrong.append(
                    f"{target} is {_text(tensor.shape)} in the files, {_text(expected)} in the model"
                )
            elif id(self._tensors[target]) in self._owners:
                pieces[target] = tuple(Piece(name, expected, *box) for name, *box in tensor.boxes)
            elif target in self._persistent:
                buffers.update((name, target) for name, _, _ in tensor.boxes)
            else:
                derived.update(name for name, _, _ in tensor.boxes)
        parameters, aliases = self._untangle(pieces)
        wrong += [
            f"{name} is missing in the files, {_text(shape)} in the model"
            for name, shape in self.parameters.items()
            if name not in parameters
            and not found.keys() & set(self._names_of[name])
            and (wanted is None or wanted & set(self._names_of[name]))
        ]
        if wrong:
            self._refuse_wrapped(unknown)
            self._refuse_files(wrong)
        carried = {*others.carried, *ignored} - derived
        return NamePlan(
            parameters,
            aliases,
            buffers,
            carried=tuple(name for name in shapes if name in carried),
            derived=tuple(name for name in shapes if name in derived),
        )

    def _tensors_at_most(self) -> int:
        """Tensors of files that the model can be made of: a stack of experts is one for each, and its parts."""
        tensors = self._tensors.values()
        pieces = sum(4 * tensor.shape[0] if tensor.dim() > 2 else 4 for tensor in tensors)  # noqa: PLR2004
        return max(pieces, _TENSORS_LEAST)

    def _assign(
        self, shapes: Mapping[str, Shape], wanted: AbstractSet[str] | None
    ) -> tuple[dict[str, _Virtual], "_Others"]:
        """What the files hold for each tensor of the model that is wanted, and all other names."""
        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = self._model.base_model_prefix
        ignored = self._ignored()
        found: dict[str, _Virtual] = {}
        parts: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
        others = _Others()
        for name in sorted(shapes, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._tensors)
            if target not in self._tensors and name in self._tensors:
                target, pattern = name, None
            if target not in self._tensors:
                is_ignored = ignored is not None and ignored.search(target) is not None
                (others.ignored if is_ignored else others.unknown).append(name)
            elif wanted is not None and target not in wanted:
                others.carried.append(name)
            elif pattern is not None:
                _, by_source = parts.setdefault(target, (by_pattern[pattern], defaultdict(list)))
                by_source[pattern].append(name)
            elif target in found:
                self._refuse_files([f"{name} and {found[target].boxes[0][0]} are both {target}"])
            else:
                found[target] = _whole(name, shapes[name])
        layers = tuple(match[1] for name in others.unknown if (match := _NEXT_TOKEN_LAYER.fullmatch(name)))
        others.ignored.extend(name for name in others.unknown if name.startswith(layers))
        others.unknown[:] = [name for name in others.unknown if not name.startswith(layers)]
        for target, (rule, by_source) in parts.items():
            tensors = {
                key: [_whole(name, shapes[name]) for name in names] for key, names in by_source.items()
            }
            found[target] = self._convert(target, rule, tensors)
        return found, others

    def _convert(self, target: str, rule: WeightConverter, tensors: dict[str, list[_Virtual]]) -> _Virtual:
        """Apply the operations of a rule to boxes."""
        # The order of the rule's patterns is the order of the parts; a rule collects in any.
        parts = [tensors[pattern] for pattern in rule.source_patterns if pattern in tensors]
        expected = tuple(self._tensors[target].shape)
        try:
            for step in rule.operations:
                if len(rule.target_patterns) == 1 and isinstance(step, MergeModulelist):
                    parts = [[_stack(part, step.dim)] for part in parts]
                elif len(rule.target_patterns) == 1 and isinstance(step, Concatenate):
                    parts = [[_concatenate([tensor for part in parts for tensor in part], step.dim)]]
                elif isinstance(step, Transpose) and step.check_dims and parts[0][0].shape == expected:
                    pass  # saved in the order of the model, which transformers takes as it is
                else:
                    is_own = any(
                        name == target
                        for part in tensors.values()
                        for each in part
                        for name, *_ in each.boxes
                    )
                    self._refuse_rule(target, type(step).__name__, is_own=is_own)
        except UnsupportedModelError:
            raise
        except ValueError as cause:
            self._refuse_files([f"the parts of {target} do not fit together: {cause}"])
        return parts[0][0]

    def _untangle(
        self, pieces: Mapping[str, tuple[Piece, ...]]
    ) -> tuple[dict[str, tuple[Piece, ...]], list[tuple[str, tuple[Piece, ...]]]]:
        """The pieces of each parameter, and of tied weights that the files hold a second time under another name."""
        parameters: dict[str, tuple[Piece, ...]] = {}
        aliases = []
        for name in self._owners.values():
            there = [pieces[other] for other in self._names_of[name] if other in pieces]
            if there:
                parameters[name] = there[0]
                aliases += [(name, other) for other in there[1:]]
        return parameters, aliases

    def _is_alias(self, name: str) -> bool:
        return self._owners.get(id(self._tensors[name]), name) != name

    def _ignored(self) -> re.Pattern[str] | None:
        """Pattern of the names that transformers, too, passes over in files of this model; None without any."""
        patterns = set(self._model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001
        buffers = {name.rpartition(".")[2] for name, _ in self._model.named_buffers()}
        # Buffers that moved from each block to the model, or are no longer saved.
        patterns.update(rf"(^|\.){name}$" for name in ("inv_freq", "position_ids") if name in buffers)
        return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns))) if patterns else None

    def _refuse_rule(self, target: str, step: str, *, is_own: bool) -> NoReturn:
        """Refuse a rule that cannot be applied piece by piece; ``is_own``: to a tensor that has the model's name."""
        if is_own:
            raise UnsupportedModelError(
                f"{self._model.config.model_type}: transformers rearranges {target} by {step} whenever it loads it, "
                "which import cannot do piece by piece; choose another model"
            )
        raise UnsupportedModelError(
            f"{self._model.config.model_type}: the files must be rearranged by {step} to become {target}, which "
            "import cannot do piece by piece. Load the model with transformers and save it with "
            "save_pretrained(OUT, save_original_format=False), then import OUT"
        )

    def _refuse_wrapped(self, names: Iterable[str]) -> None:
        """Refuse files that were saved with a wrapper around the model, or with more than the model, by its name."""
        for mark, (what, cure) in _WRAPPERS.items():
            if found := [name for name in names if f".{mark}" in f".{name}"]:
                shown = ", ".join(found[:_NAMED_AT_MOST]) + (", ..." if len(found) > _NAMED_AT_MOST else "")
                raise ModelFilesError(
                    f"the files were saved {what}: {len(found):,} tensors are named so ({shown}). {cure}"
                )

    def _refuse_files(self, wrong: Sequence[str]) -> NoReturn:
        shown = "; ".join(wrong[:_NAMED_AT_MOST])
        more = f"; and {len(wrong) - _NAMED_AT_MOST} more" if len(wrong) > _NAMED_AT_MOST else ""
        raise ModelFilesError(
            f"the files do not fit the {self.architecture} of their config.json: {shown}{more}. Fetch config.json "
            "and the weights again, from one place"
        )


def _whole(name: str, shape: Shape) -> _Virtual:
    return _Virtual(shape, ((name, (0,) * len(shape), shape),))


def _stack(tensors: Sequence[_Virtual], dim: int) -> _Virtual:
    """Make tensors the entries of a new dimension ``dim``, as ``torch.stack`` does; ValueError if shapes differ."""
    shape = tensors[0].shape
    _require_equal(tensors, shape)
    if not 0 <= dim <= len(shape):
        raise ValueError(f"{_text(shape)} stacked in dimension {dim}")
    boxes = [
        (name, (*start[:dim], index, *start[dim:]), (*size[:dim], 1, *size[dim:]))
        for index, tensor in enumerate(tensors)
        for name, start, size in tensor.boxes
    ]
    return _Virtual((*shape[:dim], len(tensors), *shape[dim:]), tuple(boxes))


def _concatenate(tensors: Sequence[_Virtual], dim: int) -> _Virtual:
    """Join tensors in dimension ``dim``, as ``torch.cat`` does; ValueError if their shapes do not fit."""
    shape = tensors[0].shape
    boxes = []
    length = 0
    for tensor in tensors:
        if len(tensor.shape) != len(shape) or not 0 <= dim < len(shape):
            raise ValueError(f"{_text(tensor.shape)} beside {_text(shape)}")
        expected = (*shape[:dim], tensor.shape[dim], *shape[dim + 1 :])
        _require_equal([tensor], expected)
        for name, start, size in tensor.boxes:
            boxes.append((name, (*start[:dim], length + start[dim], *start[dim + 1 :]), size))
        length += tensor.shape[dim]
    return _Virtual((*shape[:dim], length, *shape[dim + 1 :]), tuple(boxes))


def _require_equal(tensors: Iterable[_Virtual], shape: Shape) -> None:
    for tensor in tensors:
        if tensor.shape != shape:
            raise ValueError(f"{tensor.boxes[0][0]} is {_text(tensor.shape)}, {_text(shape)} is wanted")


def _text(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
