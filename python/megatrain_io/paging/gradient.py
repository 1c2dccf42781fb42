"""Weights and gradients of a stop: what autograd makes for each micro-batch is summed, and the sums are submitted."""

from collections.abc import Collection, Mapping, Sequence

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
    """The fp32 gradients of those records of a stop that a step updates, summed over micro-batches in place.

    Attributes:
        names: of the tensors that get gradients.
        expected: those of them that get theirs first.
    """

    def __init__(
        self,
        state: Records,
        ranks: Ranks,
        stop: int,
        expected: Sequence[str] | None = None,
        *,
        updated: Collection[int] | None = None,
        carried: Collection[int] = (),
    ) -> None:
        """Borrow memory for the gradients, record after record.

        Args:
            state: where it comes from, and they are submitted to.
            ranks: over which they are summed.
            stop: whose gradients they are.
            expected: names of the tensors that get gradients first; None = all of the stop's.
            updated: records, of any stop, that the step updates; None = all that are trained.
            carried: records, of any stop, that the step updates without a gradient: it writes what is in RAM alone.
        """
        self._state = state
        self._ranks = ranks
        layout = state.layout
        self._borrowed = {
            record: state.gradient(record)
            for record in layout.trained_of(stop)
            if updated is None or record in updated
        }
        self._carried = frozenset(carried)
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

        A record that got no gradient is skipped, as ``torch.optim.AdamW`` skips parameters without one.

        Raises:
            MegatrainIoError: some parameters of a record got a gradient, and others did not. Nothing was submitted.
        """
        skipped = {record for record in self._borrowed if self._got_none(record)}
        weights.tensors = {}
        for record, borrowed in weights.records.items():
            if record in skipped:
                self._borrowed[record].give_back()
                self._state.skip(record, borrowed)
            elif record in self._borrowed:
                self._ranks.sum_gradient(record, self._borrowed[record])
                self._state.submit(record, borrowed, self._borrowed[record])
            elif record in self._carried:
                self._state.skip(record, borrowed)
            else:
                borrowed.give_back()

    def _got_none(self, record: int) -> bool:
        names = {name for name, own in self._record_of.items() if own == record}
        missing = sorted(names - self._seen)
        if missing and len(missing) < len(names):
            name = self._state.layout.records[record].name
            raise MegatrainIoError(
                f"{len(missing)} of {len(names)} parameters of {name} got no gradient in this step, the first is "
                f"{missing[0]}, and the others got one: torch.optim.AdamW would leave them as they are, and here the "
                "parameters of a block are updated together. The step was dropped. Train on data that reaches all of "
                "them, or larger batches"
            )
        return bool(missing)


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
