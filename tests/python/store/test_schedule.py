"""What a schedule says of whole passes is what its operations say one by one."""

from itertools import product

import pytest

from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.schedule import Phase, Residents, build_schedule, flush_schedule, traffic

BLOCKS = 3


def layout_of(state_format):
    """Records that end within a chunk, so that their last one is smaller."""
    parts = [("prologue", [("table", (97, 131))])]
    parts += [(f"block {n}", [(f"{n} weight", (257, 129)), (f"{n} norm", (129,))]) for n in range(BLOCKS)]
    parts.append(("epilogue", [("head", (97, 131))]))
    return ModelLayout.build(parts, BLOCKS, state_format, chunk_parameters=4096)


FORMATS = {"one": "bf16", "several": lambda name: "f32" if name.endswith("norm") else "bf16"}
POLICIES = [("immediate", False), ("deferred", True), ("deferred", False), ("speculative", False)]


@pytest.mark.parametrize("several", FORMATS)
@pytest.mark.parametrize(("policy", "applies"), POLICIES)
def test_passes_move_what_their_operations_move(several, policy, applies):
    layout = layout_of(FORMATS[several])
    some = Residents(frozenset({0, 2}), frozenset(range(1, len(layout.chunks), 3)), frozenset({1, 2}))
    everything = Residents(
        frozenset(range(len(layout.records))), frozenset(range(len(layout.chunks))), frozenset(layout.trained)
    )
    of_step = build_schedule(layout, tied_embeddings=True, training=True, policy=policy, applies=applies)
    for schedule, residents, commits in product(
        (of_step, flush_schedule(layout)), (Residents(), some, everything), (True, False)
    ):
        operations = tuple(schedule)
        assert len(schedule) == len(operations) > len(schedule.passes)
        assert schedule.traffic(residents, commits=commits) == traffic(
            operations, layout, residents, commits=commits
        )
        by_phase = schedule.traffic_by_phase(residents, commits=commits)
        for phase in Phase:
            own = [operation for operation in operations if operation.phase is phase]
            assert by_phase[phase] == traffic(own, layout, residents, commits=commits)
