"""The memory that compute itself needs: tensors that torch makes while a step runs, counted as they come and go."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TensorMeter"]


class TensorMeter(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the context that are alive at once.

    Sees what passes through torch's dispatcher (activations, gradients, logits), not the scratch memory
    inside a kernel. Memory that was there before, such as buffers of the pool, is not counted.

    Attributes:
        nbytes: bytes alive now.
        peak_nbytes: most bytes alive at once.
        made_nbytes: bytes of all that was made, alive or not.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.peak_nbytes = 0
        self.nbytes = 0
        self.made_nbytes = 0
        self._known: set[int] = set()
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out tensors that are made inside the context."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count what it made."""
        kwargs = kwargs or {}
        inputs = {_identity(tensor) for tensor in _tensors((*args, *kwargs.values()))}
        result = func(*args, **kwargs)
        for tensor in _tensors((result,)):
            if _identity(tensor) not in inputs:
                self._enter(tensor)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        identity, nbytes = _identity(tensor), storage.nbytes()
        # A shape alone has no memory, though its storage names a size.
        is_empty = nbytes == 0 or tensor.device.type == "meta"
        if identity in self._known or is_empty or self._is_paused:
            return
        self._known.add(identity)
        self.nbytes += nbytes
        self.made_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        weakref.finalize(storage, self._leave, identity, nbytes).atexit = False

    def _leave(self, identity: int, nbytes: int) -> None:
        self._known.discard(identity)
        self.nbytes -= nbytes


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those that an operator takes or gives, plain or in a list; ``tree_leaves`` costs 4 us more for each operator."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _identity(tensor: Tensor) -> int:
    """A number that tells the storage of a tensor, which its views share; a fake tensor has no address."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - nothing public tells two storages apart
