"""A transformers causal language model, cut at its decoder blocks.

The stock model is built with every parameter on the meta device and every buffer real. Its decoder
blocks are taken out and stubs put in their place, so that the model's own `forward` still builds the
masks, positions and rotary tables, and still computes norm, head and loss; the blocks are run by hand,
one at a time, with parameters bound for one call only. No tensor of parameters is ever kept here.

Shapes: B sequences, T tokens, t <= T tokens of a slice, H hidden size, V vocabulary.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from megatrain_io.errors import UnsupportedModelError

__all__ = ["BlockCall", "CutFacts", "CutModel", "MicroBatch", "build_skeleton", "find_block_list"]

# What a constructor allocates from this size on is a parameter: no buffer is as large.
_META_FROM_ELEMENTS = 1 << 24

ParameterShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class MicroBatch:
    """Tokens that go through the model together.

    Attributes:
        input_ids: int64 [B, T].
        shift_labels: int64 [B, T]; entry t is the token that position t must predict, -100 = not trained.
        position_ids: int64 [B, T] or None for 0..T-1; restarting at 0 it packs several documents in a row.
        attention_mask: int64 [B, T], 1 = token, 0 = padding, or None for no padding.
    """

    input_ids: Tensor
    shift_labels: Tensor
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None


@dataclass(frozen=True)
class BlockCall:
    """What the model's `forward` passed to one block besides the hidden state.

    Tensors (masks, rotary tables) and caches are shared between the calls of one recording.
    """

    args: tuple[object, ...]
    kwargs: dict[str, object]


@dataclass(frozen=True)
class CutFacts:
    """What the probe found out about an architecture; holds at every size of it.

    Attributes:
        model_type: the configuration's `model_type`.
        attn_implementation: "sdpa" or "eager".
        block_list: name of the module list that holds the decoder blocks.
        output_entries: None where a block returns the hidden state, else the length of its tuple.
        prologue: names of the parameters that the first hidden state depends on.
        epilogue: names of the parameters that the loss depends on after the last block.
        packs: whether position ids that restart keep the documents of a row apart.
    """

    model_type: str
    attn_implementation: str
    block_list: str
    output_entries: int | None
    prologue: frozenset[str]
    epilogue: frozenset[str]
    packs: bool


def build_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build the stock causal language model without memory for its parameters.

    Every parameter is on the meta device in `dtype`; every buffer is real, as the stock constructor
    computes it. `use_cache` is off. `config` is not changed, nothing is fetched.

    Raises:
        UnsupportedModelError: transformers has no such causal language model, or not in this form.
    """
    config = copy.deepcopy(config)
    try:
        config.use_cache = False
        config.get_text_config().use_cache = False
        with _parameters_on_meta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
            )
    except Exception as cause:
        message = f"{config.model_type}: transformers cannot build a causal language model from this: {cause}"
        raise UnsupportedModelError(message) from cause
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype:
            message = (
                f"{config.model_type}: {name} is kept in {parameter.dtype}, not {dtype}; one dtype for "
                f"all parameters is needed, train this model in {parameter.dtype}"
            )
            raise UnsupportedModelError(message)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            message = f"{config.model_type}: the constructor leaves buffer {name} without values"
            raise UnsupportedModelError(message)
    return model


def find_block_list(model: PreTrainedModel) -> str:
    """Name the module list that holds the decoder blocks: the longest one of checkpointing layers.

    Raises:
        UnsupportedModelError: there is no such list.
    """
    lists = [
        (len(module), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(member, GradientCheckpointingLayer) for member in module)
    ]
    if not lists:
        message = (
            f"{model.config.model_type}: no list of decoder blocks found (transformers marks them as "
            f"GradientCheckpointingLayer); name the module list by hand with block_list="
        )
        raise UnsupportedModelError(message)
    return max(lists, key=lambda entry: entry[0])[1]


class CutModel:
    """A causal language model without parameters, to be run in three parts.

    `record` runs everything before the blocks, `run_block` one block, `loss` and `logits` everything
    after them. All are stateless: tensors come in as a mapping from full parameter name, as in
    `named_parameters()` of the stock model, and autograd sees them as the leaves they are. Further
    names in the mapping are ignored, a missing one is a KeyError. Calls must not overlap in time.

    Attributes:
        facts: what the probe found out.
        config: the skeleton's own copy of the configuration.
        blocks: the decoder blocks, each with its own Python state, parameters on meta.
        tied: alias -> name of the parameter that it shares.
        prologue_parameters: (name, shape) of all parameters used before the blocks, in model order.
        epilogue_parameters: (name, shape) of those used after the blocks only.
        epilogue_borrowed: names of prologue parameters that `loss` and `logits` need as well.
        frozen: names of parameters that the architecture itself marks as not trainable.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, facts: CutFacts) -> None:
        """Build the skeleton of `config` in `dtype` and cut it as `facts` say.

        Raises:
            UnsupportedModelError: the architecture cannot be built, or is not the one that was probed.
        """
        self.facts = facts
        self._skeleton = build_skeleton(config, dtype, facts.attn_implementation)
        self.config: PreTrainedConfig = self._skeleton.config
        self.frozen = frozenset(n for n, p in self._skeleton.named_parameters() if not p.requires_grad)
        owners = {id(p): name for name, p in self._skeleton.named_parameters()}
        self.tied = {
            name: owners[id(p)]
            for name, p in self._skeleton.named_parameters(remove_duplicate=False)
            if owners[id(p)] != name
        }
        self.blocks = tuple(self._take_blocks_out())
        self._hidden_names = [next(iter(inspect.signature(b.forward).parameters)) for b in self.blocks]
        self._block_names = [
            {f"{facts.block_list}.{i}.{name}": name for name, _ in block.named_parameters()}
            for i, block in enumerate(self.blocks)
        ]
        self._refuse_shared_blocks()
        resident = [(name, tuple(p.shape)) for name, p in self._skeleton.named_parameters()]
        self.prologue_parameters = tuple(entry for entry in resident if entry[0] in facts.prologue)
        self.epilogue_parameters = tuple(
            entry for entry in resident if entry[0] in facts.epilogue - facts.prologue
        )
        self.epilogue_borrowed = tuple(
            name for name, _ in self.prologue_parameters if name in facts.epilogue
        )
        for name, _ in resident:
            if name not in facts.prologue | facts.epilogue:
                self._refuse(f"parameter {name} takes no part in computing the loss of a text")
        # Stand-ins for the embeddings while the epilogue runs `forward`: one element, strides of zero.
        self._placeholders = {
            name: torch.zeros((), dtype=dtype).expand(shape) for name, shape in self.prologue_parameters
        }
        self._loss_function = self._skeleton.loss_function
        self._visit: Callable[[int, Tensor, BlockCall], Tensor] = _outside_a_run

    def block_parameters(self, index: int) -> tuple[ParameterShape, ...]:
        """(name, shape) of the parameters of block `index`, in model order."""
        shapes = dict(self.blocks[index].named_parameters())
        return tuple((full, tuple(shapes[name].shape)) for full, name in self._block_names[index].items())

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off, as `nn.Module.train`; a new CutModel is in training mode."""
        self._skeleton.train(mode)
        for block in self.blocks:
            block.train(mode)

    def new_cache(self) -> Cache:
        """An empty key-value cache for one generation; `record` takes it, the blocks fill it."""
        return DynamicCache(config=self.config)

    def record(
        self, parameters: Mapping[str, Tensor], micro_batch: MicroBatch, past_key_values: Cache | None = None
    ) -> tuple[Tensor, tuple[BlockCall, ...]]:
        """Run the model up to its first block and note how it calls each block.

        With grad enabled the hidden state is connected to the prologue parameters; the calls never are.

        Args:
            parameters: at least the prologue parameters.
            micro_batch: the tokens; `shift_labels` are not looked at. With a cache: the new tokens only.
            past_key_values: the cache of a generation; None = no cache, as in training.

        Returns:
            The first hidden state [B, T, H], and one call per block.
        """
        calls: list[BlockCall] = []
        first: list[Tensor] = []

        def note(index: int, hidden: Tensor, call: BlockCall) -> Tensor:
            if index != len(calls):
                self._refuse(f"its forward calls block {index} when it is the turn of block {len(calls)}")
            first[:] = first or [hidden]
            if hidden is not first[0]:
                self._refuse(f"its forward changes the hidden state before block {index}, outside the blocks")
            calls.append(call)
            if len(calls) == len(self.blocks):
                raise _AllBlocksCalledError
            return hidden

        inputs: dict[str, object] = {"input_ids": micro_batch.input_ids}
        optional = {
            "position_ids": micro_batch.position_ids,
            "attention_mask": micro_batch.attention_mask,
            "past_key_values": past_key_values,
            "use_cache": None if past_key_values is None else True,
        }
        inputs.update({name: value for name, value in optional.items() if value is not None})
        bound = {name: parameters[name] for name, _ in self.prologue_parameters}
        try:
            self._forward(note, bound, inputs)
        except _AllBlocksCalledError:
            return first[0], tuple(calls)
        self._refuse(f"its forward calls {len(calls)} of {len(self.blocks)} blocks")

    def run_block(
        self, index: int, parameters: Mapping[str, Tensor], hidden: Tensor, call: BlockCall
    ) -> Tensor:
        """Run block `index` on `hidden` [B, T, H] with its own `call` of the same micro-batch.

        Returns:
            The hidden state behind the block, [B, T, H]. A cache in `call` is filled.
        """
        bound = {name: parameters[full] for full, name in self._block_names[index].items()}
        output = functional_call(self.blocks[index], bound, (hidden, *call.args), call.kwargs)
        result: Tensor = output if self.facts.output_entries is None else output[0]
        return result

    def loss(
        self,
        parameters: Mapping[str, Tensor],
        hidden: Tensor,
        shift_labels: Tensor,
        num_items_in_batch: int | Tensor,
    ) -> Tensor:
        """Sum of the token losses of a slice, divided by `num_items_in_batch`, by the model's own code.

        Args:
            parameters: at least the epilogue parameters and the borrowed ones.
            hidden: output of the last block for some tokens, [B, t, H].
            shift_labels: int64 [B, t], as in MicroBatch.
            num_items_in_batch: trained tokens of the whole step; a tensor and an int may differ in the
                last bit on CUDA, where torch multiplies by the inverse of a number.

        Returns:
            A scalar. Summed over the slices of a step it is the mean loss per trained token.
        """
        used = False

        def loss_of_shifted(
            logits: Tensor, labels: Tensor | None = None, *args: object, **kwargs: object
        ) -> Tensor:
            nonlocal used
            used = True
            kwargs.update(num_items_in_batch=num_items_in_batch, shift_labels=shift_labels)
            result: Tensor = self._loss_function(logits, labels, *args, **kwargs)
            return result

        self._skeleton.loss_function = loss_of_shifted
        try:
            loss: Tensor = self._run_epilogue(parameters, hidden, {"labels": shift_labels}).loss
        finally:
            self._skeleton.loss_function = self._loss_function
        if not used:
            self._refuse("it computes its loss without transformers' loss_function")
        return loss

    def logits(self, parameters: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Next-token scores [B, t, V] of hidden states [B, t, H] behind the last block."""
        logits: Tensor = self._run_epilogue(parameters, hidden, {}).logits
        return logits

    def _run_epilogue(
        self, parameters: Mapping[str, Tensor], hidden: Tensor, inputs: dict[str, Tensor]
    ) -> CausalLMOutputWithPast:
        needed = [name for name, _ in self.epilogue_parameters] + list(self.epilogue_borrowed)
        bound = self._placeholders | {name: parameters[name] for name in needed}
        # `forward` insists on embedding something; what comes of it is dropped at the first block.
        input_ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return self._forward(lambda _index, _hidden, _call: hidden, bound, {"input_ids": input_ids, **inputs})

    def _forward(
        self,
        visit: Callable[[int, Tensor, BlockCall], Tensor],
        bound: dict[str, Tensor],
        inputs: Mapping[str, object],
    ) -> CausalLMOutputWithPast:
        self._visit = visit
        try:
            output: CausalLMOutputWithPast = functional_call(self._skeleton, bound, (), dict(inputs))
        finally:
            self._visit = _outside_a_run
        return output

    def _called(self, index: int, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """A stub was called in place of block `index`."""
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop(self._hidden_names[index])
        output = self._visit(index, hidden, BlockCall(args[1:], rest))
        entries = self.facts.output_entries
        return output if entries is None else (output, *[None] * (entries - 1))

    def _take_blocks_out(self) -> Iterator[nn.Module]:
        try:
            block_list = self._skeleton.get_submodule(self.facts.block_list)
        except AttributeError:
            self._refuse(f"it has no module list {self.facts.block_list}; probe it again")
        for index, block in enumerate(block_list):
            block_list[index] = _Stub(block, partial(self._called, index))
            yield block

    def _refuse_shared_blocks(self) -> None:
        seen = {id(p): name for name, p in self._skeleton.named_parameters()}
        for index, block in enumerate(self.blocks):
            for name, parameter in block.named_parameters(remove_duplicate=False):
                full = f"{self.facts.block_list}.{index}.{name}"
                if seen.setdefault(id(parameter), full) != full:
                    self._refuse(f"{full} is the same parameter as {seen[id(parameter)]}")

    def _refuse(self, reason: str) -> NoReturn:
        message = f"{self.facts.model_type}: {reason}"
        raise UnsupportedModelError(message)


class _Stub(nn.Module):
    """Stands where a block was; its attributes are the block's, calling it tells the CutModel."""

    def __init__(self, block: nn.Module, called: Callable[..., object]) -> None:
        super().__init__()
        # Past nn.Module's registration: the skeleton must not list the block's parameters.
        self.__dict__.update(_block=block, _called=called)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._called(args, kwargs)


class _AllBlocksCalledError(Exception):
    """Ends `forward` once the last block has been recorded; the head is not wanted then."""


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Keeps constructors from reserving and filling memory for parameters not registered yet."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros):
            without_memory = func(*args, **{**kwargs, "device": "meta"})
            if without_memory.numel() >= _META_FROM_ELEMENTS:
                return without_memory
        # Drawing random numbers for a tensor without memory takes a millisecond each time.
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return func(*args, **kwargs)


def _outside_a_run(index: int, hidden: Tensor, call: BlockCall) -> Tensor:
    raise AssertionError


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        with _LargeTensorsOnMeta():
            yield
    finally:
        hook.remove()
