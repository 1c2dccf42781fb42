"""When copies and compute happened on a device, for the trace and for benches."""

from megatrain_io.paging.device.base import Device, Event, Stream

__all__ = ["DeviceEvents"]


class DeviceEvents:
    """Pairs of events, each the beginning and end of a copy or of compute; none are noted before ``record``.

    Args:
        device: on which they happen.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._noted: list[tuple[str, str, int | None, Event, Event]] | None = None

    def record(self) -> None:
        """Note pairs of events from now on."""
        self._noted = []

    def began(self, stream: Stream) -> Event | None:
        """An event before what is queued on a stream next; None if nothing is noted."""
        return None if self._noted is None else self._device.record(stream)

    def ended(
        self, lane: str, name: str, began: Event | None, ended: Event, chunk: int | None = None
    ) -> None:
        """Note a pair of events.

        Args:
            lane: of the trace that shows it.
            name: what happened between the two.
            began: what ``began`` returned.
            ended: the event after it.
            chunk: that was moved, if it was one.
        """
        if self._noted is not None and began is not None:
            self._noted.append((lane, name, chunk, began, ended))

    def take(self) -> list[tuple[str, str, int | None, int, int]]:
        """Lane, name, chunk, start and end (ns of ``time.monotonic_ns``) of all that happened since the last call."""
        taken: list[tuple[str, str, int | None, int, int]] = []
        left = []
        for lane, name, chunk, began, ended in self._noted or ():
            start, end = began.at_ns(), ended.at_ns()
            if start is None or end is None:
                left.append((lane, name, chunk, began, ended))
            else:
                taken.append((lane, name, chunk, start, end))
        if self._noted is not None:
            self._noted = left
        return taken
