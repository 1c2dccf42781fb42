"""A causal language model, partitioned at its decoder blocks.

The blocks are taken out of the model and stubs put in their place. So the model's own `forward` still
embeds the tokens, builds masks, positions and rotary tables, and computes final norm, head and loss, while
the blocks are run by hand, one at a time. Parameters are bound for one call only; none is kept here.

Shapes: B sequences, T tokens, t <= T tokens of a slice, H hidden size, V vocabulary size.
"""

import copy
import inspect
from collections import Counter
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
)
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import Cache, DynamicCache, PreTrainedConfig

from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import ConfigError, UnsupportedModelError
from megatrain_io.models.causal_lm import CausalLM, Inputs, ModuleLM, TransformersLM
from megatrain_io.models.meta_model import build_meta_model
from megatrain_io.models.positions import Positions, positions_text
from megatrain_io.models.preserved import preserved
from megatrain_io.models.side_inputs import HANDED, NO_SIDE_INPUTS, BlockCall, Handed, SideInputs

__all__ = ["ParameterShape", "PartitionSpec", "PartitionedModel", "model_parts"]

ParameterShape = tuple[str, tuple[int, ...]]
"""Full name as in `named_parameters()` of the stock model, and shape."""


_ABSENT = object()
_SKIPPED = BlockCall((), {}, is_skipped=True)


@dataclass(frozen=True)
class PartitionSpec:
    """How an architecture is partitioned, as `probe` found out; the same for every size of it.

    Attributes:
        model_type: as in the configuration; the name of the class of a module that has none.
        attn_implementation: as the probe was told: "sdpa", "eager", or None for transformers' own choice.
        block_list: name of the module list that holds the decoder blocks.
        output_entries: None where blocks return the hidden state, else the length of their tuple.
        embedding: names of the parameters that the first hidden state depends on.
        head: names of the parameters that the loss depends on behind the last block.
        packs: whether position ids that restart keep the documents of a row apart.
        caches: whether text is generated with transformers' own key-value cache, as stock ``generate`` does.
        kept: attributes of blocks, by dotted path, in which they keep tensors from call to call.
        widens: whether blocks return the hidden state in fp32 where bf16 computes.
        positions: where the number of its positions stands; None where it has none, or that is not known.
        unreached: names of the parameters that no gradient reaches; in a block, the name that each of these has there.
        sides: what blocks take besides the hidden state, and that carries gradient.
        axes: of the hidden state: B sequences, T tokens, H entries, and A where it is several.
        shares: whether several blocks have parameters in common.
        skips: whether `forward` leaves out some blocks, as it has none of what they look at.
        forward_grad: whether blocks have other bits with grad than without (a mask that is computed has other kernels).
        loss_of_scores: whether the loss is transformers' cross entropy of the scores, because the model's own takes
            labels as they are given, and no function of transformers.
    """

    model_type: str
    attn_implementation: str | None
    block_list: str
    output_entries: int | None
    embedding: frozenset[str]
    head: frozenset[str]
    packs: bool
    caches: bool = True
    kept: frozenset[str] = frozenset()
    widens: bool = False
    positions: Positions | None = None
    unreached: frozenset[str] = frozenset()
    sides: SideInputs = NO_SIDE_INPUTS
    axes: str = "BTH"
    shares: bool = False
    skips: bool = False
    forward_grad: bool = False
    loss_of_scores: bool = False


class PartitionedModel:
    """A causal language model without parameters, run in three parts.

    `record` runs what comes before the blocks, `run_block` one block, `loss` and `logits` what comes after.
    Parameters come as a mapping from full name to tensor and are seen by autograd as the leaves they are;
    a missing name is a KeyError, others are ignored. Dropout draws from torch's global generator. One call
    at a time: the stubs are shared.

    Attributes:
        spec: as handed in.
        dtype: of what enters the first block, and of the parameters that the architecture does not keep in another.
        dtypes: of each parameter, by name.
        blocks: the decoder blocks, each with its own Python state; parameters on meta, buffers real.
        tied: alias -> full name of the parameter that it shares.
        embedding_parameters: what `record` needs, in model order; what several blocks have in common is behind that.
        head_parameters: what `loss` and `logits` need, less what the embedding owns.
        tied_parameters: names of embedding parameters that `loss` and `logits` need too.
        skipped: numbers of the blocks that `forward` leaves out.
        unreached: names of parameters that no gradient reaches, so that nobody's optimizer would move them.
        frozen: these, and the names of parameters that the architecture itself does not train.
    """

    def __init__(self, model: PreTrainedConfig | nn.Module, dtype: torch.dtype, spec: PartitionSpec) -> None:
        """Partition a model in `dtype` as `spec` says, without memory for its parameters.

        Args:
            model: the configuration of a transformers model, or a module with a `forward` of its own (`ModuleLM`),
                which stays as it is.
            dtype: that computes; of all parameters but those that the architecture keeps in another.
            spec: how it is partitioned.

        Raises:
            UnsupportedModelError: it cannot be built, or is not of the architecture that was probed.
        """
        self.spec = spec
        self.dtype = dtype
        self._lm: CausalLM = (
            ModuleLM(model, dtype)
            if isinstance(model, nn.Module)
            else TransformersLM(
                build_meta_model(model, dtype, spec.attn_implementation), loss_of_scores=spec.loss_of_scores
            )
        )
        self._model = self._lm.module
        self.dtypes = {name: parameter.dtype for name, parameter in self._model.named_parameters()}
        self._untrained = frozenset(
            name for name, parameter in self._model.named_parameters() if not parameter.requires_grad
        )
        self.tied = self._find_tied()
        self._visit: Callable[[int, Tensor, BlockCall], Tensor] = _outside_a_run
        self._shared_names = self._find_shared()
        shared = sorted({full for names in self._shared_names for full in names}, key=[*self.dtypes].index)
        shapes = {name: tuple(self._model.get_parameter(name).shape) for name in shared}
        self.blocks = tuple(self._take_blocks_out())
        self._block_names = [
            {
                f"{spec.block_list}.{index}.{name}": name
                for name, _ in block.named_parameters()
                if name not in self._shared_names[index].values()
            }
            for index, block in enumerate(self.blocks)
        ]
        self._attributes = [list(_attributes(block, spec.kept)) for block in self.blocks]
        self._generates = False
        self._handed: dict[Handed, object] = {}
        resident = [(name, tuple(p.shape)) for name, p in self._model.named_parameters()]
        for name, _ in resident:
            if name not in spec.embedding | spec.head:
                raise self._refused(f"parameter {name} was not there in the small copy that was probed")
        self.embedding_parameters: tuple[ParameterShape, ...] = tuple(
            (name, shape)
            for name, shape in (*resident, *shapes.items())
            if name in spec.embedding or name in shapes
        )
        self.head_parameters: tuple[ParameterShape, ...] = tuple(
            (name, shape) for name, shape in resident if name not in spec.embedding
        )
        self.tied_parameters: tuple[str, ...] = tuple(
            name for name, _ in self.embedding_parameters if name in spec.head and name not in shapes
        )
        # One element, strides of zero: what a parameter is while `forward` passes it to no purpose.
        self._placeholders = {
            name: torch.zeros((), dtype=self.dtypes[name]).expand(shape) for name, shape in resident
        }
        own_names = {name: name for name, _ in resident}
        for names in (*self._block_names, *self._shared_names):
            own_names |= names
        self.skipped = self._find_skipped()
        self.unreached = frozenset(full for full, name in own_names.items() if name in spec.unreached).union(
            *(self._block_names[index] for index in self.skipped)
        )
        self.frozen = self._untrained | self.unreached

    def block_parameters(self, index: int) -> tuple[ParameterShape, ...]:
        """Name and shape of the parameters that `run_block` needs for block `index`, in model order."""
        own = dict(self.blocks[index].named_parameters())
        return tuple((full, tuple(own[name].shape)) for full, name in self._block_names[index].items())

    def train(self, mode: bool = True) -> None:  # noqa: FBT001, FBT002 - as nn.Module.train
        """Switch dropout on or off like `nn.Module.train`; a new PartitionedModel is in training mode."""
        for module in (self._model, *self.blocks):
            module.train(mode)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's own configuration.

        Raises:
            UnsupportedModelError: it is no transformers model.
        """
        if self._lm.config is None:
            raise self._refused("it is a module of your own, and has no transformers configuration")
        return self._lm.config

    def check_length(self, length: int, setting: str = "") -> list[str]:
        """Compare the tokens of a row with the positions of the model.

        Args:
            length: tokens of the longest row.
            setting: the key that bounds rows; empty where they are the caller's own.

        Returns:
            A note, where there are more, and the model only has not learned these positions.

        Raises:
            ConfigError: there are more than the model has or can pass and be resumed; the message has both numbers.
        """
        positions = self.spec.positions
        count = None if positions is None else positions.of(self.config)
        if positions is None or count is None or length <= count:
            return []
        text = positions_text(positions, count, length, setting)
        if positions.is_bound or positions.remembers:
            raise ConfigError(text)
        return [text]

    @property
    def hidden_dtype(self) -> torch.dtype:
        """The widest dtype of the hidden state; what enters the first block may have a narrower one."""
        return torch.float32 if self.spec.widens else self.dtype

    @property
    def hidden_size(self) -> int:
        """Entries H of the hidden state of a token, A times H where it is several."""
        return self._sizes[0]

    @property
    def vocab_size(self) -> int:
        """Scores V of a token."""
        return self._sizes[1]

    def to(self, device: torch.device) -> None:
        """Compute on ``device`` from now on: buffers (rotary tables) move, parameters have no memory here."""
        self._lm.to(device)
        for root in (self._model, *self.blocks):
            for module in root.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(device))
        # One element still: a copy of the expanded ones would be as large as they look.
        self._placeholders = {
            name: torch.zeros((), dtype=each.dtype, device=device).expand(each.shape)
            for name, each in self._placeholders.items()
        }

    def set_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Give buffers the values that the model's files have; they keep their dtype, as with `from_pretrained`.

        Args:
            values: of some buffers, by full name as in `named_buffers()` of the stock model.

        Raises:
            UnsupportedModelError: the model has no such buffer, as one of another version of transformers.
        """
        prefix = f"{self.spec.block_list}."
        for full, value in values.items():
            root, name = self._model, full
            try:
                if full.startswith(prefix):
                    index, _, name = full.removeprefix(prefix).partition(".")
                    root = self.blocks[int(index)]
                owner, _, own_name = name.rpartition(".")
                module = root.get_submodule(owner)
                buffer = module.get_buffer(own_name)
            except (AttributeError, ValueError, IndexError):
                raise self._refused_buffer(full, value) from None
            if buffer.shape != value.shape:
                raise self._refused_buffer(full, value)
            setattr(module, own_name, value.to(buffer.device, buffer.dtype, copy=True))

    def _refused_buffer(self, name: str, value: Tensor) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.spec.model_type}: the run keeps a buffer {name} {list(value.shape)} of the model, and with this "
            "version of transformers the model has none such: go on with the version that it was imported with"
        )

    def preserved(self) -> AbstractContextManager[None]:
        """Run something that is no step of the training: buffers, attributes, mode and generators are given back."""
        return preserved((self._model, *self.blocks))

    @property
    def notes(self) -> list[str]:
        """Sentences for the person on parameters that stay as they are."""
        return [
            f"{len(names)} of the parameters stay as they are, as in stock training: {why} ({min(names)} is one)"
            for names, why in (
                (self.unreached, "no gradient reaches them"),
                (self._untrained - self.unreached, "the model does not train them"),
            )
            if names
        ]

    @property
    def loss_notes(self) -> list[str]:
        """Sentences for the person on which function computes the loss."""
        return self._lm.loss_notes

    @property
    def liger_version(self) -> str | None:
        """Version of liger-kernel, if it computes the loss; else None."""
        return self._lm.liger_version

    @property
    def token_axis(self) -> int:
        """Dimension of the hidden state that counts tokens."""
        return self.spec.axes.index("T")

    def tokens_of(self, hidden: Tensor, part: slice) -> Tensor:
        """Some tokens of a hidden state, a view."""
        return hidden[(slice(None),) * self.token_axis + (part,)]

    def new_cache(self) -> Cache | None:
        """An empty key-value cache for one generation: given to `record`, filled by `run_block`.

        None where the architecture takes none of transformers' caches: then each pass gets all tokens.
        """
        return DynamicCache(config=self.config.get_text_config()) if self.spec.caches else None

    def record(
        self,
        parameters: Mapping[str, Tensor],
        micro_batch: MicroBatch,
        cache: Cache | None = None,
    ) -> tuple[Tensor, tuple[BlockCall, ...]]:
        """Run the model up to its first block, and note how it calls every block.

        Args:
            parameters: those of the embedding.
            micro_batch: the tokens; its labels are not looked at. With a cache, only the new tokens (but an
                attention mask over all).
            cache: keys and values of a generation. It must hold the earlier tokens of all blocks.

        Returns:
            The first hidden state [B, T, H] (or with the `axes` that `spec` says), and one call per block. With grad
            enabled it and the side inputs in the calls are connected to the embedding parameters.

        Raises:
            UnsupportedModelError: `forward` skips, repeats or reorders blocks, or works between them.
        """
        hidden, calls = self._recorded(parameters, micro_batch, cache)
        return hidden, self._with_shared(calls, parameters)

    def _recorded(
        self, parameters: Mapping[str, Tensor], micro_batch: MicroBatch, cache: Cache | None = None
    ) -> tuple[Tensor, list[BlockCall]]:
        """As `record`, but without what blocks have in common."""
        hiddens: list[Tensor] = []
        calls: list[BlockCall] = []

        def note(index: int, hidden: Tensor, call: BlockCall) -> Tensor:
            while len(calls) in self.skipped:
                calls.append(_SKIPPED)
            if index != len(calls):
                raise self._refused(f"its forward pass calls block {index} where block {len(calls)} is next")
            hiddens.append(hidden)
            if not _is_same(hidden, hiddens[0]):
                raise self._refused(f"its forward pass changes the hidden state before block {index}")
            calls.append(call)
            if len(calls) == len(self.blocks):
                raise _AllBlocksCalledError
            return hidden

        needed = [name for name, _ in self.embedding_parameters if name in self._placeholders]
        bound = self._placeholders | {name: parameters[name] for name in needed}
        self._generates = cache is not None
        try:
            self._forward(note, bound, self._lm.inputs(micro_batch, cache))
        except _AllBlocksCalledError:
            return hiddens[0], calls
        raise self._refused(f"its forward pass calls {len(calls)} of {len(self.blocks)} blocks")

    def _with_shared(
        self, calls: Sequence[BlockCall], parameters: Mapping[str, Tensor]
    ) -> tuple[BlockCall, ...]:
        """The calls with what blocks have in common: copies, as the embedding's memory is needed for the blocks."""
        copies = {
            name: parameters[name].clone() for name in dict.fromkeys(chain.from_iterable(self._shared_names))
        }
        if not torch.is_grad_enabled():
            copies = self.as_trained(copies)
        return tuple(
            replace(call, shared={own: copies[full] for full, own in names.items()}) if names else call
            for call, names in zip(calls, self._shared_names, strict=True)
        )

    def run_block(
        self, index: int, parameters: Mapping[str, Tensor], hidden: Tensor, call: BlockCall
    ) -> Tensor:
        """Run block `index`.

        Args:
            index: 0 for the first block.
            parameters: those of the block.
            hidden: what the block before it returned, [B, T, H].
            call: entry `index` of what `record` returned for the same tokens; a cache in it is filled, and what the
                block leaves for later ones is put into the mappings of it.

        Returns:
            The next hidden state, [B, T, H].
        """
        if call.is_skipped:
            return hidden
        bound = {name: parameters[full] for full, name in self._block_names[index].items()} | {**call.shared}
        # What one block puts into a container of the call is no input of another one, which runs by itself.
        handed_on = self.spec.sides.mappings
        kwargs = {name: value if name in handed_on else _own(value) for name, value in call.kwargs.items()}
        args = call.args
        handed = cast("dict[Handed, object] | None", kwargs.pop(HANDED, None))
        if handed is not None:
            args = tuple(handed[each] if isinstance(each, Handed) else each for each in args)
            kwargs = {name: handed[v] if isinstance(v, Handed) else v for name, v in kwargs.items()}
        output = functional_call(self.blocks[index], bound, (hidden, *args), kwargs)
        if handed is not None:
            handed |= {Handed(index, entry): value for entry, value in enumerate(output) if entry > 0}
        if not call.generates:
            # Tensors that a block keeps would hold its weights when the memory of these is needed.
            for module, name, value in self._attributes[index]:
                if value is _ABSENT:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = copy.copy(value)
        return cast("Tensor", output if self.spec.output_entries is None else output[0])

    def run_block_forward(
        self, index: int, parameters: Mapping[str, Tensor], hidden: Tensor, call: BlockCall, *, training: bool
    ) -> Tensor:
        """As `run_block`, without a graph to keep, and with the bits that it has in training in memory.

        Args:
            index: 0 for the first block.
            parameters: those of the block, `as_trained` where training or a stock model is to be equalled.
            hidden: what the block before it returned.
            call: entry `index` of what `record` returned.
            training: whether a backward pass follows.
        """
        with torch.set_grad_enabled(training and self.spec.forward_grad):
            entering = hidden.detach().requires_grad_() if torch.is_grad_enabled() else hidden
            return self.run_block(index, parameters, entering, call).detach()

    def as_trained(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors over the same memory that require gradients where the model's own parameters do.

        Torch chooses kernels by that: `matmul` folds batches where a weight says so, even if no graph is made. Those
        that no gradient reaches say so in memory, too.
        """
        return {
            name: tensor.detach().requires_grad_(name not in self._untrained)
            for name, tensor in parameters.items()
        }

    def loss(
        self,
        parameters: Mapping[str, Tensor],
        hidden: Tensor,
        shift_labels: Tensor,
        num_items_in_batch: int | Tensor,
    ) -> Tensor:
        """Sum the token losses of a slice and divide by `num_items_in_batch`, by the model's own code.

        On CUDA `liger_loss` may stand for transformers' loss function.

        Args:
            parameters: those of the head and the borrowed ones.
            hidden: what the last block returned, or some tokens of it, [B, t, H].
            shift_labels: int64 [B, t], the same tokens of the micro-batch's.
            num_items_in_batch: trained tokens of the whole step. (On CUDA torch multiplies by the inverse
                of a Python number, and divides by a tensor: the last bit may differ.)

        Returns:
            A scalar in float32. Added up over a step's slices it is the mean loss of a trained token.
        """
        # A slice is not contiguous, and the loss function takes views.
        return self._lm.loss(
            partial(self._run_head, parameters, hidden), shift_labels.contiguous(), num_items_in_batch
        )

    def logits(self, parameters: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Scores of the next token [B, t, V] from what the last block returned, [B, t, H].

        Args:
            parameters: those of the head and the borrowed ones.
            hidden: all tokens, or only those of interest.
        """
        return self._lm.logits(self._run_head(parameters, hidden, {}))

    def _run_head(
        self, parameters: Mapping[str, Tensor], hidden: Tensor, inputs: Mapping[str, object]
    ) -> Any:
        needed = [*(name for name, _ in self.head_parameters), *self.tied_parameters]
        bound = self._placeholders | {name: parameters[name] for name in needed}
        # `forward` must embed something; the stubs drop whatever comes of it.
        shape = [hidden.shape[self.spec.axes.index(axis)] for axis in "BT"]
        input_ids = torch.zeros(shape, dtype=torch.int64, device=hidden.device)
        args, kwargs = self._lm.inputs(MicroBatch(input_ids, input_ids), None)
        return self._forward(lambda *_: hidden, bound, (args, {**kwargs, **inputs}))

    def _forward(
        self,
        visit: Callable[[int, Tensor, BlockCall], Tensor],
        bound: dict[str, Tensor],
        inputs: Inputs,
    ) -> Any:
        """Run the model's own `forward`; in place of each block, `visit` gives the next hidden state."""
        self._visit, self._handed = visit, {}
        try:
            return functional_call(self._model, bound, *inputs)
        finally:
            self._visit = _outside_a_run

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """Sizes H and V: by the configuration, or where there is none from the shapes of a pass without blocks."""
        if self._lm.config is not None:
            text_config = self._lm.config.get_text_config()
            return text_config.hidden_size * self._stack_height, text_config.vocab_size
        tokens = torch.zeros((1, 2), dtype=torch.int64)
        # Zeros take no memory until they are written to, and reading touches a few rows.
        parts = (self.embedding_parameters, self.head_parameters)
        zeros = {name: torch.zeros(shape, dtype=self.dtypes[name]) for part in parts for name, shape in part}
        with torch.no_grad():
            hidden, _ = self._recorded(zeros, MicroBatch(tokens, tokens))
            with FakeTensorMode(allow_non_fake_inputs=True):
                logits = self.logits(zeros, hidden)
        for what, tensor in (("the hidden state before the first block", hidden), ("the scores", logits)):
            if tensor.shape[:2] != tokens.shape or tensor.dim() != 3:  # noqa: PLR2004 - [B, T, H]
                raise self._refused(
                    f"for tokens {list(tokens.shape)} {what} have the shape {list(tensor.shape)}: it must be [B, T, n]"
                )
        return hidden.shape[-1], logits.shape[-1]

    @cached_property
    def _stack_height(self) -> int:
        """How many hidden states A of a token pass through the blocks together."""
        if "A" not in self.spec.axes:
            return 1
        device = next(iter(self._placeholders.values())).device
        tokens = torch.zeros((1, 1), dtype=torch.int64, device=device)
        with torch.no_grad(), self.preserved():
            hidden, _ = self._recorded(self._placeholders, MicroBatch(tokens, tokens))
            return hidden.shape[self.spec.axes.index("A")]

    def _called(self, index: int, hidden_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        hidden = args[0] if args else kwargs.pop(hidden_name)
        hands = HANDED in self.spec.sides.mappings
        if hands:
            kwargs[HANDED] = self._handed
        output = self._visit(index, hidden, BlockCall(args[1:], kwargs, self._generates, self.spec.sides))
        entries = self.spec.output_entries
        if entries is None:
            return output
        return output, *(Handed(index, entry) if hands else None for entry in range(1, entries))

    def _block_modules(self) -> nn.ModuleList:
        try:
            return cast("nn.ModuleList", self._model.get_submodule(self.spec.block_list))
        except AttributeError:
            raise self._refused(
                f"it has no module list {self.spec.block_list}; probe this configuration again"
            ) from None

    def _take_blocks_out(self) -> Iterator[nn.Module]:
        block_list = self._block_modules()
        for index, block in enumerate(block_list):
            hidden_name = next(iter(inspect.signature(block.forward).parameters))
            block_list[index] = _Stub(block, partial(self._called, index, hidden_name))
            yield block

    def _find_tied(self) -> dict[str, str]:
        owners = {id(parameter): name for name, parameter in self._model.named_parameters()}
        aliases = {
            name: owners[id(parameter)]
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if owners[id(parameter)] != name
        }
        of_blocks = f"{self.spec.block_list}."
        for alias, owner in aliases.items():
            if alias.startswith(of_blocks) != owner.startswith(of_blocks):
                raise self._refused(
                    f"{alias} and {owner} are one parameter, of a block and of what is outside of the blocks, and this "
                    "cannot be trained here; choose another"
                )
        return aliases

    def _find_skipped(self) -> frozenset[int]:
        """The blocks that a pass of the model's own `forward` does not call."""
        if not self.spec.skips:
            return frozenset()
        called = set()

        def note(index: int, hidden: Tensor, _call: BlockCall) -> Tensor:
            called.add(index)
            if index == len(self.blocks) - 1:
                raise _AllBlocksCalledError
            return hidden

        tokens = torch.zeros((1, 1), dtype=torch.int64)
        with torch.no_grad(), self.preserved(), suppress(_AllBlocksCalledError):
            self._forward(note, dict(self._placeholders), self._lm.inputs(MicroBatch(tokens, tokens), None))
        return frozenset(range(len(self.blocks))) - called

    def _find_shared(self) -> list[dict[str, str]]:
        """Of each block the parameters that other blocks have, too: full name of the first owner, and name in it."""
        owners = {id(parameter): name for name, parameter in self._model.named_parameters()}
        blocks = [dict(block.named_parameters()) for block in self._block_modules()]
        counts = Counter(id(parameter) for own in blocks for parameter in own.values())
        shared = [
            {owners[id(parameter)]: name for name, parameter in own.items() if counts[id(parameter)] > 1}
            for own in blocks
        ]
        if any(shared) and not self.spec.shares:
            name = next(name for names in shared for name in names)
            raise self._refused(
                f"several blocks have parameter {name} in common, and none had in the small copy that was probed; name "
                "a folder with the config.json of a small model in which they have by model_options.miniature=DIR "
                "(import: --miniature DIR)"
            )
        return shared

    def _refused(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.spec.model_type}: {reason}")


def _is_same(some: Tensor, other: Tensor) -> bool:
    """Whether a tensor is another one, or a slice of it that leaves nothing out."""
    return some is other or (
        some.data_ptr() == other.data_ptr()
        and some.shape == other.shape
        and some.stride() == other.stride()
        and some.dtype == other.dtype
    )


def _own(value: object) -> object:
    """A container that a block may put something into, copied; everything else as it is."""
    is_container = isinstance(value, MutableMapping | MutableSequence | MutableSet)
    return copy.copy(value) if is_container and not isinstance(value, Cache) else value


def _attributes(block: nn.Module, paths: Iterable[str]) -> Iterator[tuple[nn.Module, str, object]]:
    """Owner, name and value of attributes of a block; a kind of block may lack the module that owns one."""
    modules = dict(block.named_modules())
    for path in sorted(paths):
        owner, _, name = path.rpartition(".")
        if owner in modules:
            yield modules[owner], name, vars(modules[owner]).get(name, _ABSENT)


class _Stub(nn.Module):
    """Stands where a block was: has the block's attributes, and passes calls on."""

    def __init__(self, block: nn.Module, called: Callable[..., object]) -> None:
        super().__init__()
        # Not registered as a submodule: the meta model must not list the block's parameters.
        self.__dict__.update(_block=block, _called=called)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> object:
        return self._called(args, kwargs)


class _AllBlocksCalledError(Exception):
    """Leaves `forward` when the last block was recorded: head and loss are not wanted then."""


def _outside_a_run(index: int, _hidden: Tensor, _call: BlockCall) -> Tensor:
    raise AssertionError(f"the stub of block {index} was called outside record, loss and logits")


def model_parts(partition: PartitionedModel) -> list[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]]:
    """Name and tensors of each stop of a partitioned model, in the order of the parameter space.

    In the file the records of embeddings and head are named prologue and epilogue, as they were from the beginning.
    """
    parts = [("prologue", partition.embedding_parameters)]
    parts += [(f"block {index}", partition.block_parameters(index)) for index in range(len(partition.blocks))]
    if partition.head_parameters:
        parts.append(("epilogue", partition.head_parameters))
    return parts
