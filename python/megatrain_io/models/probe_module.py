"""The probe of a module that somebody wrote: how it is partitioned, and the proof on a small instance of it.

As ``probe`` does it for transformers' architectures, but the module itself is all that there is: no configuration to
shrink, no marks on its blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.loss.loss_utils import ForCausalLMLoss

from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import ConfigError, UnsupportedModelError
from megatrain_io.models.causal_lm import ModuleLM, module_name, replace_parameters
from megatrain_io.models.meta_model import module_lists
from megatrain_io.models.partition import PartitionedModel, PartitionSpec
from megatrain_io.models.preserved import preserved
from megatrain_io.models.proof import (
    CannotBePartitionedError,
    InMemoryLoss,
    RefusedError,
    find_unreached,
    noisy,
    observe,
    prove,
    random_tokens,
    refuse_unless_positions_are_alone,
)

__all__ = ["SMALL_PARAMETERS_MAX", "OwnModule", "probe_module"]

SMALL_PARAMETERS_MAX = 1 << 25
"""Most parameters of a module that is passed through whole, to prove how it is partitioned."""

_SEED = 20
_TOKENS_MAX = 128
_WHAT_TO_DO = (
    "forward must call each block once, in order, each with the hidden state that the one before it returned, and "
    "blocks must hand nothing else on"
)


@dataclass(frozen=True)
class OwnModule:
    """A module that somebody wrote, and what its author says of it.

    Attributes:
        module: to be trained; it is not changed.
        blocks: name of the module list of its blocks.
        small: a module of the same class with few and small blocks; None = ``module`` itself, if it has at most
            ``SMALL_PARAMETERS_MAX`` parameters; else there is no proof, and its shapes alone are looked at.
    """

    module: nn.Module
    blocks: str
    small: nn.Module | None = None


def probe_module(own: OwnModule) -> tuple[PartitionSpec, list[str]]:
    """Find out how a module is partitioned, and prove it on a copy of a small instance, with noise on its weights.

    Random number generators are left as they were.

    Returns:
        How it is partitioned, and a sentence where that was not proved.

    Raises:
        UnsupportedModelError: it cannot be trained block by block to the results in memory. The message names the
            class, what went wrong, and what to do.
        ConfigError: it has no such list, or ``small`` is no instance of its class.
    """
    module, blocks, small = own.module, own.blocks, own.small
    name = module_name(module)
    if small is not None and type(small) is not type(module):
        raise ConfigError(
            f"small is a {module_name(small)}, and the module a {name}: give one of the same class"
        )
    for each in (module, *([] if small is None else [small])):
        _refuse_structure(each, blocks)
    whole = module if small is None else small
    count = sum(parameter.numel() for parameter in whole.parameters())
    if small is not None and count > SMALL_PARAMETERS_MAX:
        raise ConfigError(
            f"small has {count:,} parameters: give an instance of at most {SMALL_PARAMETERS_MAX:,}"
        )
    try:
        with preserved(()):
            torch.default_generator.manual_seed(_SEED)
            if count <= SMALL_PARAMETERS_MAX:
                return _proved(whole, name, blocks), []
            unproved = (
                f"{name} has {count:,} parameters and no small instance was given: it was not proved that block by "
                f"block it has the bits that it has in memory. Give small=, an instance of at most "
                f"{SMALL_PARAMETERS_MAX:,}"
            )
            return _looked_at(whole, name, blocks), [unproved]
    except (UnsupportedModelError, ConfigError):
        raise
    except CannotBePartitionedError as refusal:
        raise UnsupportedModelError(f"{name}: {refusal}: {_WHAT_TO_DO}") from None
    except RefusedError as refusal:
        raise UnsupportedModelError(f"{name}: {refusal}") from None
    except Exception as cause:
        raise UnsupportedModelError(
            f"{name}: passing a few tokens through it failed with {type(cause).__name__}: "
            f"{' '.join(str(cause).split())}. It is called with int64 tokens [B, T], and its blocks run one by one: "
            f"{_WHAT_TO_DO}"
        ) from cause


def _refuse_structure(module: nn.Module, blocks: str) -> None:
    """Refuse what can be seen without a pass.

    Raises:
        ConfigError: there is no such module list.
        UnsupportedModelError: a parameter belongs to no single block.
    """
    name, lists = module_name(module), list(module_lists(module))
    if blocks not in lists:
        there = f"it has {', '.join(lists)}" if lists else "it has none: put its blocks into an nn.ModuleList"
        raise ConfigError(f"{name} has no module list {blocks!r} with blocks in it: {there}")
    owners: dict[int, str] = {}
    for full, parameter in module.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), full)
        if owner != full and f"{blocks}." in f"{owner} {full}":
            raise UnsupportedModelError(
                f"{name}: {owner} and {full} are one parameter. Only embedding and head may share parameters, as each "
                "block is in RAM alone: give each its own"
            )


def _proved(small: nn.Module, name: str, blocks: str) -> PartitionSpec:
    """Observe an instance in memory, and compare it with itself block by block."""
    lm = ModuleLM(small, torch.float32)
    stock = replace_parameters(small, lambda parameter: noisy(_values(parameter))).cpu().train()
    loss_of = partial(_loss_in_memory, stock, lm)
    tokens_of = _tokens_below(_vocabulary(stock, lm, name))
    one, two = tokens_of(2, 11), tokens_of(1, 7)
    is_random = _watch_a_pass(stock, name, partial(loss_of, one, 1))
    if is_random:
        stock.eval()  # random numbers are drawn in another order block by block
    spec = _spec_of(stock, name, blocks, [one, two], loss_of)

    def partitioned(spec: PartitionSpec) -> PartitionedModel:
        partition = PartitionedModel(small, torch.float32, spec)
        partition.train(not is_random)
        return partition

    spec, partition = prove(stock, spec, partitioned, [one, two], loss_of)
    refuse_unless_positions_are_alone(partition, dict(stock.named_parameters()), one)
    return spec


def _looked_at(module: nn.Module, name: str, blocks: str) -> PartitionSpec:
    """Observe the shapes of a module that is too large to be passed through."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = {id(each): torch.empty(each.shape) for each in module.parameters()}
    stock = replace_parameters(module, lambda parameter: fake[id(parameter)]).train()
    tokens, lm = _tokens_below(2)(1, 7), ModuleLM(module, torch.float32)
    with mode:
        return _spec_of(stock, name, blocks, [tokens], partial(_loss_in_memory, stock, lm))


def _spec_of(
    stock: nn.Module, name: str, blocks: str, micro_batches: Sequence[MicroBatch], loss_of: InMemoryLoss
) -> PartitionSpec:
    seen = observe(stock, micro_batches[0], blocks, loss_of)
    if not seen.embedding:
        raise RefusedError("what enters its first block depends on no parameter: there must be an embedding")
    return PartitionSpec(
        model_type=name,
        attn_implementation=None,
        block_list=blocks,
        output_entries=seen.output_entries,
        embedding=seen.embedding,
        head=seen.head.union(seen.unused),
        packs=False,
        kept=seen.kept,
        unreached=find_unreached(stock, micro_batches, blocks, loss_of, seen.skipped),
        sides=seen.sides,
        axes=seen.axes,
        shares=seen.shares,
        skips=bool(seen.skipped),
    )


def _watch_a_pass(stock: nn.Module, name: str, run: Callable[[], object]) -> bool:
    """Pass forward once; returns whether random numbers were drawn.

    Raises:
        UnsupportedModelError: a buffer was changed.
    """
    buffers = {each: tensor.clone() for each, tensor in stock.named_buffers()}
    before = torch.get_rng_state()
    run()
    for each, tensor in stock.named_buffers():
        if not torch.equal(tensor, buffers[each]):
            raise UnsupportedModelError(
                f"{name}: training changes buffer {each}, and buffers are not kept with the state: use layers without "
                "running statistics"
            )
    return not torch.equal(before, torch.get_rng_state())


def _loss_in_memory(stock: nn.Module, lm: ModuleLM, micro_batch: MicroBatch, num_items: int) -> Tensor:
    args, kwargs = lm.inputs(micro_batch, None)
    logits = lm.logits(stock(*args, **kwargs))
    loss: Tensor = ForCausalLMLoss(
        logits,
        None,
        logits.shape[-1],
        shift_labels=micro_batch.shift_labels,
        num_items_in_batch=num_items,  # type: ignore[arg-type]  # which takes a number, too
    )
    return loss


@torch.no_grad()
def _vocabulary(stock: nn.Module, lm: ModuleLM, name: str) -> int:
    """Number of scores of a token, from a pass."""
    tokens = torch.zeros((1, 2), dtype=torch.int64)
    with _eval(stock):
        logits = lm.logits(stock(tokens))
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:  # noqa: PLR2004 - [B, T, V]
        raise UnsupportedModelError(
            f"{name}: for tokens {list(tokens.shape)} forward returned scores {list(logits.shape)}: it must be "
            "[B, T, V], scores of the next token for every position"
        )
    return logits.shape[-1]


def _tokens_below(vocabulary: int) -> Callable[[int, int], MicroBatch]:
    return partial(random_tokens, max(2, min(vocabulary, _TOKENS_MAX)))


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    module.eval()
    yield
    module.train()


def _values(parameter: nn.Parameter) -> Tensor:
    """Its values in fp32; zeros where it has none."""
    if parameter.is_meta:
        return torch.zeros(parameter.shape)
    return parameter.detach().float().cpu()
