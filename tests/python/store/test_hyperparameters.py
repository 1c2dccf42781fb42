"""The hyperparameters of a step say which optimizer they are of, and the core believes nobody else."""

from dataclasses import dataclass

import pytest

from megatrain_io.store.paged_store import AdamWStep, PagedStore
from megatrain_io.store.pool import pool_sizes
from megatrain_io.store.schedule import build_schedule
from paged import Case, files, make_store


@dataclass(frozen=True)
class OtherStep(AdamWStep):
    """What AdamW needs, under the name of another optimizer."""

    optimizer = "sgd"


def test_hyperparameters_of_an_unknown_optimizer_are_refused(tmp_path):
    case = Case()
    path = tmp_path / "store"
    make_store(path, case)
    with PagedStore(*files(path)) as state:
        sizes = {"tied_embeddings": case.tied, "training": False}
        state.start(pool_sizes(state.layout, **sizes))
        checked = state.check(build_schedule(state.layout, **sizes))
        with pytest.raises(ValueError, match='optimizer "sgd": adamw'):
            state.begin(checked, OtherStep(1, 1e-3))
        # Nothing was begun, and nothing is in the way of what is.
        state.begin(checked, AdamWStep(1, 1e-3))
        state.weights(state.layout.embedding).give_back()
        state.abort()
