"""The probe at the start: find out how an architecture is partitioned, and prove on a small copy that it is right.

The copy has random weights and is trained on a few tokens twice: as the stock model does it, and block by
block through the partitioned model. Only if all losses and gradients agree to the bit is the architecture accepted.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from megatrain_io.data.batch import IGNORE_INDEX, MicroBatch
from megatrain_io.errors import UnsupportedModelError
from megatrain_io.models.meta_model import build_meta_model, find_block_list, require_gradients
from megatrain_io.models.partition import PartitionedModel, PartitionSpec
from megatrain_io.models.positions import find_positions
from megatrain_io.models.preserved import preserved
from megatrain_io.models.proof import (
    CannotBePartitionedError,
    RefusedError,
    are_alike,
    find_unreached,
    noisy,
    observe,
    prove,
    random_tokens,
    refuse_unless_positions_are_alone,
)
from megatrain_io.models.shrink import shrink_config, without_noise

__all__ = ["probe"]

_DTYPE = torch.float32
_SEED = 20
_SMALL_PARAMETERS_MAX = 1 << 25
_NEW_TOKENS = 3
_LAST = slice(-1, None)
# What values are multiplied by to see whether they matter: much, as what is compared with a bound may change little.
_OTHER = -30.0
_MINIATURE = (
    "name a folder with the config.json of a small model of the same architecture by "
    "model_options.miniature=DIR (import: --miniature DIR)"
)
_NO_WAY = "this architecture cannot be trained here, choose another"


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
        with _quiet(), preserved(()):
            torch.default_generator.manual_seed(_SEED)
            return _probe(config, attn_implementation, block_list, small_config)
    except UnsupportedModelError:
        raise
    except CannotBePartitionedError as refusal:
        raise UnsupportedModelError(f"{config.model_type}: {refusal}; {_NO_WAY}") from None
    except RefusedError as refusal:
        raise UnsupportedModelError(f"{config.model_type}: {refusal}") from None
    except Exception as cause:
        raise UnsupportedModelError(
            f"{config.model_type}: a small copy of the model failed with {type(cause).__name__}: "
            f"{' '.join(str(cause).split())}; if transformers runs the model itself on texts, {_MINIATURE}, else "
            "choose another"
        ) from cause


def _probe(
    config: PreTrainedConfig,
    attn_implementation: str | None,
    block_list: str | None,
    small_config: PreTrainedConfig | None,
) -> PartitionSpec:
    if getattr(config, "quantization_config", None) is not None:
        raise RefusedError("its weights are quantised; take the original model in float32 or bfloat16")
    _refuse_without_labels(config)
    text_config = _text_config(config)
    if getattr(text_config, "output_router_logits", False):
        raise RefusedError(
            "output_router_logits adds a loss over all blocks at once, which is not known while they pass one by one; "
            "set output_router_logits to false in config.json, wherever it is true there, to train without it"
        )
    if small_config is None:
        small, stock = _small_copy(config, attn_implementation)
    else:
        small = without_noise(small_config)
        stock = _stock_model(small, attn_implementation)
    if "text" not in (made := getattr(stock, "output_modalities", ("text",))):
        raise RefusedError(f"what it makes is {' and '.join(made)}, not text; choose a model of text")
    vocabulary = stock.config.get_text_config().vocab_size
    one, two, packed = (random_tokens(vocabulary, *shape) for shape in ((2, 11), (1, 7), (1, 9)))
    packed = replace(packed, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    _refuse_sparse_attention(stock)
    _refuse_unless_causal(stock, two)
    named = find_block_list(stock) if block_list is None else block_list
    loss_of_scores = _is_loss_of_scores(stock, two)
    loss_of = partial(_loss_from_scores if loss_of_scores else _stock_loss, stock)
    seen = observe(stock, one, named, loss_of)
    _refuse_what_decides(stock, seen.unused, two)
    spec = PartitionSpec(
        model_type=stock.config.model_type,
        attn_implementation=attn_implementation,
        block_list=named,
        output_entries=seen.output_entries,
        embedding=seen.embedding,
        head=seen.head.union(seen.unused),
        packs=_keeps_apart(stock, packed, boundary=4),
        kept=seen.kept,
        sides=seen.sides,
        axes=seen.axes,
        shares=seen.shares,
        skips=bool(seen.skipped),
        loss_of_scores=loss_of_scores,
    )
    micro_batches = [one, two, packed] if spec.packs else [one, two]
    spec = replace(spec, unreached=find_unreached(stock, micro_batches, named, loss_of, seen.skipped))
    spec, partition = prove(stock, spec, partial(PartitionedModel, small, _DTYPE), micro_batches, loss_of)
    refuse_unless_positions_are_alone(partition, dict(stock.named_parameters()), one)
    caches = _caches(stock, partition, two.input_ids)
    positions = find_positions(small, partial(_stock_model, attn_implementation=attn_implementation))
    return replace(spec, caches=caches, widens=_widens(small, spec, stock, two), positions=positions)


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    try:
        return config.get_text_config()
    except ValueError as cause:
        raise RefusedError(
            "its configuration holds several text models, and one causal language model is trained; save that one "
            "alone with save_pretrained(OUT), and import OUT"
        ) from cause


def _small_copy(
    config: PreTrainedConfig, attn_implementation: str | None
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """A small configuration of the same architecture, and its model.

    Raises:
        UnsupportedModelError: transformers does not build the model of ``config`` itself.
        RefusedError: it does, but none of the small ones.
    """
    failed: Exception | None = None
    for of_each_kind in (1, 2):  # what layers share, some find by its second place
        try:
            small = shrink_config(config, of_each_kind=of_each_kind)
            return small, _stock_model(small, attn_implementation)
        except RefusedError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a class says to values that it does not expect
            failed = failed or error
    build_meta_model(config, _DTYPE, attn_implementation)
    reason = " ".join(str(failed).split()).removeprefix(f"{config.model_type}: ")
    raise RefusedError(
        f"the small copy that is to prove it was not made ({type(failed).__name__}: {reason}), which says nothing of "
        f"the model, as transformers builds that; {_MINIATURE}"
    ) from failed


def _stock_model(config: PreTrainedConfig, attn_implementation: str | None) -> PreTrainedModel:
    model = build_meta_model(config, _DTYPE, attn_implementation)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > _SMALL_PARAMETERS_MAX:
        raise RefusedError(
            f"its small copy would have {size:,} parameters, and may have {_SMALL_PARAMETERS_MAX:,}; {_MINIATURE}"
        )
    config = copy.deepcopy(config)  # transformers writes into it
    stock: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=_DTYPE, attn_implementation=attn_implementation, trust_remote_code=False
    )
    stock.config.use_cache = False
    require_gradients(stock)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(noisy(parameter))
    stock.train()
    return stock


def _refuse_without_labels(config: PreTrainedConfig) -> None:
    """Refuse a model that drafts for another one."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is not None and "labels" not in inspect.signature(kind.forward).parameters:
        raise RefusedError(
            f"{kind.__name__} takes no labels: it works beside another model, and is not trained by itself; choose the "
            "model that it works for, or another"
        )


def _refuse_sparse_attention(stock: PreTrainedModel) -> None:
    """Refuse attention that is causal in short texts alone, where the small copy would not show it."""
    for module in stock.modules():
        if hasattr(module, "set_attention_type") and getattr(module, "attention_type", "") == "block_sparse":
            raise RefusedError(
                "its attention in blocks (block_sparse) looks at later tokens of longer texts; set attention_type to "
                "original_full in config.json, or choose another"
            )


def _refuse_unless_causal(stock: PreTrainedModel, micro_batch: MicroBatch) -> None:
    changed = micro_batch.input_ids.clone()
    changed[:, -1] = 1 + changed[:, -1] % 2
    before, after = _scores(stock, micro_batch.input_ids), _scores(stock, changed)
    if not are_alike(before[:, :-1], after[:, :-1]):
        may_be_decoder = getattr(stock.config, "is_decoder", None) is False
        raise RefusedError(
            "it looks at later tokens; "
            + ("set is_decoder to true in config.json if it was trained as a decoder, or " * may_be_decoder)
            + "choose another"
        )


@torch.no_grad()
def _refuse_what_decides(stock: PreTrainedModel, names: Sequence[str], micro_batch: MicroBatch) -> None:
    """Refuse parameters that scores depend on, though no gradient reaches them: what other inputs take must not matter.

    Args:
        stock: the model in memory; it is left as it was.
        names: of parameters outside its blocks that no gradient reaches.
        micro_batch: that it is called with.

    Raises:
        RefusedError: there is one.
    """
    before = _scores(stock, micro_batch.input_ids)
    values = {name: stock.get_parameter(name) for name in names}
    kept = {name: parameter.clone() for name, parameter in values.items()}
    for parameter in values.values():
        parameter.mul_(_OTHER)
    after = _scores(stock, micro_batch.input_ids)
    for name, parameter in values.items():
        parameter.copy_(kept[name])
    if not torch.equal(before, after):
        raise RefusedError(
            f"its scores depend on parameters that no gradient reaches ({names[0]} is one or beside one), outside of "
            "its blocks, and such a model cannot be trained here; choose another"
        )


def _keeps_apart(stock: PreTrainedModel, packed: MicroBatch, boundary: int) -> bool:
    """Whether the second document of a packed row gets the scores that it gets alone."""
    row = _scores(stock, packed.input_ids, position_ids=packed.position_ids)
    return are_alike(row[:, boundary:], _scores(stock, packed.input_ids[:, boundary:]))


@torch.no_grad()
def _widens(small: PreTrainedConfig, spec: PartitionSpec, stock: PreTrainedModel, batch: MicroBatch) -> bool:
    """Whether blocks return fp32 where bf16 computes: state spaces keep what they add to in fp32."""
    try:
        partition = PartitionedModel(small, torch.bfloat16, spec)
        parameters = {
            name: parameter.to(partition.dtypes[name]) for name, parameter in stock.named_parameters()
        }
        hidden, calls = partition.record(parameters, batch)
        return partition.run_block(0, parameters, hidden, calls[0]).dtype == torch.float32
    except Exception:  # noqa: BLE001 - it does not compute in bf16, and whoever asks for that is told
        return False


@torch.no_grad()
def _caches(stock: PreTrainedModel, partition: PartitionedModel, prompt: Tensor) -> bool:
    """Whether block by block, with a cache, the scores of new tokens are those of stock ``generate``."""
    stock.eval()
    partition.train(False)
    try:
        generated = stock.generate(  # type: ignore[operator]  # not every model has it
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                max_new_tokens=_NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
            ),
        )
        parameters = dict(stock.named_parameters())
        cache, end = partition.new_cache(), prompt.shape[1]
        tokens = generated.sequences
        for expected in generated.logits:
            start = 0 if end == prompt.shape[1] else end - 1
            positions = torch.arange(start, end).unsqueeze(0)
            new = tokens[:, start:end]
            hidden, calls = partition.record(parameters, MicroBatch(new, new, positions), cache)
            for index, call in enumerate(calls):
                hidden = partition.run_block(index, parameters, hidden, call)
            if not are_alike(
                partition.logits(parameters, partition.tokens_of(hidden, _LAST))[:, -1], expected
            ):
                return False
            end += 1
    except Exception:  # noqa: BLE001 - whatever a model says to a cache that it does not know
        return False
    finally:
        stock.train()
        partition.train()
    return True


@torch.no_grad()
def _scores(stock: PreTrainedModel, input_ids: Tensor, **inputs: Tensor | None) -> Tensor:
    return cast("Tensor", stock(input_ids=input_ids, **inputs).logits)


@torch.no_grad()
def _is_loss_of_scores(stock: PreTrainedModel, micro_batch: MicroBatch) -> bool:
    """Whether the model calls no loss function of transformers, and its loss is the cross entropy of its scores.

    Most such models compare them with labels as they are given, some shift these as transformers' function does.

    Raises:
        RefusedError: its loss is another one.
    """
    own, is_called = stock.loss_function, False

    def noting(*args: object, **kwargs: object) -> Tensor:
        nonlocal is_called
        is_called = True
        return cast("Tensor", own(*args, **kwargs))

    stock.loss_function = noting
    try:
        output = stock(input_ids=micro_batch.input_ids, labels=micro_batch.shift_labels)
        if is_called:
            return False
        own_losses = [
            output.loss,
            stock(input_ids=micro_batch.input_ids, labels=_unshifted(micro_batch)).loss,
        ]
    except Exception as cause:
        raise RefusedError(
            f"its scores of a text are there, but its own loss of them fails with {type(cause).__name__}: "
            f"{' '.join(str(cause).split())}; choose another"
        ) from cause
    finally:
        stock.loss_function = own
    logits, labels = output.logits, micro_batch.shift_labels
    if logits.shape[:-1] == labels.shape:
        expected = ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=labels)
        if any(loss is not None and torch.allclose(loss.float(), expected, rtol=1e-4) for loss in own_losses):
            return True
    raise RefusedError(
        "its own loss is not the cross entropy of its scores of the next token, and that is what models are trained "
        "by here; choose another"
    )


def _loss_from_scores(stock: PreTrainedModel, micro_batch: MicroBatch, num_items_in_batch: int) -> Tensor:
    """The loss by transformers' function, for a model that does not call it."""
    logits = stock(input_ids=micro_batch.input_ids, **_positions(micro_batch)).logits
    return ForCausalLMLoss(
        logits,
        None,
        logits.shape[-1],
        shift_labels=micro_batch.shift_labels,
        num_items_in_batch=num_items_in_batch,  # type: ignore[arg-type]  # which takes a number, too
    )


def _unshifted(micro_batch: MicroBatch) -> Tensor:
    """Labels as models take them that shift them themselves."""
    ignored = torch.full_like(micro_batch.shift_labels[:, :1], IGNORE_INDEX)
    return torch.cat([ignored, micro_batch.shift_labels[:, :-1]], dim=1)


def _positions(micro_batch: MicroBatch) -> dict[str, Tensor]:
    return {} if micro_batch.position_ids is None else {"position_ids": micro_batch.position_ids}


def _stock_loss(stock: PreTrainedModel, micro_batch: MicroBatch, num_items_in_batch: int) -> Tensor:
    """The stock model's loss, from labels that it shifts itself."""
    labels, inputs = _unshifted(micro_batch), _positions(micro_batch)
    own = stock.loss_function
    # Not every forward passes num_items_in_batch on.
    stock.loss_function = lambda *args, **kwargs: own(
        *args, **{**kwargs, "num_items_in_batch": num_items_in_batch}
    )
    try:
        return cast("Tensor", stock(input_ids=micro_batch.input_ids, labels=labels, **inputs).loss)
    finally:
        stock.loss_function = own


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
