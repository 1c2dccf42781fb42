"""The start-up probe: find out how an architecture is cut, and prove on a small copy that it works.

A few-layer copy with random weights is trained for one step twice: by the stock model, and block by block
through the cut model. Only if losses and all gradients agree to the bit is the architecture accepted.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn
import warnings

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from megatrain_io.errors import UnsupportedModelError
from megatrain_io.miniature import shrink
from megatrain_io.model import BlockCall, CutFacts, CutModel, MicroBatch, find_block_list

__all__ = ["probe"]

_DTYPE = torch.float32
_SEED = 20


def probe(
    config: PreTrainedConfig,
    *,
    attn_implementation: str | None = None,
    block_list: str | None = None,
    miniature: PreTrainedConfig | None = None,
) -> CutFacts:
    """Find out how models of this architecture are cut, and prove it on a small copy.

    Args:
        config: the model to be trained; it is not changed.
        attn_implementation: "sdpa", "eager", or None for sdpa where the architecture has it.
        block_list: name of the module list of decoder blocks, where transformers does not mark it.
        miniature: a small configuration of the same class, where shrinking `config` does not work.

    Raises:
        UnsupportedModelError: the model cannot be trained block by block with the stock model's results;
            the message names the model type, what went wrong, and what to do.
    """
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return _probe(config, attn_implementation, block_list, miniature)
    except UnsupportedModelError:
        raise
    except Exception as cause:
        message = (
            f"{config.model_type}: a small copy of the model failed with {type(cause).__name__}: {cause}; "
            f"if the model itself is sound, hand a small configuration of it to probe(miniature=...)"
        )
        raise UnsupportedModelError(message) from cause


def _probe(
    config: PreTrainedConfig,
    attn_implementation: str | None,
    block_list: str | None,
    miniature: PreTrainedConfig | None,
) -> CutFacts:
    refuse = _Refusal(config.model_type)
    _check_configuration(config, refuse)
    small = shrink(config) if miniature is None else miniature
    stock = _stock_model(small, attn_implementation, refuse)
    micro_batches = _micro_batches(small)
    facts = _observe(stock, micro_batches[0], block_list, refuse)
    _compare(stock, CutModel(small, _DTYPE, facts), micro_batches, refuse)
    return facts


class _Refusal:
    """Raises with the model type in front."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type

    def __call__(self, reason: str) -> NoReturn:
        message = f"{self.model_type}: {reason}"
        raise UnsupportedModelError(message)


def _check_configuration(config: PreTrainedConfig, refuse: _Refusal) -> None:
    if getattr(config, "quantization_config", None) is not None:
        refuse("the weights are quantised; training needs the original model in float32 or bfloat16")
    if getattr(config.get_text_config(), "output_router_logits", False):
        refuse("output_router_logits adds a loss over all blocks at once; set it to false")


def _stock_model(
    config: PreTrainedConfig, attn_implementation: str | None, refuse: _Refusal
) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=_DTYPE, attn_implementation=attn_implementation, trust_remote_code=False
        )
    except Exception as cause:  
        raise
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.parameters():
            # Initial weights hide mistakes: zero biases, norms of one, attention that sees all alike.
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.train()


def _micro_batches(config: PreTrainedConfig) -> list[MicroBatch]:
    vocab_size = config.get_text_config().vocab_size
    return [_random_tokens(vocab_size, *shape) for shape in ((2, 11), (1, 7))]


def _random_tokens(vocab_size: int, batch: int, tokens: int) -> MicroBatch:
    text = torch.randint(1, vocab_size, (batch, tokens + 1))
    shift_labels = text[:, 1:].clone()
    shift_labels[:, : tokens // 3] = -100
    shift_labels[:, -1] = -100
    return MicroBatch(input_ids=text[:, :-1], shift_labels=shift_labels)


def _observe(stock, micro_batch, block_list, refuse) -> CutFacts:
    name = find_block_list(stock) if block_list is None else block_list
    blocks = stock.get_submodule(name)
    resident = {n: p for n, p in stock.named_parameters() if not n.startswith(f"{name}.")}
    seen_first = []
    outputs = []
    def before(module, args, kwargs):
        hidden = args[0] if args else kwargs.get("hidden_states")
        seen_first.append(hidden)
        leaves = tree_leaves((args[1:], {k: v for k, v in kwargs.items() if v is not hidden}))
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            refuse(
                "its blocks take further inputs that carry gradient besides the hidden state, which a "
                "block-by-block backward pass would lose; this architecture cannot be trained here"
            )
    def after(module, args, kwargs, output):
        outputs.append(output)
        if module is blocks[-1]:
            return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()
        return None
    hooks = []
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(block.register_forward_hook(after, with_kwargs=True))
    try:
        loss = _stock_loss(stock, micro_batch, 1)
    finally:
        for h in hooks: h.remove()
    entries = {len(o) if isinstance(o, tuple) else None for o in outputs}
    if len(entries) != 1: refuse("mixed")
    used = lambda out: frozenset(n for n, g in zip(resident, torch.autograd.grad(out, [p.requires_grad_() for p in resident.values()], torch.ones_like(out), allow_unused=True)) if g is not None)
    return CutFacts(
        model_type=refuse.model_type, attn_implementation=stock.config._attn_implementation, block_list=name,
        output_entries=entries.pop(), prologue=used(seen_first[0]), epilogue=used(loss), packs=False)


def _stock_loss(stock: PreTrainedModel, micro_batch: MicroBatch, num_items_in_batch: int) -> Tensor:
    labels = torch.cat([torch.full_like(micro_batch.shift_labels[:, :1], -100), micro_batch.shift_labels[:, :-1]], 1)
    own = stock.loss_function
    stock.loss_function = lambda *a, **k: own(*a, **{**k, "num_items_in_batch": num_items_in_batch})
    try:
        return stock(input_ids=micro_batch.input_ids, labels=labels).loss
    finally:
        stock.loss_function = own


def _compare(stock, cut: CutModel, micro_batches: list[MicroBatch], refuse) -> None:
    named = dict(stock.named_parameters())
    trainable = [n for n, p in named.items() if p.requires_grad and n not in cut.frozen]
    items = sum(int((m.shift_labels != -100).sum()) for m in micro_batches)
    params = {n: p.detach().requires_grad_(n in trainable) for n, p in named.items()}
    paged = _paged(cut, params, set(trainable), micro_batches, items, refuse)
    for m, (loss, grads) in zip(micro_batches, paged):
        sl = _stock_loss(stock, m, items)
        sg = torch.autograd.grad(sl, [named[n] for n in trainable], allow_unused=True)
        for n, g in zip(trainable, sg):
            if g is None: refuse(f"parameter {n} gets no gradient")
        if not torch.equal(loss, sl): refuse(f"loss differs {loss} {sl}")
        bad = []
        for n, g in zip(trainable, sg):
            if n not in grads: refuse(f"missing grad {n}")
            if not torch.equal(g, grads[n]): bad.append(n)
        if bad: refuse(f"gradients differ: {len(bad)} of {len(trainable)}, {bad[:3]}")


def _paged(cut, params, trainable, micro_batches, items, refuse):
    grads = [{} for _ in micro_batches]
    def add(g, names, values):
        for n, v in zip(names, values):
            if v is None: refuse(f"parameter {n} gets no gradient")
            g[n] = v if n not in g else g[n] + v
    saved, calls = [], []
    with torch.no_grad():
        for m in micro_batches:
            h, c = cut.record(params, m)
            saved.append([h]); calls.append(c)
        for i in range(len(cut.blocks)):
            for k in range(len(micro_batches)):
                saved[k].append(cut.run_block(i, params, saved[k][-1], calls[k][i]))
    losses, outs = [], []
    epi = [n for n, _ in cut.epilogue_parameters if n in trainable] + [n for n in cut.epilogue_borrowed if n in trainable]
    for k, m in enumerate(micro_batches):
        h = saved[k][-1].detach().requires_grad_()
        loss = cut.loss(params, h, m.shift_labels, items)
        gh, *gp = torch.autograd.grad(loss, [h, *[params[n] for n in epi]], allow_unused=True)
        add(grads[k], epi, gp); losses.append(loss.detach()); outs.append(gh)
    for i in reversed(range(len(cut.blocks))):
        names = [n for n, _ in cut.block_parameters(i) if n in trainable]
        for k, m in enumerate(micro_batches):
            h = saved[k][i].detach().requires_grad_()
            out = cut.run_block(i, params, h, calls[k][i])
            gh, *gp = torch.autograd.grad(out, [h, *[params[n] for n in names]], outs[k], allow_unused=True)
            outs[k] = gh; add(grads[k], names, gp)
    names = [n for n, _ in cut.prologue_parameters if n in trainable]
    for k, m in enumerate(micro_batches):
        h, _ = cut.record(params, m)
        gp = torch.autograd.grad(h, [params[n] for n in names], outs[k], allow_unused=True)
        add(grads[k], names, gp)
    return list(zip(losses, grads))


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of transformers about the small copy; the caller's model is not concerned."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
