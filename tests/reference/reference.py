"""The in-memory reference: a stock training loop on a stock transformers model.

The product is held to this file bit for bit; this file is never bent to fit the product. Read `train` first.

What the bits depend on besides this file: the processor, the versions of torch and transformers, and
`torch.set_num_threads`: some fp32 matrix products split their sums by thread (`tiny_config`: most gradients of some
steps differ between 1 and 2 threads, though the losses agree). It is left alone here; compare equal thread counts.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config
from transformers.loss.loss_utils import ForCausalLMLoss

MicroBatch = dict[str, Tensor]
"""`input_ids` and `labels`, int64 [1, T] both; labels unshifted, -100 where nothing is to be learnt."""


# ---------------------------------------------------------------------------------------------------- model and data


def tiny_config(family: Literal["llama", "qwen3"], tied: bool, **overrides: Any) -> PreTrainedConfig:
    """A small random decoder; the vocabulary is odd on purpose. `overrides` go by the config's own names."""
    arguments: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
    }
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[family]
    config: PreTrainedConfig = kind(**(arguments | overrides))
    return config


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The stock model in fp32 with its own random initialisation. Leaves the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    model.train()
    return model


def micro_batches(
    vocab_size: int, counts: Sequence[int], seed: int, lengths: tuple[int, int] = (7, 48)
) -> list[list[MicroBatch]]:
    """Random tokens for `len(counts)` steps: step i has `counts[i]` micro-batches, no two of equal length.

    The lengths T lie in `lengths`, both ends included. A quarter of the labels is -100, never the last one, so each
    micro-batch trains at least one token.
    """
    random = torch.Generator().manual_seed(seed)
    shortest, longest = lengths
    steps = []
    for count in counts:
        chosen = shortest + torch.randperm(longest - shortest + 1, generator=random)[:count]
        if len(chosen) < count:
            raise ValueError(f"{count} micro-batches cannot all differ in length within {lengths}")
        step = []
        for length in chosen.tolist():
            input_ids = torch.randint(vocab_size, (1, length), generator=random)
            ignored = torch.rand(1, length, generator=random) < 0.25
            ignored[:, -1] = False
            step.append({"input_ids": input_ids, "labels": input_ids.masked_fill(ignored, -100)})
        steps.append(step)
    return steps


# ---------------------------------------------------------------------------------------------------------- training


def is_matrix(_name: str, parameter: Tensor) -> bool:
    """The usual rule for weight decay: matrices and embeddings decay, norms and biases do not."""
    return parameter.ndim >= 2


@dataclass(frozen=True)
class Hyperparameters:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), in the names of torch."""

    lr: Sequence[float]
    """One learning rate for each step."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decays: Callable[[str, Tensor], bool] = is_matrix


@dataclass(frozen=True)
class Result:
    """What training left behind, by the parameter names of the stock model (a tied table has one name)."""

    losses: list[float]
    """One fp32 value for each step, held exactly by the float."""
    weight: dict[str, Tensor]
    """Of all parameters, each in the dtype that computes. The following hold what the optimizer moved, in fp32."""
    master: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    grad_norms: list[float] = field(default_factory=list)
    """One for each step, before clipping, by torch: the norm over all parameters with a gradient."""
    updates: dict[str, int] = field(default_factory=dict)
    """How often each was updated: torch's `step`."""


def round_half_away(master: Tensor) -> Tensor:
    """fp32 to bf16, to nearest, ties away from zero: upper 16 bits of (bits + 0x8000), wrapping.

    Not `.to(torch.bfloat16)`, which sends ties to even; the two differ at exact ties only.
    """
    bits = master.detach().contiguous().view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def untie(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """Give a tied head a leaf of its own, in place, so that autograd keeps its gradient apart from the embedding's.

    Returns the leaves of each of the model's parameter names, in the order in which their gradients are summed:
    [head, embedding] for a tied table, one leaf for all others.
    """
    leaves = {name: [parameter] for name, parameter in model.named_parameters()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)
        next(own for own in leaves.values() if own[0] is embedding.weight).insert(0, head.weight)
    return leaves


def accumulate(
    model: PreTrainedModel, leaves: dict[str, list[nn.Parameter]], step: Sequence[MicroBatch]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and fp32 gradients of one step: the mean over all trained tokens of all its micro-batches.

    Gradients come from autograd in the compute dtype, are cast to fp32 and added in fp32, one after the other: the
    micro-batches in order; for a tied table the head's of all micro-batches, then the embedding's of all. A parameter
    that no gradient reaches has none.
    """
    num_items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
    losses: list[Tensor] = []
    native: dict[nn.Parameter, list[Tensor]] = {
        leaf: [] for own in leaves.values() for leaf in own if leaf.requires_grad
    }
    for batch in step:
        loss = stock_loss(model, batch, num_items)
        loss.backward()
        losses.append(loss.detach())
        for leaf, gradients in native.items():
            if leaf.grad is not None:
                gradients.append(leaf.grad)
                leaf.grad = None
    terms = {
        name: [gradient for leaf in own for gradient in native.get(leaf, [])] for name, own in leaves.items()
    }
    summed = {name: sum_in_order(gradients) for name, gradients in terms.items() if gradients}
    return sum_in_order(losses).item(), summed


def stock_loss(model: PreTrainedModel, batch: MicroBatch, num_items: int) -> Tensor:
    """The model's own loss, a sum over tokens divided by `num_items`.

    Not every `forward` passes that number on to the loss, or takes it: the model's `loss_function` is given it, if it
    has one. Some (BART's decoder and its like) do not call it, and compare scores with labels as they are given, so
    that these must be shifted beforehand: their loss is what transformers' own function makes of the scores.
    """
    own = getattr(model, "loss_function", None)
    takes = inspect.signature(model.forward).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values())
    options = {"num_items_in_batch": num_items, "use_cache": False}
    is_called = own is None

    def of_all_items(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal is_called
        is_called = True
        loss: Tensor = own(*args, **{**kwargs, "num_items_in_batch": num_items})
        return loss

    if own is not None:
        model.loss_function = of_all_items
    try:
        output = model(
            **batch, **{name: value for name, value in options.items() if takes_all or name in takes}
        )
    finally:
        if own is not None:
            model.loss_function = own
    if is_called:
        loss: Tensor = output.loss
        return loss
    scores = output.logits
    return ForCausalLMLoss(scores, batch["labels"], scores.shape[-1], num_items_in_batch=num_items)  # type: ignore[arg-type]


def sum_in_order(terms: Sequence[Tensor]) -> Tensor:
    """((first + second) + third) + ... in fp32. The first is taken as it is, not added to zero: -0.0 stays -0.0."""
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total


def train(
    model: PreTrainedModel,
    steps: Sequence[Sequence[MicroBatch]],
    hyperparameters: Hyperparameters,
    compute_dtype: torch.dtype | None = torch.float32,
    bf16_source: bool = False,
    max_grad_norm: float | None = None,
    clip_coefficients: Sequence[float] | None = None,
    *,
    keep_in_fp32: Collection[str] = (),
    updated: Sequence[Collection[str]] | None = None,
    before_step: Callable[[PreTrainedModel, int], None] | None = None,
) -> Result:
    """Train a copy of `model` on `steps`, each a list of micro-batches, and return every bit of the outcome.

    With bf16, forward and backward run on bf16 weights, the optimizer on fp32 masters, and each weight is its
    master rounded by `round_half_away`, at the start and after each step; but for those in `keep_in_fp32`, as stock
    models have parameters that they keep so, and for those that need no gradient, which are rounded once, by torch.
    With fp32, weights and masters are equal. With None each parameter has the dtype that it has in `model`. Buffers
    keep their dtype, as in a stock model loaded in bf16. A parameter that no gradient reaches in a step does not move
    in it, nor does its own count of steps, as torch has it. Masters start as the model's values, or, for
    `bf16_source`, as these rounded to bf16, which is what the import of a bf16 checkpoint gives.

    Gradients are clipped by `torch.nn.utils.clip_grad_norm_` with `max_grad_norm`, or, for who takes the sum for the
    norm in another order, multiplied by the coefficient that is given for each step.

    A parameter without a gradient in a step is left alone by torch's AdamW, with its `step`: one that no micro-batch
    reached, and, with `updated`, one whose name is not among those of the step. `before_step` is called with the model
    and the number of each step, from 1 on.
    """
    model = copy.deepcopy(model)
    leaves = untie(model)
    dtypes = {
        name: torch.float32 if name in keep_in_fp32 else compute_dtype or own[0].dtype
        for name, own in leaves.items()
    }
    if wrong := {*dtypes.values()} - {torch.float32, torch.bfloat16}:
        raise ValueError(f"compute_dtype must be float32 or bfloat16, not {wrong.pop()}")
    masters = {name: nn.Parameter(own[0].detach().float().clone()) for name, own in leaves.items()}
    if bf16_source:
        masters = {name: nn.Parameter(round_half_away(master).float()) for name, master in masters.items()}
    write_weights(leaves, masters, dtypes)

    trained = {name: master for name, master in masters.items() if leaves[name][0].requires_grad}
    decayed = [master for name, master in trained.items() if hyperparameters.decays(name, master)]
    others = [master for name, master in trained.items() if not hyperparameters.decays(name, master)]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": hyperparameters.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(hyperparameters.beta1, hyperparameters.beta2),
        eps=hyperparameters.eps,
        fused=True,
    )

    losses, grad_norms = [], []
    for index, (step, lr) in enumerate(zip(steps, hyperparameters.lr, strict=True)):
        if before_step is not None:
            before_step(model, index + 1)
        loss, gradients = accumulate(model, leaves, step)
        losses.append(loss)
        if updated is not None:
            gradients = {name: gradient for name, gradient in gradients.items() if name in updated[index]}
        for name, master in trained.items():
            master.grad = gradients.get(name)
        grad_norms.append(nn.utils.get_total_norm(list(gradients.values())).item())
        clip(trained.values(), max_grad_norm, clip_coefficients[index] if clip_coefficients else None)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        write_weights(leaves, masters, dtypes)

    return Result(
        losses=losses,
        weight={name: own[0].detach() for name, own in leaves.items()},
        master={name: master.detach() for name, master in trained.items()},
        exp_avg={name: moment(optimizer, master, "exp_avg") for name, master in trained.items()},
        exp_avg_sq={name: moment(optimizer, master, "exp_avg_sq") for name, master in trained.items()},
        grad_norms=grad_norms,
        updates={name: int(optimizer.state[master].get("step", 0)) for name, master in trained.items()},
    )


def clip(masters: Iterable[nn.Parameter], max_grad_norm: float | None, coefficient: float | None) -> None:
    """Clip all gradients together by their norm, or multiply them by a coefficient that is given."""
    if coefficient is not None:
        for master in masters:
            if master.grad is not None:
                master.grad.mul_(coefficient)
    elif max_grad_norm is not None:
        nn.utils.clip_grad_norm_(masters, max_grad_norm)


def moment(optimizer: torch.optim.AdamW, master: nn.Parameter, plane: str) -> Tensor:
    """What the optimizer keeps of a parameter; zero for one that was never updated."""
    state = optimizer.state[master]
    return state[plane] if plane in state else torch.zeros_like(master)


def write_weights(
    leaves: dict[str, list[nn.Parameter]], masters: dict[str, nn.Parameter], dtypes: dict[str, torch.dtype]
) -> None:
    """Set every leaf to its master's value in the dtype that it computes in."""
    for name, own in leaves.items():
        master, dtype = masters[name].detach(), dtypes[name]
        for leaf in own:
            is_split = dtype == torch.bfloat16 and leaf.requires_grad
            leaf.data = round_half_away(master) if is_split else master.to(dtype, copy=True)
