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
    configs = _configs_of_blocks(partition.config.get_text_config(), layout.blocks)
    flops: dict[StageKey, float] = {}
    active = 0
    for index in range(layout.blocks):
        stop = layout.block(index)
        used = _active(layout.tensors_of(stop), configs[index])
        active += used
        # Scores and their weighted sum: two products of all heads' width for each pair.
        width = _attention_width(configs[index], partition.hidden_size)
        forward = 2.0 * used * tokens + 4.0 * width * pairs
        flops[Phase.FORWARD, stop] = forward
        flops[Phase.BACKWARD, stop] = 3.0 * forward
    outer = [stop for stop in (layout.embedding, layout.head) if stop is not None]
    active += sum(place.elements for stop in outer for place in layout.tensors_of(stop))
    head = partition.vocab_size * partition.hidden_size
    flops[Phase.HEAD, layout.loss_stop] = 3.0 * 2.0 * head * tokens
    return Work(flops, active, tokens)


def _configs_of_blocks(config: object, blocks: int) -> Sequence[object]:
    """The configuration of each block: where blocks differ in heads or widths, that of the whole model has none."""
    own = getattr(config, "per_layer_config", None)
    return own if isinstance(own, list | tuple) and len(own) == blocks else [config] * blocks


def _number(config: object, *names: str) -> int:
    """The first of these settings that is a number from 1 on; 0 where there is none, or blocks differ in it."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # noqa: BLE001, S112 - a setting of single layers, asked of the whole model
            continue
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _attention_width(config: object, hidden_size: int) -> int:
    """Width of all heads of a block together; 0 where it has none."""
    heads = _number(config, "num_attention_heads")
    return heads * (_number(config, "head_dim") or (hidden_size // heads if heads else 0))


def _active(tensors: Iterable[TensorPlace], config: object) -> int:
    """Parameters of a block that a token meets: of routed experts the share that a token is routed to."""
    experts = _number(config, "num_experts", "num_local_experts", "n_routed_experts")
    used = _number(config, "num_experts_per_tok")
    total = 0.0
    for place in tensors:
        share = 1.0
        if experts and used and ".experts." in place.name and "shared" not in place.name:
            share = used / experts
        total += place.elements * share
    return round(total)
