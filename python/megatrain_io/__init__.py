"""Train language models that fit neither the GPU nor the RAM: NVMe is the memory, with the same bits."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatrain_io.tensor_store import TensorStore

__all__ = ["TensorStore"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for."""
    if name == "TensorStore":
        from megatrain_io.tensor_store import TensorStore

        return TensorStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
