"""Train language models that fit neither the GPU nor the RAM: NVMe is the memory, with the same bits.

``Trainer`` and ``train`` make a whole run from a configuration; ``PagedModel`` is for a training loop of one's own;
``plan`` says what a run needs before it begins; ``TensorStore`` keeps tensors on a drive without any training.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatrain_io.config.parse import load_config
    from megatrain_io.config.schema import RunConfig
    from megatrain_io.data.batch import MicroBatch
    from megatrain_io.generate import Generator
    from megatrain_io.paging.device.base import Device
    from megatrain_io.planning.plan import Plan
    from megatrain_io.planning.planner import plan
    from megatrain_io.runs.export_model import export_model
    from megatrain_io.runs.import_model import import_model
    from megatrain_io.runs.metrics import StepReport, TrainResult
    from megatrain_io.store.tensor_store import TensorStore
    from megatrain_io.training.callbacks import Callback, Run
    from megatrain_io.training.own_loop import PagedModel
    from megatrain_io.training.reporters import reporter
    from megatrain_io.training.trainer import Trainer, train

    __version__: str

__all__ = [
    "Callback",
    "Device",
    "Generator",
    "MicroBatch",
    "PagedModel",
    "Plan",
    "Run",
    "RunConfig",
    "StepReport",
    "TensorStore",
    "TrainResult",
    "Trainer",
    "__version__",
    "export_model",
    "import_model",
    "load_config",
    "plan",
    "reporter",
    "train",
]

_HOMES = {
    "Callback": "training.callbacks",
    "Device": "paging.device.base",
    "Generator": "generate",
    "MicroBatch": "data.batch",
    "PagedModel": "training.own_loop",
    "Plan": "planning.plan",
    "Run": "training.callbacks",
    "RunConfig": "config.schema",
    "StepReport": "runs.metrics",
    "TensorStore": "store.tensor_store",
    "TrainResult": "runs.metrics",
    "Trainer": "training.trainer",
    "export_model": "runs.export_model",
    "import_model": "runs.import_model",
    "load_config": "config.parse",
    "plan": "planning.planner",
    "reporter": "training.reporters",
    "train": "training.trainer",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("megatrain-io")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, also those that were not asked for yet."""
    return sorted(__all__)
