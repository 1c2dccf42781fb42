"""The stock transformers model, built without memory for its parameters."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import build_glob_alternation
from transformers.modeling_layers import GradientCheckpointingLayer

from megatrain_io.errors import UnsupportedModelError
from megatrain_io.models.config_limits import PARAMETERS_MAX

__all__ = ["build_meta_model", "find_block_list", "module_lists", "parameters_on_meta", "require_gradients"]

# What a constructor allocates from this size on is a parameter. Constructors make buffers with values, so
# uninitialised memory is a parameter's much earlier; it would leave holes in the heap that the whole run fills.
_META_FROM_ELEMENTS = {torch.empty: 1 << 12, torch.zeros: 1 << 24}
# What makes the tables (masks, positions) of a constructor, and how much all of them may take: they are real.
_TABLES = frozenset(
    {torch.ones, torch.full, torch.arange, torch.linspace, torch.eye, torch.rand, torch.randn}
)
_TABLES_NBYTES_MAX = 2 << 30


def build_meta_model(
    config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build the stock causal language model of `config` with its parameters on the meta device.

    Parameters have the dtypes that `from_pretrained(folder, dtype=dtype)` gives: most often `dtype`, and fp32 where
    the architecture keeps it (the routers of some mixtures of experts). Every buffer is real and holds what a stock
    model has when it was loaded, in the stock dtype. `use_cache` is off, the model is in training mode. `config` is not
    changed and nothing is fetched.

    Args:
        config: any causal language model that transformers itself has.
        dtype: of the parameters that the architecture does not keep in another.
        attn_implementation: "sdpa", "eager", or None for sdpa where the architecture has it, else eager.

    Raises:
        UnsupportedModelError: transformers has no such model, or a parameter is neither `dtype` nor fp32.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{config.model_type}: transformers has no causal language model of this type; choose a "
            f"decoder-only model"
        )
    config = copy.deepcopy(config)
    try:
        config.use_cache = config.get_text_config().use_cache = False
        with parameters_on_meta(tables_max=_TABLES_NBYTES_MAX):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
            )
            _fill_buffers(model, model)
    except Exception as cause:
        raise UnsupportedModelError(
            f"{config.model_type}: transformers does not build a model from this configuration: "
            f"{' '.join(str(cause).split())}"
        ) from cause
    if (count := sum(parameter.numel() for parameter in model.parameters())) > PARAMETERS_MAX:
        raise UnsupportedModelError(
            f"{config.model_type}: by config.json it has {count:,} parameters, and at most {PARAMETERS_MAX:,} are "
            "trained: fetch config.json again, or correct it"
        )
    _keep_in_fp32(model, dtype)
    require_gradients(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype not in {dtype, torch.float32}:
            raise UnsupportedModelError(
                f"{config.model_type}: the architecture keeps {name} in {parameter.dtype}, and only {dtype} and "
                "torch.float32 are trained beside each other; choose another model"
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise UnsupportedModelError(
                f"{config.model_type}: its constructor leaves buffer {name} without values; choose another model"
            )
    return model


@torch.no_grad()
def _fill_buffers(module: nn.Module, owner: PreTrainedModel) -> None:
    """Compute buffers anew, as loading does, when the model's dtype is no longer the one that torch makes numbers in.

    A constructor that divides integers makes a rotary table of bf16 accuracy, which no model that is loaded has.
    """
    for child in module.children():
        _fill_buffers(child, child if isinstance(child, PreTrainedModel) else owner)
    if next(module.buffers(recurse=False), None) is not None:
        owner._init_weights(module)  # noqa: SLF001 - what loading itself calls for each module


def require_gradients(model: PreTrainedModel) -> None:
    """Let all parameters require gradients, as `from_pretrained` does, also those that the constructor froze.

    Sinusoidal tables of Marian, Pegasus and RoFormer are trained so in memory.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give parameters and saved buffers the dtype in which `from_pretrained` keeps them, whatever the constructor did.

    Its plan of dtypes goes by patterns in names; what no pattern meets stays as it was constructed.
    """
    plan = model._get_dtype_plan(dtype)  # noqa: SLF001
    if not plan:
        return
    pattern, by_group, _ = build_glob_alternation([*plan])
    kept = {
        id(tensor): plan[by_group[found.lastgroup]]
        for name, tensor in model.state_dict(keep_vars=True).items()
        if (found := pattern.search(name)) is not None and found.lastgroup is not None
    }
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            wanted = kept.get(id(tensor))
            if wanted is None or tensor.dtype == wanted:
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(wanted)  # the same object still, which others may share
            else:
                setattr(module, name, tensor.to(wanted))


def module_lists(module: nn.Module) -> dict[str, nn.ModuleList]:
    """The module lists of a module that have something in them, by name."""
    return {
        name: each
        for name, each in module.named_modules()
        if isinstance(each, nn.ModuleList) and len(each) > 0
    }


def find_block_list(model: PreTrainedModel) -> str:
    """Name the module list of decoder blocks: the text model's longest that holds checkpointing layers only.

    Raises:
        UnsupportedModelError: there is none.
    """
    lists = {
        name: module
        for name, module in module_lists(model).items()
        if all(isinstance(member, GradientCheckpointingLayer) for member in module)
    }
    if not lists:
        there = ", ".join(
            f"{name} ({len(each)} of {type(each[0]).__name__})" for name, each in module_lists(model).items()
        )
        raise UnsupportedModelError(
            f"{model.config.model_type}: no list of decoder blocks is marked (as GradientCheckpointingLayer) in this "
            f"architecture; name it by model_options.block_list=NAME (import: --block-list NAME): it has "
            f"{there or 'no module list at all'}"
        )
    text_model = set(model.get_decoder().modules())
    of_text_model = [name for name, module in lists.items() if module in text_model]
    return max(of_text_model or lists, key=lambda name: len(lists[name]))


@contextmanager
def parameters_on_meta(tables_max: int | None = None) -> Iterator[None]:
    """Parameters lose their memory when they are registered; `torch.device("meta")` would take buffers too.

    Args:
        tables_max: bytes of tables (masks, positions) that constructors may make; None = no bound.
    """

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:
            return None  # tied to one that was registered before: must stay the same object
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch declares the hook without a result, and uses it.
    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with _LargeTensorsOnMeta(tables_max):
            yield
    finally:
        hook.remove()


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Keeps constructors from filling memory for parameters not registered yet, and from large tables."""

    def __init__(self, tables_max: int | None) -> None:
        super().__init__()
        self._tables_max = tables_max
        self._nbytes = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._tables_max is not None and func in _TABLES and str(kwargs.get("device")) != "meta":
            self._nbytes += func(*args, **{**kwargs, "device": "meta"}).nbytes
            if self._nbytes > self._tables_max:
                raise MemoryError(
                    f"its tables of masks and positions take more than {self._tables_max:,} bytes: correct the "
                    "number of positions in config.json"
                )
        threshold = _META_FROM_ELEMENTS.get(func)
        if threshold is not None:
            without_memory = func(*args, **{**kwargs, "device": "meta"})
            if without_memory.numel() >= threshold:
                return without_memory
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            # Nothing to fill, and working that out takes torch a millisecond per parameter.
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return func(*args, **kwargs)
