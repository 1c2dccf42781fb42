"""What compute itself needs: the tensors that torch makes while a step runs, counted as they come and go."""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["WorkspaceMeter"]


class WorkspaceMeter(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the ``with`` that are alive at once.

    Sees what passes through torch's dispatcher (activations, gradients, logits), not the scratch memory
    inside a kernel. Memory that was there before, such as buffers of the pool, is not counted.

    Attributes:
        peak_nbytes: most bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.peak_nbytes = 0
        self._nbytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count what it made."""
        inputs = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in inputs:
                self._enter(leaf)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if address in self._known or nbytes == 0:
            return
        self._known.add(address)
        self._nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self._nbytes)
        weakref.finalize(storage, self._leave, address, nbytes).atexit = False

    def _leave(self, address: int, nbytes: int) -> None:
        self._known.discard(address)
        self._nbytes -= nbytes


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
