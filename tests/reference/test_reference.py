"""The reference itself is tested against loops and formulas that are plainer still."""

import copy
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Glm4MoeConfig, LlamaForCausalLM, PreTrainedModel

from .reference import (
    Hyperparameters,
    MicroBatch,
    Result,
    accumulate,
    build,
    micro_batches,
    round_half_away,
    sum_in_order,
    tiny_config,
    train,
    untie,
)

Family = Literal["llama", "qwen3"]
FAMILIES: list[Family] = ["llama", "qwen3"]
VOCAB = 257
PLANES = ("weight", "master", "exp_avg", "exp_avg_sq")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, which on busy cores wait for one another up to 30 times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(bits(tensor), bits(right[name])), name


def schedule(steps: int) -> Hyperparameters:
    return Hyperparameters(lr=[1e-3 * (step + 1) / steps for step in range(steps)])


def naive(
    model: PreTrainedModel,
    steps: list[list[MicroBatch]],
    hyperparameters: Hyperparameters,
    max_grad_norm: float = math.inf,
) -> Result:
    """The loop of every tutorial, in fp32, one micro-batch a step, trains `model` itself: tied if it is tied."""
    parameters = dict(model.named_parameters())
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": hyperparameters.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(hyperparameters.beta1, hyperparameters.beta2),
        eps=hyperparameters.eps,
        fused=True,
    )
    losses, norms = [], []
    for (batch,), lr in zip(steps, hyperparameters.lr, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(**batch).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    state = {
        name: optimizer.state.get(parameter) or {"exp_avg": zeros[name], "exp_avg_sq": zeros[name]}
        for name, parameter in parameters.items()
    }
    return Result(
        losses=losses,
        weight={name: parameter.detach() for name, parameter in parameters.items()},
        master={name: parameter.detach() for name, parameter in parameters.items()},
        exp_avg={name: state[name]["exp_avg"] for name in parameters},
        exp_avg_sq={name: state[name]["exp_avg_sq"] for name in parameters},
        grad_norms=norms,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_clipping_equals_the_stock_loop(tied: bool) -> None:
    model = build(tiny_config("llama", tied), seed=1)
    steps = micro_batches(VOCAB, [1] * 5, seed=2)
    free = train(model, steps, schedule(5))
    limit = sorted(free.grad_norms)[2]  # some steps are clipped, others are not
    ours = train(model, steps, schedule(5), max_grad_norm=limit)
    given = [min(1.0, limit / (norm + 1e-6)) for norm in ours.grad_norms]
    assert 1 < sum(coefficient < 1 for coefficient in given) < 5
    assert ours.losses != free.losses
    stock = naive(copy.deepcopy(model), steps, schedule(5), limit)
    scaled = train(model, steps, schedule(5), clip_coefficients=given)
    assert ours.losses == stock.losses
    assert ours.grad_norms == stock.grad_norms
    assert scaled.losses == pytest.approx(stock.losses, rel=1e-6)
    for plane in PLANES:
        assert_same(getattr(ours, plane), getattr(stock, plane))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_with_one_micro_batch_equals_the_stock_loop(family: Family, tied: bool) -> None:
    model = build(tiny_config(family, tied), seed=1)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    steps = micro_batches(VOCAB, [1] * 5, seed=2)
    ours = train(model, steps, schedule(5))
    stock = naive(model, steps, schedule(5))
    assert ours.losses == stock.losses
    for plane in PLANES:
        assert_same(getattr(ours, plane), getattr(stock, plane))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits_and_leave_the_model_alone(dtype: torch.dtype) -> None:
    model = build(tiny_config("llama", tied=True), seed=1)
    before = copy.deepcopy(model.state_dict())
    steps = micro_batches(VOCAB, [1, 4, 4], seed=2)
    first, second = (train(model, steps, schedule(3), dtype) for _ in range(2))
    assert first.losses == second.losses
    for plane in PLANES:
        assert_same(getattr(first, plane), getattr(second, plane))
    assert_same(model.state_dict(), before)
    assert_same(build(tiny_config("llama", tied=True), seed=1).state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_falls(family: Family, dtype: torch.dtype) -> None:
    model = build(tiny_config(family, tied=False), seed=1)
    steps = micro_batches(VOCAB, [2], seed=2) * 30
    # A slow start: AdamW's first steps are as long as its learning rate allows, and in bf16 one may go too far.
    result = train(model, steps, Hyperparameters(lr=[1e-3] * 10 + [3e-3] * 20), dtype)
    assert abs(result.losses[0] - math.log(VOCAB)) < 0.2  # a fresh model knows nothing
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(result.losses))


def test_losses_weigh_tokens_not_micro_batches() -> None:
    model = build(tiny_config("llama", tied=True), seed=1)
    (step,) = micro_batches(VOCAB, [4], seed=2)
    leaves = untie(twin := copy.deepcopy(model))
    loss, gradients = accumulate(twin, leaves, step)

    logits = torch.cat([model(batch["input_ids"]).logits[0, :-1] for batch in step])
    labels = torch.cat([batch["labels"][0, 1:] for batch in step])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_table_sums_heads_then_embeddings_in_fp32(dtype: torch.dtype) -> None:
    model = build(tiny_config("llama", tied=True), seed=1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    # So many that their order shows: a sum of few values of 8 bits is exact in fp32.
    (step,) = micro_batches(VOCAB, [16], seed=2)
    num_items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
    leaves = untie(model)
    _, gradients = accumulate(model, leaves, step)

    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not embedding
    heads, embeddings = [], []
    for batch in step:
        loss = model(**batch, num_items_in_batch=num_items).loss
        of_head, of_embedding = torch.autograd.grad(loss, [head, embedding])
        heads.append(of_head.float())
        embeddings.append(of_embedding.float())
    table = "model.embed_tokens.weight"
    expected = functools.reduce(torch.add, [*heads, *embeddings])
    assert_same({table: gradients[table]}, {table: expected})
    by_batch = functools.reduce(torch.add, [h + e for h, e in zip(heads, embeddings, strict=True)])
    assert not torch.equal(expected, by_batch)  # the order shows


def test_the_first_gradient_is_assigned_not_added_to_zero() -> None:
    assert bool(sum_in_order([torch.tensor([-0.0])]).signbit().all())


@pytest.mark.parametrize("bf16_source", [False, True])
def test_bf16_weights_are_the_rounded_masters(bf16_source: bool) -> None:
    model = build(tiny_config("qwen3", tied=True), seed=1)
    step = micro_batches(VOCAB, [1], seed=2)
    # A learning rate of 0 leaves weights and masters as they began.
    start = train(model, step, Hyperparameters(lr=[0.0]), torch.bfloat16, bf16_source)
    assert_same(start.weight, {name: round_half_away(p) for name, p in model.named_parameters()})
    if bf16_source:
        assert_same(start.master, {name: weight.float() for name, weight in start.weight.items()})
    else:
        assert_same(start.master, dict(model.named_parameters()))
    result = train(model, micro_batches(VOCAB, [1, 4], seed=2), schedule(2), torch.bfloat16, bf16_source)
    assert_same(result.weight, {name: round_half_away(master) for name, master in result.master.items()})
    assert any(not torch.equal(master, result.weight[name].float()) for name, master in result.master.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_computes_as_a_stock_bf16_model(family: Family) -> None:
    """Same loss, and same gradients where one micro-batch leaves nothing to sum, as transformers' own bf16 model."""
    config = tiny_config(family, tied=False)
    model, (step,) = build(config, seed=1), micro_batches(VOCAB, [1], seed=2)
    result = train(model, [step], Hyperparameters(lr=[0.0], beta1=0.0), torch.bfloat16)

    stock: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    stock.load_state_dict({name: round_half_away(value) for name, value in model.state_dict().items()})
    loss = stock(**step[0]).loss
    loss.backward()
    assert result.losses == [loss.item()]
    # With beta1 = 0, exp_avg is the gradient.
    gradients = {name: p.grad.float() for name, p in stock.named_parameters() if p.grad is not None}
    assert_same(result.exp_avg, gradients)


def test_frozen_parameters_stay() -> None:
    model = build(tiny_config("llama", tied=True), seed=1)
    table = "model.embed_tokens.weight"
    before = model.get_parameter(table).requires_grad_(False)
    result = train(model, micro_batches(VOCAB, [4, 1], seed=2), schedule(2))
    assert_same({table: result.weight[table]}, {table: before})
    assert result.weight.keys() - {table} == result.master.keys() == result.exp_avg.keys()


def test_what_no_gradient_reaches_stays_and_what_is_kept_in_fp32_is_its_master() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    model = build(Glm4MoeConfig(vocab_size=VOCAB, **sizes, **heads, **experts), seed=1)
    model.model.layers[1].unused = torch.nn.Linear(3, 3)
    unused = {name for name, _ in model.named_parameters() if ".unused." in name}
    kept = {name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight")}
    steps = micro_batches(VOCAB, [2, 1], seed=2)
    result = train(model, steps, schedule(2), torch.bfloat16, keep_in_fp32=kept | unused)
    before = dict(model.named_parameters())
    assert_same({name: result.weight[name] for name in unused}, {name: before[name] for name in unused})
    assert not any(result.exp_avg[name].any() for name in unused)
    assert_same({name: result.weight[name] for name in kept}, {name: result.master[name] for name in kept})

    stock = copy.deepcopy(model)
    for name, parameter in stock.named_parameters():
        if name not in kept | unused:
            parameter.data = round_half_away(parameter)
    assert result.losses[0] == accumulate(stock, untie(stock), steps[0])[0]


def test_rounding_differs_from_torch_at_exact_ties_only() -> None:
    """All 65,536 upper halves, each with the lower halves around the tie and at the ends."""
    upper = torch.arange(-0x8000, 0x8000, dtype=torch.int32) << 16
    lower = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    masters = (upper[:, None] + lower).view(torch.float32)
    rounded, torchs = bits(round_half_away(masters)), bits(masters.to(torch.bfloat16))
    differs = (rounded != torchs) & ~masters.isnan()
    tie, even = lower == 0x8000, (upper >> 16) % 2 == 0
    assert torch.equal(differs, even[:, None] & tie & ~masters.isnan())
    away = round_half_away(masters).float().abs() > masters.abs()
    assert bool(away[:, tie][masters[:, tie].isfinite()].all())


def test_micro_batches_differ_in_length_and_skip_some_labels() -> None:
    steps = micro_batches(VOCAB, [1, 4, 4], seed=2)
    assert [len(step) for step in steps] == [1, 4, 4]
    for step in steps:
        assert len({batch["input_ids"].shape for batch in step}) == len(step)
        for batch in step:
            trained = batch["labels"] != -100
            assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
            assert bool(trained[0, -1])
    assert any(bool((batch["labels"] == -100).any()) for step in steps for batch in step)
    again = micro_batches(VOCAB, [1, 4, 4], seed=2)
    for left, right in zip(itertools.chain(*steps), itertools.chain(*again), strict=True):
        assert all(torch.equal(left[key], right[key]) for key in ("input_ids", "labels"))


def test_each_parameter_may_keep_its_own_dtype() -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = super().forward(*args, **kwargs)
            result.loss = result.loss * self.scale
            return result

    model = Scaled(tiny_config("llama", tied=False)).to(torch.bfloat16)
    model.scale = nn.Parameter(torch.tensor(1.001))
    result = train(model, micro_batches(VOCAB, [1, 2], seed=2), schedule(2), compute_dtype=None)
    for name, weight in result.weight.items():
        master = result.master[name]
        assert torch.equal(weight, master if name == "scale" else round_half_away(master)), name
    assert result.weight["scale"] != 1.001


def test_a_parameter_without_gradient_stays_and_its_steps_do_not_count() -> None:
    """One that some steps do not reach equals the stock loop, in which torch leaves it out."""

    class Skipping(LlamaForCausalLM):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = super().forward(*args, **kwargs)
            self.calls += 1
            if self.calls == 2:
                result.loss = result.loss + 0.01 * self.spare.sum()
            return result

    model = Skipping(tiny_config("llama", tied=False))
    model.spare = nn.Parameter(torch.ones(3, 3))
    model.never = nn.Parameter(torch.ones(2, 2))
    steps = micro_batches(VOCAB, [1] * 4, seed=2)
    ours = train(model, steps, schedule(4))
    stock = naive(copy.deepcopy(model), steps, schedule(4))
    for plane in PLANES:
        assert_same(getattr(ours, plane), getattr(stock, plane))
    assert torch.equal(ours.master["never"], torch.ones(2, 2))
    assert not ours.exp_avg["never"].any()
    assert not torch.equal(ours.master["spare"], torch.ones(3, 3))


def test_a_forward_that_does_not_know_the_number_of_tokens_weighs_them_all_the_same() -> None:
    class Deaf(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            return super().forward(input_ids=input_ids, labels=labels)

    config = tiny_config("llama", tied=False)
    hearing, deaf = LlamaForCausalLM(config), Deaf(config)
    deaf.load_state_dict(hearing.state_dict())
    steps = micro_batches(VOCAB, [3, 2], seed=2)
    one, other = train(hearing, steps, schedule(2)), train(deaf, steps, schedule(2))
    assert one.losses == other.losses
    assert_same(one.master, other.master)
