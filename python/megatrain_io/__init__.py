"""Train language models that fit neither the GPU nor the RAM: NVMe is the memory, with the same bits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatrain_io.data.batch import MicroBatch
    from megatrain_io.planning.plan import Plan
    from megatrain_io.planning.resolve import plan
    from megatrain_io.store.tensor_store import TensorStore
    from megatrain_io.training.own_loop import PagedModel

__all__ = ["MicroBatch", "PagedModel", "Plan", "TensorStore", "plan"]

_HOMES = {
    "MicroBatch": "data.batch",
    "PagedModel": "training.own_loop",
    "Plan": "planning.plan",
    "TensorStore": "store.tensor_store",
    "plan": "planning.resolve",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
