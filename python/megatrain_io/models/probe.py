"""The probe at the start: find out how an architecture is partitioned, and prove on a small copy that it is right.

The copy has random weights and is trained on a few tokens twice: as the stock model does it, and block by
block through the partitioned model. Only if all losses and gradients agree to the bit is the architecture accepted.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import UnsupportedModelError
from megatrain_io.models.meta_model import build_meta_model, find_block_list
from megatrain_io.models.partition import BlockCall, PartitionedModel, PartitionSpec
from megatrain_io.models.shrink import shrink_config

__all__ = ["probe"]

_DTYPE = torch.float32
_SEED = 20
_IGNORED = -100
_SMALL_PARAMETERS_MAX = 1 << 25
# Relative change of a score: rounding makes less of a token out of sight, a token in sight makes more.
_IN_SIGHT = 1e-4
_NO_WAY = "this architecture cannot be trained here, choose another"


class _RefusedError(Exception):
    """Says why the architecture is refused; `probe` puts the model type in front."""


def probe(
    config: PreTrainedConfig,
    *,
    attn_implementation: str | None = None,
    block_list: str | None = None,
    small_config: PreTrainedConfig | None = None,
) -> PartitionSpec:
    """Find out how models of this architecture are partitioned, and prove it on a small copy.

    Random number generators, warning filters and log levels are left as they were.

    Args:
        config: of the model to be trained; it is not changed.
        attn_implementation: "sdpa", "eager", or None for sdpa where the architecture has it, else eager.
        block_list: name of the module list of decoder blocks, where transformers does not mark it.
        small_config: a small configuration of the same class, where the probe's own does not work.

    Raises:
        UnsupportedModelError: the model cannot be trained block by block to the stock model's results. The
            message names the model type, what went wrong, and what to do.
    """
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_SEED)
            return _probe(config, attn_implementation, block_list, small_config)
    except UnsupportedModelError:
        raise
    except _RefusedError as refusal:
        raise UnsupportedModelError(f"{config.model_type}: {refusal}") from None
    except Exception as cause:
        raise UnsupportedModelError(
            f"{config.model_type}: a small copy of the model failed with {type(cause).__name__}: "
            f"{' '.join(str(cause).split())}; if the model itself works, give the probe a small configuration "
            f"of it with small_config="
        ) from cause


def _probe(
    config: PreTrainedConfig,
    attn_implementation: str | None,
    block_list: str | None,
    small_config: PreTrainedConfig | None,
) -> PartitionSpec:
    if getattr(config, "quantization_config", None) is not None:
        raise _RefusedError("its weights are quantised; take the original model in float32 or bfloat16")
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise _RefusedError("output_router_logits adds a loss over all blocks at once; set it to false")
    small = shrink_config(config) if small_config is None else small_config
    stock = _stock_model(small, attn_implementation)
    vocabulary = stock.config.get_text_config().vocab_size
    one, two, packed = (_random_tokens(vocabulary, *shape) for shape in ((2, 11), (1, 7), (1, 9)))
    packed = replace(packed, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    _refuse_unless_causal(stock, two)
    spec = _observe(stock, one, find_block_list(stock) if block_list is None else block_list)
    spec = replace(
        spec, attn_implementation=attn_implementation, packs=_keeps_apart(stock, packed, boundary=4)
    )
    micro_batches = [one, two, packed] if spec.packs else [one, two]
    _refuse_unless_equal(stock, PartitionedModel(small, _DTYPE, spec), micro_batches)
    return spec


def _stock_model(config: PreTrainedConfig, attn_implementation: str | None) -> PreTrainedModel:
    model = build_meta_model(config, _DTYPE, attn_implementation)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > _SMALL_PARAMETERS_MAX:
        raise _RefusedError(
            f"its small copy would have {size:,} parameters; give the probe a configuration of at most "
            f"{_SMALL_PARAMETERS_MAX:,} with small_config="
        )
    config = copy.deepcopy(config)  # transformers writes into it
    stock: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=_DTYPE, attn_implementation=attn_implementation
    )
    stock.config.use_cache = False
    with torch.no_grad():
        for parameter in stock.parameters():
            # Initial weights hide mistakes: biases of zero, norms of one, attention that sees all alike.
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    stock.train()
    return stock


def _random_tokens(vocabulary: int, batch: int, tokens: int) -> MicroBatch:
    text = torch.randint(1, vocabulary, (batch, tokens))
    shift_labels = torch.cat([text[:, 1:], torch.full((batch, 1), _IGNORED)], dim=1)
    shift_labels[:, : tokens // 3] = _IGNORED
    return MicroBatch(text, shift_labels)


def _refuse_unless_causal(stock: PreTrainedModel, micro_batch: MicroBatch) -> None:
    changed = micro_batch.input_ids.clone()
    changed[:, -1] = 1 + changed[:, -1] % 2
    before, after = _scores(stock, micro_batch.input_ids), _scores(stock, changed)
    if not _alike(before[:, :-1], after[:, :-1]):
        raise _RefusedError(
            "it looks at later tokens; configure it as a decoder (is_decoder) or choose another"
        )


def _keeps_apart(stock: PreTrainedModel, packed: MicroBatch, boundary: int) -> bool:
    """Whether the second document of a packed row gets the scores that it gets alone."""
    row = _scores(stock, packed.input_ids, position_ids=packed.position_ids)
    return _alike(row[:, boundary:], _scores(stock, packed.input_ids[:, boundary:]))


@torch.no_grad()
def _scores(stock: PreTrainedModel, input_ids: Tensor, **inputs: Tensor | None) -> Tensor:
    return cast("Tensor", stock(input_ids=input_ids, **inputs).logits)


def _alike(some: Tensor, others: Tensor) -> bool:
    return bool((some - others).abs().max() < _IN_SIGHT * some.abs().max())


def _observe(stock: PreTrainedModel, micro_batch: MicroBatch, block_list: str) -> PartitionSpec:
    """Watch the stock model call its blocks; `packs` and `attn_implementation` are not known here."""
    try:
        blocks = list(cast("nn.ModuleList", stock.get_submodule(block_list)))
    except (AttributeError, TypeError):
        raise _RefusedError(f"it has no module list {block_list}; see named_modules() of the model") from None
    resident = {
        name: parameter
        for name, parameter in stock.named_parameters()
        if not name.startswith(f"{block_list}.")
    }
    frozen = [parameter for parameter in resident.values() if not parameter.requires_grad]
    witness = _Witness(len(blocks))
    with ExitStack() as undo:
        for parameter in frozen:
            parameter.requires_grad_()
            undo.callback(parameter.requires_grad_, False)
        for index, block in enumerate(blocks):
            before, after = partial(witness.before, index), partial(witness.after, index)
            undo.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(block.register_forward_hook(after).remove)
        loss = _stock_loss(stock, micro_batch, 1)
        if witness.called != list(range(len(blocks))):
            raise _RefusedError(
                f"its forward pass calls the blocks of {block_list} in the order {witness.called}; {_NO_WAY}"
            )
        embedding, head = _used(witness.first_hidden, resident), _used([loss], resident)
    for name in resident:
        if name not in embedding | head:
            raise _RefusedError(
                f"parameter {name} takes no part in the loss of a text; use the configuration of the text "
                f"model alone (get_text_config())"
            )
    if len(witness.output_entries) != 1:
        raise _RefusedError(
            f"its blocks return now a tensor, now a tuple, or tuples of two lengths; {_NO_WAY}"
        )
    return PartitionSpec(
        model_type=stock.config.model_type,
        attn_implementation=None,
        block_list=block_list,
        output_entries=witness.output_entries.pop(),
        embedding=embedding,
        head=head,
        packs=False,
    )


@dataclass
class _Witness:
    """Hooks that note how blocks are called, and cut the graph behind the last one."""

    count: int
    called: list[int] = field(default_factory=list)
    first_hidden: list[Tensor] = field(default_factory=list)
    output_entries: set[int | None] = field(default_factory=set)

    def before(self, index: int, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *others = tree_leaves((args, kwargs))
        if not self.called:
            self.first_hidden.append(hidden)
        self.called.append(index)
        if any(isinstance(other, Tensor) and other.requires_grad for other in others):
            raise _RefusedError(
                f"its blocks take inputs besides the hidden state that carry gradient, which would be lost; "
                f"{_NO_WAY}"
            )

    def after(self, index: int, _block: nn.Module, _args: object, output: Any) -> object:
        is_tuple = isinstance(output, tuple | list)
        self.output_entries.add(len(output) if is_tuple else None)
        if index < self.count - 1:
            return output
        return (output[0].detach(), *output[1:]) if is_tuple else output.detach()


def _used(outputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the parameters that the outputs depend on."""
    ones = [torch.ones_like(output) for output in outputs]
    gradients = _gradients(outputs, list(parameters.values()), ones)
    return frozenset(
        name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None
    )


def _gradients(
    outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Any = None
) -> tuple[Tensor | None, ...]:
    """What `torch.autograd.grad` returns, with None for inputs that are not used, which it does not declare."""
    return torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)


def _stock_loss(stock: PreTrainedModel, micro_batch: MicroBatch, num_items_in_batch: int) -> Tensor:
    """The stock model's loss, from labels that it shifts itself."""
    ignored = torch.full_like(micro_batch.shift_labels[:, :1], _IGNORED)
    labels = torch.cat([ignored, micro_batch.shift_labels[:, :-1]], dim=1)
    inputs = {} if micro_batch.position_ids is None else {"position_ids": micro_batch.position_ids}
    own = stock.loss_function
    # Not every forward passes num_items_in_batch on.
    stock.loss_function = lambda *args, **kwargs: own(
        *args, **{**kwargs, "num_items_in_batch": num_items_in_batch}
    )
    try:
        return cast("Tensor", stock(input_ids=micro_batch.input_ids, labels=labels, **inputs).loss)
    finally:
        stock.loss_function = own


def _refuse_unless_equal(
    stock: PreTrainedModel, partition: PartitionedModel, micro_batches: Sequence[MicroBatch]
) -> None:
    trained = {
        name: parameter for name, parameter in stock.named_parameters() if name not in partition.frozen
    }
    items = sum(int((micro_batch.shift_labels != _IGNORED).sum()) for micro_batch in micro_batches)
    leaves = {name: parameter.detach() for name, parameter in stock.named_parameters()}
    for name in trained:
        leaves[name].requires_grad_()
    passes = _layer_major(partition, leaves, micro_batches, items)
    for micro_batch, own in zip(micro_batches, passes, strict=True):
        loss = _stock_loss(stock, micro_batch, items)
        if not torch.equal(own.loss, loss):
            raise _RefusedError(f"block by block its loss is {own.loss}, not {loss} as in memory; {_NO_WAY}")
        gradients = _gradients(loss, list(trained.values()))
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is None:
                raise _RefusedError(
                    f"no gradient reaches parameter {name}, so it cannot be trained; freeze or drop it"
                )
            if name not in own.gradients or not torch.equal(own.gradients[name], gradient):
                raise _RefusedError(f"block by block the gradient of {name} is not as in memory; {_NO_WAY}")


@dataclass
class _Pass:
    """One micro-batch on its way: gradients are not summed over micro-batches, so orders do not matter."""

    calls: tuple[BlockCall, ...]
    hiddens: list[Tensor]
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
    with torch.no_grad():
        for micro_batch in micro_batches:
            hidden, calls = partition.record(leaves, micro_batch)
            passes.append(_Pass(calls, [hidden]))
        for index in range(len(partition.blocks)):
            for each in passes:
                each.hiddens.append(partition.run_block(index, leaves, each.hiddens[-1], each.calls[index]))
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
            output = partition.run_block(index, leaves, hidden, each.calls[index])
            inputs = [hidden, *(leaves[name] for name in names)]
            each.grad_hidden, *gradients = _gradients(output, inputs, each.grad_hidden)
            each.add(names, gradients)
    names = [name for name, _ in partition.embedding_parameters if leaves[name].requires_grad]
    for each, micro_batch in zip(passes, micro_batches, strict=True):
        hidden, _ = partition.record(leaves, micro_batch)
        each.add(names, _gradients(hidden, [leaves[name] for name in names], each.grad_hidden))
    return passes


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and logs inside: those about the small copy are of no use to the person."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
