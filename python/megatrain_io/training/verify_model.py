"""Paged training of a small copy of a model, compared bit by bit with training in memory, on this machine."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from megatrain_io.data.batch import IGNORE_INDEX, MicroBatch
from megatrain_io.errors import DoesNotFitError
from megatrain_io.interrupt import check
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.model_options import ModelOptions
from megatrain_io.models.preserved import preserved
from megatrain_io.models.proof import noisy, random_tokens
from megatrain_io.paging.device.base import Device
from megatrain_io.store.dtypes import DTYPES
from megatrain_io.store.layout import Precision
from megatrain_io.training.own_loop import PagedModel, Plane
from megatrain_io.training.own_settings import device_of

__all__ = ["ModelReport", "verify_model"]

_SEED = 20
_STEPS = 3
# Rows and tokens of the micro-batches of a step.
_SHAPES = ((2, 11), (1, 7))
_LEARNING_RATE, _WEIGHT_DECAY, _BETAS, _EPS = 1e-3, 0.1, (0.9, 0.95), 1e-8

Planes = dict[tuple[str, Plane], Tensor]
"""Weight, master and moments by the name of their parameter, on the CPU."""


@dataclass(frozen=True)
class ModelReport:
    """What the comparison found.

    Attributes:
        model_type: of the model.
        parameters: of its small copy.
        tensors: parameters that were compared, each in weight, master and both moments.
        steps: that were trained.
        precision: that computes.
        device: that computes.
        seconds: that it took.
        losses: of the paged steps.
        differing: a phrase for each loss and plane that is not as in memory; empty if all bits are equal.
    """

    model_type: str
    parameters: int
    tensors: int
    steps: int
    precision: Precision
    device: str
    seconds: float
    losses: tuple[float, ...]
    differing: tuple[str, ...]

    def __str__(self) -> str:
        copy_of = f"a copy of reduced width ({self.parameters:,} parameters, {self.precision}, {self.device})"
        paged = f"{self.model_type}: {self.steps} paged steps of {copy_of}"
        if not self.differing:
            return (
                f"{paged} have the bits of training in memory: losses, and weight, master and moments of "
                f"{self.tensors} tensors; {self.seconds:.0f} s"
            )
        more = len(self.differing) - 1
        others = f", and {more} more" if more else ""
        advice = (
            "Do not train it on this machine, and please report this with what megatrain-io doctor says"
            if self.device == "cpu"
            else "On a GPU some kernels add in another order each time: CUDA_VISIBLE_DEVICES= before the command lets "
            "the CPU compute, where all bits must be equal"
        )
        return f"{paged} are not those in memory: {self.differing[0]}{others}. {advice}"


def verify_model(
    model: Path, options: ModelOptions | None = None, *, device: Device | None = None
) -> ModelReport:
    """Train a small copy of a model for a few steps, paged and in memory, and compare all bits.

    The copy has the architecture of the model at reduced width, and random weights. It passes from a model folder
    through a store, both in a temporary folder that is removed; nearly all of its state is paged.

    Args:
        model: model folder, of which ``config.json`` is read.
        options: what must be said of some models beside their folder; None = nothing.
        device: what computes, which the caller closes; None = as training chooses it.

    Raises:
        UnsupportedModelError: it cannot be trained block by block.
        ModelFilesError: ``config.json`` is missing or not sound.
        NoSpaceError, StorageError: of the temporary folder.
        KeyboardInterrupt: a stop was asked for.
    """
    began = time.monotonic()
    options = options or ModelOptions()
    config = ModelFolder.of(model).config(needs_weights=False)
    with ExitStack() as closing:
        computes, precision = device_of(device, "auto", None, closing)
        options.partition(config, DTYPES[precision])  # what import refuses is refused with the same words
        check()
        place = Path(closing.enter_context(TemporaryDirectory(prefix="megatrain-io-")))
        closing.enter_context(_quiet())
        small = _make_small(options.small_config(config), place / "model")
        steps = _random_steps(small)
        losses, planes = _train_paged(place, options, computes, DTYPES[precision], steps)
        check()
        expected_losses, expected = _train_in_memory(place / "model", computes, DTYPES[precision], steps)
    return ModelReport(
        model_type=config.model_type,
        parameters=sum(parameter.numel() for parameter in small.parameters()),
        tensors=len({name for name, _ in expected}),
        steps=_STEPS,
        precision=precision,
        device=computes.name,
        seconds=time.monotonic() - began,
        losses=tuple(losses),
        differing=tuple(_differences(losses, expected_losses, planes, expected)),
    )


def _make_small(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """A model folder with random weights."""
    with preserved(()), torch.no_grad():
        torch.default_generator.manual_seed(_SEED)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
        )
        for parameter in model.parameters():
            parameter.copy_(noisy(parameter))
    model.save_pretrained(folder)
    return model


def _random_steps(model: PreTrainedModel) -> list[list[MicroBatch]]:
    vocabulary = model.config.get_text_config().vocab_size
    with preserved(()):
        torch.default_generator.manual_seed(_SEED)
        return [[random_tokens(vocabulary, *shape) for shape in _SHAPES] for _ in range(_STEPS)]


def _train_paged(
    place: Path,
    options: ModelOptions,
    device: Device,
    dtype: torch.dtype,
    steps: Sequence[Sequence[MicroBatch]],
) -> tuple[list[float], Planes]:
    """Losses and state after training through a store, with as little RAM as it takes."""

    def create(ram: int | str) -> PagedModel:
        return PagedModel.create(
            place / "model",
            place / "store.mtio",
            blocks=options.block_list,
            precision=next(name for name, each in DTYPES.items() if each == dtype),
            ram=ram,
            device=device,
            weight_decay=_WEIGHT_DECAY,
            betas=_BETAS,
            eps=_EPS,
            largest_step=steps[0],
        )

    try:
        paged = create("1KiB")
    except DoesNotFitError as error:
        if error.least is None:
            raise
        paged = create(error.least)
    losses = []
    with paged:
        for micro_batches in steps:
            check()
            with paged.step(learning_rate=_LEARNING_RATE) as step:
                losses.append(step.forward(micro_batches))
                step.backward()
        names = [name for name, _ in paged.weights()]
        kinds: tuple[Plane, ...] = ("weight", "master", "exp_avg", "exp_avg_sq")
        planes = {(name, plane): paged.read(name, plane) for name in names for plane in kinds}
    return losses, planes


def _train_in_memory(
    folder: Path, device: Device, dtype: torch.dtype, steps: Sequence[Sequence[MicroBatch]]
) -> tuple[list[float], Planes]:
    """Losses and state after training by stock transformers and torch alone; AdamW runs on the CPU."""
    # Masters are the values of the files; what computes has the dtypes that stock transformers gives it.
    files = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False
    )
    model.to(device.torch_device).train()  # type: ignore[arg-type]  # typed for other devices
    leaves = _untied(model)
    masters = {name: nn.Parameter(parameter.detach()) for name, parameter in files.named_parameters()}
    _write(leaves, masters)
    groups = [
        {"params": [m for m in masters.values() if m.ndim >= 2], "weight_decay": _WEIGHT_DECAY},  # noqa: PLR2004
        {"params": [m for m in masters.values() if m.ndim < 2], "weight_decay": 0.0},  # noqa: PLR2004
    ]
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=_BETAS, eps=_EPS, fused=True)
    losses = []
    for micro_batches in steps:
        check()
        items = sum(int((batch.shift_labels != IGNORE_INDEX).sum()) for batch in micro_batches)
        terms: dict[nn.Parameter, list[Tensor]] = {leaf: [] for own in leaves.values() for leaf in own}
        parts = []
        for batch in micro_batches:
            loss = _stock_loss(model, batch.to(device.torch_device), items)
            loss.backward()
            parts.append(loss.detach())
            for leaf, gradients in terms.items():
                if leaf.grad is not None:
                    gradients.append(leaf.grad.cpu())
                    leaf.grad = None
        losses.append(_sum(parts).item())
        for name, own in leaves.items():
            gradients = [gradient for leaf in own for gradient in terms[leaf]]
            masters[name].grad = _sum(gradients) if gradients else None
        optimizer.step()
        _write(leaves, masters)
    planes: Planes = {}
    for name, master in masters.items():
        planes[name, "weight"] = leaves[name][0].detach().cpu()
        moved = optimizer.state.get(master)
        if moved:
            planes[name, "master"] = master.detach()
            planes[name, "exp_avg"], planes[name, "exp_avg_sq"] = moved["exp_avg"], moved["exp_avg_sq"]
    return losses, planes


def _untied(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """The leaves of each parameter, in the order in which their gradients are summed: of a tied table, head first."""
    leaves = {name: [parameter] for name, parameter in model.named_parameters()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        shared = cast("nn.Parameter", embedding.weight)
        head.weight = nn.Parameter(shared.detach().clone())
        next(own for own in leaves.values() if own[0] is shared).insert(0, head.weight)
    return leaves


def _write(leaves: dict[str, list[nn.Parameter]], masters: dict[str, nn.Parameter]) -> None:
    """Set each leaf to its master; in bf16 rounded to nearest, ties away from zero."""
    for name, own in leaves.items():
        master = masters[name].detach().contiguous()
        rounded = ((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
        for leaf in own:
            leaf.data = (rounded if leaf.dtype == torch.bfloat16 else master.clone()).to(leaf.device)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """One after the other in fp32; the first is taken as it is."""
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total


def _stock_loss(model: PreTrainedModel, batch: MicroBatch, items: int) -> Tensor:
    """The stock model's loss, a sum over tokens divided by ``items``.

    Where the model compares its scores with labels as they are given, by no function of transformers: that function's.
    """
    ignored = torch.full_like(batch.shift_labels[:, :1], IGNORE_INDEX)
    labels = torch.cat([ignored, batch.shift_labels[:, :-1]], dim=1)
    own, is_called = model.loss_function, False

    def of_all_items(*args: object, **kwargs: object) -> Tensor:
        # Not every forward passes num_items_in_batch on.
        nonlocal is_called
        is_called = True
        return cast("Tensor", own(*args, **{**kwargs, "num_items_in_batch": items}))

    model.loss_function = of_all_items
    try:
        output = model(input_ids=batch.input_ids, labels=labels)
        if is_called:
            return cast("Tensor", output.loss)
        return ForCausalLMLoss(
            output.logits,
            labels,
            output.logits.shape[-1],
            num_items_in_batch=items,  # type: ignore[arg-type]  # which takes a number, too
        )
    finally:
        model.loss_function = own


def _differences(
    losses: Sequence[float], expected_losses: Sequence[float], planes: Planes, expected: Planes
) -> Iterator[str]:
    for number, (loss, there) in enumerate(zip(losses, expected_losses, strict=True), start=1):
        if loss != there:
            yield f"the loss of step {number} is {loss!r}, in memory {there!r}"
    for (name, plane), tensor in expected.items():
        found = planes.get((name, plane))
        if found is None:
            yield f"{name} has no {plane} in the store"
        elif found.dtype != tensor.dtype or not torch.equal(found, tensor):
            yield f"the {plane} of {name} differs"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what transformers says and shows of the small copy."""
    verbosity, shows = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows:
            logging.enable_progress_bar()
