"""FLOPs of a training step, and seconds at a given rate.

2 for each parameter and token of a matrix product, and causal attention on top (Kaplan et al., arXiv:2001.08361;
Chowdhery et al., arXiv:2204.02311, appendix B): a pass forward once, a pass backward twice, and the recomputation of a
block once more.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatrain_io.models.partition import PartitionedModel
from megatrain_io.planning.timeline import StageKey
from megatrain_io.store.layout import ModelLayout, TensorPlace
from megatrain_io.store.schedule import Phase

__all__ = ["Work", "work_of"]


@dataclass(frozen=True)
class Work:
    """FLOPs of one training step.

    Attributes:
        flops: by stage of the step.
        active: parameters that a token meets; fewer than there are in a mixture of experts.
        tokens: that go through the model in the step.
    """

    flops: Mapping[StageKey, float]
    active: int
    tokens: int

    def seconds(self, flops_per_second: float) -> dict[StageKey, float]:
        """Seconds of each stage, if all of them compute at ``flops_per_second``."""
        return {stage: flops / flops_per_second for stage, flops in self.flops.items()}


def work_of(
    partition: PartitionedModel,
    layout: ModelLayout,
    rows: Sequence[tuple[int, int]],
    *,
    attention: bool = True,
) -> Work:
    """Count the FLOPs of a training step, as the module says.

    Args:
        partition: the model without its parameters.
        layout: of its parameters.
        rows: micro-batches as (sequences, tokens of each).
        attention: whether attention's own products are counted, those of tokens with tokens.
    """
    tokens = sum(count * length for count, length in rows)
    pairs = sum(count * length * length for count, length in rows) / 2 if attention else 0.0
    config = partition.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = heads * (getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
    flops: dict[StageKey, float] = {}
    active = 0
    for index in range(layout.blocks):
        stop = layout.block(index)
        used = _active(layout.tensors_of(stop), config)
        active += used
        # Scores and their weighted sum: two products of all heads' width for each pair.
        forward = 2.0 * used * tokens + 4.0 * width * pairs
        flops[Phase.FORWARD, stop] = forward
        flops[Phase.BACKWARD, stop] = 3.0 * forward
    outer = [stop for stop in (layout.embedding, layout.head) if stop is not None]
    active += sum(place.elements for stop in outer for place in layout.tensors_of(stop))
    head = config.vocab_size * config.hidden_size
    flops[Phase.HEAD, layout.loss_stop] = 3.0 * 2.0 * head * tokens
    return Work(flops, active, tokens)


def _active(tensors: Iterable[TensorPlace], config: object) -> int:
    """Parameters of a block that a token meets: of routed experts the share that a token is routed to."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    experts = experts or getattr(config, "n_routed_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    total = 0.0
    for place in tensors:
        share = 1.0
        if experts and used and ".experts." in place.name and "shared" not in place.name:
            share = used / experts
        total += place.elements * share
    return round(total)
