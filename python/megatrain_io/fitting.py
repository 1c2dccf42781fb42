"""Start a model within a budget of RAM: what its steps need is found out first, then the budget is divided."""

from collections.abc import Sequence
from pathlib import Path

from megatrain_io.budget import MemoryPlan, StepNeeds, divide
from megatrain_io.checkpoint import SavedInputsBudget, input_nbytes, least_saved_inputs
from megatrain_io.model import MicroBatch
from megatrain_io.stream import PagedModel

__all__ = ["fit"]


def fit(
    model: PagedModel, micro_batches: Sequence[MicroBatch], *, ram: int, scratch: Sequence[Path]
) -> MemoryPlan:
    """Divide ``ram`` bytes for training steps on ``micro_batches`` or smaller ones, before the state is started.

    The model's saved inputs are bounded by it; pool and residents are for ``PagedState.start``.

    Args:
        model: its state is open, and not started.
        micro_batches: of the largest step.
        ram: bytes that the ledger may come to.
        scratch: file for saved inputs that do not fit, one for each drive.

    Raises:
        ConfigError: it is too small; says what would do.
    """
    layout = model.state.layout
    per_block = input_nbytes(model.hidden_nbytes(micro_batches))
    needs = StepNeeds(
        tables=model.state.ledger.total()[0],
        activations=model.rehearse(micro_batches) or 0,
        saved_inputs=layout.blocks * per_block,
        saved_inputs_least=least_saved_inputs(layout.blocks, per_block),
    )
    plan = divide(layout, model.training_schedule, needs, borrows_prologue=model.borrows_prologue, ram=ram)
    model.limit_saved_inputs(SavedInputsBudget(plan.saved_inputs if plan.is_spilled else None, scratch))
    return plan
