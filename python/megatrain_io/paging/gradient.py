"""Weights and gradients of a stop: what autograd makes for each micro-batch is summed, and the sums are submitted."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megatrain_io.errors import MegatrainIoError
from megatrain_io.paging.device.host_gradients import HostGradient
from megatrain_io.paging.protocols import Records
from megatrain_io.paging.ranks import Ranks

__all__ = ["Gradient", "StopWeights", "leaves_of"]

# Elements that are added at once on the CPU: the sum of two dtypes makes a copy in the wider one.
_PIECE = 1 << 20


class StopWeights:
    """The weights of all records of a stop, borrowed in the order in which the schedule loads them.

    Attributes:
        records: what was borrowed, by record.
        tensors: all of them by name, each in the dtype of its record; empty once they were given back.
    """

    def __init__(self, state: Records, stop: int) -> None:
        self.records = {record: state.weights(record) for record in state.layout.stops[stop]}
        self.tensors: dict[str, Tensor] = {}
        for borrowed in self.records.values():
            self.tensors |= borrowed.tensors

    def give_back(self) -> None:
        """Return the buffers of all records.

        Raises:
            BufferInUseError: a tensor or view over one of them is still alive.
        """
        self.tensors = {}
        for borrowed in self.records.values():
            borrowed.give_back()


class Gradient:
    """The fp32 gradients of the trained records of a stop, summed over micro-batches in place.

    Attributes:
        names: of the tensors that get gradients.
        expected: those of them that get theirs first.
    """

    def __init__(
        self, state: Records, ranks: Ranks, stop: int, expected: Sequence[str] | None = None
    ) -> None:
        """Borrow memory for the gradients, record after record.

        Args:
            state: where it comes from, and they are submitted to.
            ranks: over which they are summed.
            stop: whose gradients they are.
            expected: names of the tensors that get gradients first; None = all of the stop's.
        """
        self._state = state
        self._ranks = ranks
        layout = state.layout
        self._borrowed = {record: state.gradient(record) for record in layout.trained_of(stop)}
        self._record_of = {
            place.name: record for record in self._borrowed for place in layout.records[record].tensors
        }
        self._seen: set[str] = set()
        self.names = tuple(self._record_of)
        self.expected = tuple(name for name in expected or self.names if name in self._record_of)

    def add(self, names: Mapping[str, Tensor] | Sequence[str], gradients: Sequence[Tensor | None]) -> None:
        """Add native gradients by name; the first one of each tensor is copied, not added to zero."""
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None:
                continue
            is_first = name not in self._seen
            self._seen.add(name)
            total = self._borrowed[self._record_of[name]]
            if isinstance(total, HostGradient):
                total.add(name, gradient, is_first=is_first)
            elif is_first:
                total.tensors[name].copy_(gradient)
            else:
                _add(total.tensors[name], gradient)

    def submit(self, weights: StopWeights) -> None:
        """Submit the gradients for the update, in the order of the records, and give all weights of the stop back.

        Raises:
            MegatrainIoError: a trained parameter of the stop got no gradient.
        """
        missing = sorted(set(self.names) - self._seen)
        if missing:
            raise MegatrainIoError(
                f"{len(missing)} parameter(s) got no gradient in this step, the first is {missing[0]}: stock "
                "AdamW would skip them; freezing parameters is not possible yet"
            )
        weights.tensors = {}
        for record, borrowed in weights.records.items():
            if record in self._borrowed:
                self._ranks.sum_gradient(record, self._borrowed[record])
                self._state.submit(record, borrowed, self._borrowed[record])
            else:
                borrowed.give_back()


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
