"""Gradients: from those that autograd makes for each micro-batch to the sum of a record, which is submitted."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megatrain_io.errors import MegatrainIoError
from megatrain_io.paging.device.host_gradients import HostGradient
from megatrain_io.paging.protocols import Records
from megatrain_io.store.paged_store import BorrowedRecord

__all__ = ["Gradient", "leaves_of"]

# Elements that are added at once on the CPU: the sum of two dtypes makes a copy in the wider one.
_PIECE = 1 << 20


class Gradient:
    """The fp32 gradient of one record, summed over micro-batches in place."""

    def __init__(self, state: Records, record: int, expected: Sequence[str] | None = None) -> None:
        """Borrow memory for the gradient.

        Args:
            state: where it comes from, and is submitted to.
            record: whose gradient it is.
            expected: names of the tensors that get gradients first; None = all of the record's.
        """
        self._state = state
        self._record = record
        self._borrowed = state.gradient(record)
        self._seen: set[str] = set()
        self._names = [place.name for place in state.layout.records[record].tensors]
        self.expected = tuple(self._names if expected is None else expected)

    def add(self, names: Mapping[str, Tensor] | Sequence[str], gradients: Sequence[Tensor | None]) -> None:
        """Add native gradients by name; the first one of each tensor is copied, not added to zero."""
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None:
                continue
            is_first = name not in self._seen
            self._seen.add(name)
            if isinstance(self._borrowed, HostGradient):
                self._borrowed.add(name, gradient, is_first=is_first)
            elif is_first:
                self._borrowed.tensors[name].copy_(gradient)
            else:
                _add(self._borrowed.tensors[name], gradient)

    def submit(self, weights: BorrowedRecord) -> None:
        """Submit gradient and weights for the update.

        Raises:
            MegatrainIoError: a parameter of the record got no gradient.
        """
        missing = sorted(set(self._names) - self._seen)
        if missing:
            raise MegatrainIoError(
                f"{len(missing)} parameter(s) got no gradient in this step, the first is {missing[0]}: stock "
                "AdamW would skip them; freezing parameters is not possible yet"
            )
        self._state.submit(self._record, weights, self._borrowed)


def _add(total: Tensor, gradient: Tensor) -> None:
    """Compute ``total += gradient`` without a copy of the whole gradient in fp32."""
    is_fake = isinstance(gradient, FakeTensor)
    if total.device.type != "cpu" or total.dtype == gradient.dtype or total.dim() == 0 or is_fake:
        total.add_(gradient)
        return
    rows = max(1, _PIECE * total.shape[0] // max(1, total.numel()))
    for part, of_part in zip(total.split(rows), gradient.split(rows), strict=True):
        part.add_(of_part)


def leaves_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors over the same memory that are leaves of a new autograd graph."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
