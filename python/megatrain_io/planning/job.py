"""The run that is planned: a configuration, a model, and the memory that it may take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatrain_io.config.schema import RunConfig
from megatrain_io.data.batch import MicroBatch, blank_micro_batch
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.store.layout import ModelLayout

__all__ = ["TrainingJob"]


@dataclass(frozen=True)
class TrainingJob:
    """A run to plan: its configuration, its model, and the memory that it may take.

    Attributes:
        config: of the run.
        partition: the model without its parameters.
        layout: of the store, which need not be there.
        micro_batches: of the largest step.
        tables: bytes of RAM that the open store takes for its tables.
        ram: bytes of RAM that training may take.
        steps: optimizer steps of the run; None where their number is not known.
        is_made: whether the store is there already.
        vram: bytes of a device's memory that training may take; None where the CPU computes.
    """

    config: RunConfig
    partition: PartitionedModel
    layout: ModelLayout
    micro_batches: Sequence[MicroBatch]
    tables: int
    ram: int
    steps: int | None = None
    is_made: bool = False
    vram: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens that go through the model in a step, padding included."""
        return sum(batch.input_ids.numel() for batch in self.micro_batches)

    @property
    def keeps(self) -> bool:
        """Whether gradients wait until the norm over all of them is known (``train.max_grad_norm``)."""
        return self.config.train.max_grad_norm is not None

    @property
    def commits_at_once(self) -> bool:
        """Whether every step is committed: only then may a step update before its norm is known."""
        return self.config.memory.commit_every == 1 and self.layout.durability == "step"

    def with_accumulation(self, count: int) -> "TrainingJob":
        """The same job with ``count`` micro-batches like the first one."""
        train = self.config.train.model_copy(update={"gradient_accumulation_steps": count})
        config = self.config.model_copy(update={"train": train})
        return replace(self, config=config, micro_batches=[self.micro_batches[0]] * count)

    def with_rows(self, batch: int, length: int, tokens: int) -> "TrainingJob":
        """The same job with ``tokens`` a step or a few more: micro-batches of ``batch`` rows of ``length`` tokens."""
        train, data = self.config.train, self.config.data
        count = max(1, -(-tokens // (batch * length)))
        config = self.config.model_copy(
            update={
                "train": train.model_copy(
                    update={"per_device_train_batch_size": batch, "gradient_accumulation_steps": count}
                ),
                "data": data.model_copy(update={"max_length": length}),
            }
        )
        packed = data.packing and self.partition.spec.packs
        return replace(
            self, config=config, micro_batches=[blank_micro_batch(batch, length, packed=packed)] * count
        )
