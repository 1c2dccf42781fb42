"""Seconds of computing: measured on two blocks of the model with made-up weights, or worked out from a rate.

FLOPs are counted as 2 for each parameter and token of a matrix product, and causal attention on top (Kaplan et al.,
arXiv:2001.08361; Chowdhery et al., arXiv:2204.02311, appendix B): a pass forward once, a pass backward twice, and the
recomputation of a block once more.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from megatrain_io.device import Cpu, Device
from megatrain_io.layout import ModelLayout, Record
from megatrain_io.model import CutModel, MicroBatch
from megatrain_io.program import StopKey
from megatrain_io.rehearsal import StandIn
from megatrain_io.schedule import Phase
from megatrain_io.step import LOGITS_BYTES, Step, slice_tokens

__all__ = ["Work", "measured_seconds", "work_of"]

_ROUNDS, _ROUNDS_MAX = 3, 20
_SECONDS = 2.0


@dataclass(frozen=True)
class Work:
    """FLOPs of one step.

    Attributes:
        flops: by stop.
        active: parameters that a token meets; fewer than there are in a mixture of experts.
        tokens: of the step.
    """

    flops: Mapping[StopKey, float]
    active: int
    tokens: int

    def seconds(self, flops_per_second: float) -> dict[StopKey, float]:
        """At one rate for all stops."""
        return {stop: flops / flops_per_second for stop, flops in self.flops.items()}


def work_of(
    cut: CutModel, layout: ModelLayout, rows: Sequence[tuple[int, int]], *, attention: bool = True
) -> Work:
    """Count the FLOPs of a step.

    Args:
        cut: the model in pieces.
        layout: of its parameters.
        rows: micro-batches as (sequences, tokens of each).
        attention: whether attention's own products are counted, those of tokens with tokens.
    """
    tokens = sum(count * length for count, length in rows)
    pairs = sum(count * length * length for count, length in rows) / 2 if attention else 0.0
    config = cut.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = heads * (getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
    flops: dict[StopKey, float] = {}
    active = 0
    for index in range(layout.blocks):
        record = layout.block(index)
        used = _active(layout.records[record], config)
        active += used
        # Scores and their weighted sum: two products of all heads' width for each pair.
        forward = 2.0 * used * tokens + 4.0 * width * pairs
        flops[Phase.FORWARD, record] = forward
        flops[Phase.BACKWARD, record] = 3.0 * forward
    outer = [record for record in (layout.prologue, layout.epilogue) if record is not None]
    active += sum(place.elements for record in outer for place in layout.records[record].tensors)
    head = config.vocab_size * config.hidden_size
    owner = layout.prologue if layout.epilogue is None else layout.epilogue
    flops[Phase.EPILOGUE, owner] = 3.0 * 2.0 * head * tokens
    return Work(flops, active, tokens)


def _active(record: Record, config: object) -> int:
    """Parameters of a block that a token meets: of experts, those that it is routed to."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    experts = experts or getattr(config, "n_routed_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    total = 0.0
    for place in record.tensors:
        share = 1.0
        if experts and used and ".experts." in place.name and "shared" not in place.name:
            share = used / experts
        total += place.elements * share
    return round(total)


def measured_seconds(
    cut: CutModel, layout: ModelLayout, batch: MicroBatch, device: Device | None = None
) -> dict[StopKey, float]:
    """Seconds of each stop for one micro-batch on this machine, when nothing else runs.

    The step itself is run, on two blocks, with weights that are made up: how long a product takes does not depend on
    them. Medians of some rounds: the best would promise what a machine does in its best moments only. On a device with
    memory of its own the model computes from then on.
    """
    device = device or Cpu()
    cut.to(device.torch_device)
    batch = batch.to(device.torch_device)
    stand_in = StandIn(layout)
    clock = _Clock(device)
    cut.train()
    with device.random_state(), device.computing(), device.torch_device:
        while not clock.is_enough:
            step = Step(
                cut,
                stand_in,
                stand_in,
                [batch],
                slice_tokens=slice_tokens(cut, LOGITS_BYTES),
                span=clock.span,
                device=device,
            )
            step.prologue()
            step.forward(saving=True)
            step.epilogue(training=True)
            step.leave_epilogue()
            step.backward()
            if not layout.is_frozen:
                step.prologue_backward()
            clock.next_round()
    blocks = range(stand_in.layout.blocks)
    per_block = {
        phase: clock.median(*(f"{phase} block {index}" for index in blocks))
        for phase in ("forward", "backward")
    }
    found: dict[StopKey, float] = {(Phase.PROLOGUE, layout.prologue): clock.median("prologue")}
    for index in range(layout.blocks):
        found[Phase.FORWARD, layout.block(index)] = per_block["forward"]
        found[Phase.BACKWARD, layout.block(index)] = per_block["backward"]
    owner = layout.prologue if layout.epilogue is None else layout.epilogue
    found[Phase.EPILOGUE, owner] = clock.median("epilogue")
    if not layout.is_frozen:
        found[Phase.PROLOGUE_BACKWARD, layout.prologue] = clock.median("prologue_backward")
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
