"""A configuration goes a short way from ``train`` on, and nothing but a run's parts is handed through many modules."""

from pathlib import Path

import pytest

from walks import threaded, walk

PACKAGE = Path(__file__).parents[2] / "python" / "megatrain_io"
CONFIG = frozenset({"RunConfig", "TrainConfig", "MemoryConfig", "DataConfig"})
PARTS = {
    "Model",
    "ModelLayout",
    "PartitionedModel",
    "Sequence[MicroBatch]",
    "StepNeeds",
    "PagedStore",
    "Device",
}
"""Types of what may be handed on through many modules: model, layout, device, store, and the parts of a job."""


@pytest.fixture(scope="module")
def sources():
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}


def test_a_configuration_is_read_on_a_short_way(sources):
    trip = walk(sources, ("training.trainer", "train"), CONFIG)
    assert {"training.setup", "planning.resolve", "training.loop"} <= set(trip.stays), "it was followed"
    assert len(trip.stays) < 25, trip.stays
    assert trip.returns < 5, trip.stays


def test_only_the_parts_of_a_run_are_handed_through_many_modules(sources):
    # What opens files stands for the methods of Path, which are no module either.
    found = threaded({name: text for name, text in sources.items() if name != "files.py"}, most=3)
    assert {label for label in found if label.partition(": ")[2] not in PARTS} == set(), found


MADE_UP = {
    "config/schema.py": "class RunConfig:\n    train: TrainConfig\n\n\nclass TrainConfig:\n    steps: int\n",
    "a.py": (
        "from megatrain_io.b import Job, plan\n"
        "from megatrain_io.config.schema import RunConfig\n"
        "from megatrain_io.c import rate\n\n\n"
        "def train(config: RunConfig):\n"
        "    made = plan(config)\n"
        "    job = Job(config)\n"
        "    rate(config.train, job)\n"
        "    steps(config.train.steps)\n\n\n"
        "def steps(count: int):\n    pass\n"
    ),
    "b.py": (
        "from dataclasses import dataclass\n"
        "from megatrain_io.c import rate\n\n\n"
        "@dataclass\nclass Job:\n    config: RunConfig\n\n"
        "    def settle(self):\n        self.again()\n\n"
        "    def again(self):\n        pass\n\n\n"
        "def plan(settings: RunConfig):\n"
        "    copy = settings.model_copy(update={})\n"
        "    rate(copy.train, None)\n"
    ),
    "c.py": "def rate(train, job: Job):\n    job.settle()\n",
}


def test_a_walk_follows_what_holds_the_argument_and_counts_where_it_comes_back():
    trip = walk(MADE_UP, ("a", "train"), frozenset({"RunConfig", "TrainConfig"}))
    assert trip.stays == ["a", "b", "c", "b", "c"]
    assert trip.returns == 2


def test_what_is_handed_through_many_modules_is_found():
    through = {
        f"{name}.py": f"from megatrain_io.{after} import f{after}\n\n\ndef f{name}(x: int):\n    f{after}(x)\n"
        for name, after in zip("abc", "bcd", strict=True)
    }
    through["d.py"] = "def fd(x: int):\n    pass\n"
    assert threaded(through, most=3) == {"x: int": ["a", "b", "c", "d"]}
    assert threaded(through, most=4) == {}
