"""Seconds of computing, measured on two blocks of the model with made-up weights."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatrain_io.data.batch import MicroBatch
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.step import LOGITS_BYTES, Step, slice_tokens
from megatrain_io.planning.dry_run import FakeStore, fake_store_nbytes, shortened
from megatrain_io.planning.flops import work_of
from megatrain_io.planning.job import TrainingJob
from megatrain_io.planning.timeline import StageKey
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.schedule import Phase

__all__ = ["calibrate", "measured_seconds"]

# A step of two blocks and the head that would take longer is not run for its time.
_CALIBRATION_SECONDS = 2.0

_ROUNDS, _ROUNDS_MAX = 3, 20
_SECONDS = 2.0


def calibrate(job: TrainingJob) -> dict[StageKey, float] | None:
    """Measure the seconds of each stage of one micro-batch of the job on this machine.

    None where the drive's rates are not known, so that there are no times anyway; where a GPU computes; or where
    measuring would take too long or too much RAM.
    """
    partition, layout, batch = job.partition, job.layout, job.micro_batch
    rate = job.hardware.flops_per_second
    if job.hardware.read is None or rate is None or job.hardware.device is not None:
        return None
    needs = job.with_accumulation(1).needs
    if fake_store_nbytes(layout) + needs.always + needs.activations > job.ram:
        return None
    rows, length = batch.input_ids.shape
    work = work_of(partition, layout, [(rows, length)])
    stages = [
        (phase, layout.block(index))
        for phase in (Phase.FORWARD, Phase.BACKWARD)
        for index in range(shortened(layout).blocks)
    ]
    head = sum(flops for (phase, _), flops in work.flops.items() if phase is Phase.HEAD)
    if (sum(work.flops.get(stage, 0.0) for stage in stages) + head) / rate > _CALIBRATION_SECONDS:
        return None
    try:
        return measured_seconds(partition, layout, batch)
    except Exception:  # noqa: BLE001 - made-up weights may leave a part of the model without a gradient
        return None


def measured_seconds(
    partition: PartitionedModel, layout: ModelLayout, batch: MicroBatch, device: Device | None = None
) -> dict[StageKey, float]:
    """Seconds of each stage for one micro-batch on this machine, when nothing else runs.

    The step itself is run on two blocks, with made-up weights: the time of a product does not depend on their values.
    The medians of some rounds are taken: the fastest round would promise what a machine rarely does. If the device has
    memory of its own, ``partition`` computes there from then on.

    Raises:
        MegatrainIoError: with made-up weights a parameter gets no gradient.
    """
    device = device or Cpu()
    partition.to(device.torch_device)
    batch = batch.to(device.torch_device)
    fake_store = FakeStore(layout)
    clock = _Clock(device)
    with partition.preserved(), device.random_state(), device.computing(), device.torch_device:
        partition.train()
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
            step.embedding_backward()
            clock.next_round()
    blocks = range(fake_store.layout.blocks)
    per_block = {
        phase: clock.median(*(f"{phase} block {index}" for index in blocks))
        for phase in ("forward", "backward")
    }
    seconds: dict[StageKey, float] = {(Phase.EMBEDDING, layout.embedding): clock.median("embedding")}
    for index in range(layout.blocks):
        seconds[Phase.FORWARD, layout.block(index)] = per_block["forward"]
        seconds[Phase.BACKWARD, layout.block(index)] = per_block["backward"]
    seconds[Phase.HEAD, layout.loss_stop] = clock.median("head")
    if layout.trained_of(layout.embedding):
        seconds[Phase.EMBEDDING_BACKWARD, layout.embedding] = clock.median("embedding_backward")
    return seconds


class _Clock:
    """Seconds of each span of a step, over several rounds; the first round warms up and does not count."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._times: dict[str, list[float]] = {}
        self._rounds = -1
        self._began = 0.0

    @property
    def is_enough(self) -> bool:
        """Whether enough rounds were run, for long enough."""
        return self._rounds >= _ROUNDS_MAX or (
            self._rounds >= _ROUNDS and time.perf_counter() - self._began >= _SECONDS
        )

    def median(self, *names: str) -> float:
        """The median over all times of these spans, in seconds."""
        return statistics.median(seconds for name in names for seconds in self._times[name])

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
