"""Seconds of computing: measured on two blocks of the model with made-up weights, or worked out from a rate.

FLOPs are counted as 2 for each parameter and token of a matrix product, and causal attention on top (Kaplan et al.,
arXiv:2001.08361; Chowdhery et al., arXiv:2204.02311, appendix B): a pass forward once, a pass backward twice, and the
recomputation of a block once more.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatrain_io.data.batch import MicroBatch
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.step import LOGITS_BYTES, Step, slice_tokens
from megatrain_io.planning.dry_run import FakeStore
from megatrain_io.planning.timeline import StageKey
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.schedule import Phase

__all__ = ["measured_seconds"]

_ROUNDS, _ROUNDS_MAX = 3, 20
_SECONDS = 2.0


def measured_seconds(
    partition: PartitionedModel, layout: ModelLayout, batch: MicroBatch, device: Device | None = None
) -> dict[StageKey, float]:
    """Seconds of each stage for one micro-batch on this machine, when nothing else runs.

    The step itself is run, on two blocks, with weights that are made up: how long a product takes does not depend on
    them. Medians of some rounds: the best would promise what a machine does in its best moments only. On a device with
    memory of its own the model computes from then on.
    """
    device = device or Cpu()
    partition.to(device.torch_device)
    batch = batch.to(device.torch_device)
    fake_store = FakeStore(layout)
    clock = _Clock(device)
    partition.train()
    with device.random_state(), device.computing(), device.torch_device:
        while not clock.is_enough:
            step = Step(
                partition,
                fake_store,
                fake_store,
                [batch],
                slice_tokens=slice_tokens(partition, LOGITS_BYTES),
                span=clock.span,
                device=device,
            )
            step.embedding()
            step.forward(saving=True)
            step.head(training=True)
            step.leave_head()
            step.backward()
            if not layout.is_frozen:
                step.embedding_backward()
            clock.next_round()
    blocks = range(fake_store.layout.blocks)
    per_block = {
        phase: clock.median(*(f"{phase} block {index}" for index in blocks))
        for phase in ("forward", "backward")
    }
    found: dict[StageKey, float] = {(Phase.EMBEDDING, layout.embedding): clock.median("embedding")}
    for index in range(layout.blocks):
        found[Phase.FORWARD, layout.block(index)] = per_block["forward"]
        found[Phase.BACKWARD, layout.block(index)] = per_block["backward"]
    owner = layout.embedding if layout.head is None else layout.head
    found[Phase.HEAD, owner] = clock.median("head")
    if not layout.is_frozen:
        found[Phase.EMBEDDING_BACKWARD, layout.embedding] = clock.median("embedding_backward")
    return found


class _Clock:
    """Times of each span; the first round warms up."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._times: dict[str, list[float]] = {}
        self._rounds = -1
        self._began = 0.0

    @property
    def is_enough(self) -> bool:
        """Whether some rounds were run, for some time."""
        return self._rounds >= _ROUNDS_MAX or (
            self._rounds >= _ROUNDS and time.perf_counter() - self._began >= _SECONDS
        )

    def median(self, *names: str) -> float:
        """Of all times of these spans."""
        return statistics.median(each for name in names for each in self._times[name])

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._device.record("compute").wait()
        if self._rounds >= 0:
            self._times.setdefault(name, []).append(time.perf_counter() - began)

    def next_round(self) -> None:
        if self._rounds < 0:
            self._began = time.perf_counter()
        self._rounds += 1
