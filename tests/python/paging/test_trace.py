"""A trace of a run: it holds all that ran, in lanes in which nothing overlaps, and can be read at any time."""

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from megatrain_io.cli.app import app
from megatrain_io.errors import ConfigError, InterruptedRunError
from megatrain_io.paging.paged_model import PagedModel
from megatrain_io.paging.step import Step
from megatrain_io.paging.trace import Trace
from megatrain_io.store.paged_store import PagedStore
from megatrain_io.store.schedule import build_schedule
from megatrain_io.training.callbacks import TraceCallback
from runs import configured, start

STEPS = 2
MICRO_BATCHES = 2
BLOCKS = 2


def traced(source, folder, **changes):
    config = configured(source, folder / "run", max_steps=STEPS, **changes)
    with Trace(folder / "trace.json") as trace:
        start(config, callbacks=[TraceCallback(trace)])
    return config


def lanes_of(path):
    """Events by the name of their lane: start and end in nanoseconds, name, chunk."""
    return lanes_in(json.loads(path.read_text("utf-8")))


def lanes_in(events):
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    lanes = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            start = round(1000 * event["ts"])
            end = start + round(1000 * event["dur"])
            lanes[names[event["tid"]]].append((start, end, event["name"], event.get("args", {}).get("chunk")))
    return lanes


def of_lanes(lanes, prefix):
    """How often each event occurs in the lanes whose name begins so."""
    return Counter(
        (event[2], event[3]) for name, events in lanes.items() if name.startswith(prefix) for event in events
    )


def overlaps(events):
    """Pairs of events of which neither ends before the other begins, nor holds the other."""
    found, open_events = [], []
    for event in sorted(events, key=lambda each: (each[0], -each[1])):
        while open_events and open_events[-1][1] <= event[0]:
            open_events.pop()
        if open_events and open_events[-1][1] < event[1]:
            found.append((open_events[-1], event))
        open_events.append(event)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run of two steps with a trace, without an evaluation."""
    return tmp_path_factory.mktemp("traced")


@pytest.fixture(scope="module")
def lanes(source, folder):
    config = configured(source, folder / "run", max_steps=STEPS)
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": None})})
    with Trace(folder / "trace.json") as trace:
        start(config, callbacks=[TraceCallback(trace)])
    return lanes_of(folder / "trace.json")


@pytest.fixture(scope="module")
def schedule(lanes, folder):  # noqa: ARG001 - the run is made by then
    with PagedStore(folder / "run" / "store.mtio", engine="threads") as state:
        return build_schedule(state.layout, tied_embeddings=True, training=True)


def test_nothing_overlaps_in_a_lane_but_what_holds_the_other(lanes):
    assert {name: overlaps(events) for name, events in lanes.items() if overlaps(events)} == {}
    assert all(start <= end for events in lanes.values() for start, end, _, _ in events)


def test_overlaps_are_noticed():
    assert overlaps([(0, 9, "a", None), (1, 3, "b", None), (3, 9, "c", None)]) == []
    assert len(overlaps([(0, 5, "a", None), (3, 6, "b", None)])) == 1


def test_every_transfer_of_the_schedule_is_there(lanes, schedule):
    loads = Counter(each.chunk.index for each in schedule if each.kind == "load")
    updates = Counter(each.chunk.index for each in schedule if each.kind == "update")
    reads = {("read weights", chunk): STEPS * count for chunk, count in loads.items()}
    # Planes of an import are zero and not read.
    reads |= {("read planes", chunk): count for chunk, count in updates.items()}
    assert of_lanes(lanes, "read") == reads
    each_step = {chunk: STEPS * count for chunk, count in updates.items()}
    assert of_lanes(lanes, "update") == {("update", chunk): n for chunk, n in each_step.items()}
    writes = {(f"write {what}", chunk): n for chunk, n in each_step.items() for what in ("weights", "planes")}
    assert of_lanes(lanes, "write") == writes
    verified = Counter()
    for (_, chunk), count in reads.items():
        verified["verify", chunk] += count
    # Zero planes are verified, too, in the first step.
    assert of_lanes(lanes, "verify") == verified + Counter({("verify", chunk): 1 for chunk in updates})
    assert of_lanes(lanes, "commit") == {("commit", None): STEPS}
    assert set(of_lanes(lanes, "stall")) <= {
        (cause, None) for cause in ("read", "pool", "write", "update", "commit")
    }


def test_compute_covers_each_step_phase_block_and_micro_batch(lanes):
    counts = Counter(name for _, _, name, _ in lanes["compute"])
    phases = ("embedding", "forward", "head", "backward", "embedding_backward")
    blocks = [f"{phase} block {block}" for phase in ("forward", "backward") for block in range(BLOCKS)]
    passes = 3 + 2 * BLOCKS  # embedding, head, embedding again; each block forward and backward
    expected = {f"step {step}": 1 for step in range(1, STEPS + 1)}
    expected |= dict.fromkeys((*phases, *blocks), STEPS)
    expected |= {f"micro-batch {index}": STEPS * passes for index in range(MICRO_BATCHES)}
    assert counts == expected


def test_an_update_lies_between_its_gradient_and_its_commit(lanes):
    """The clocks of both languages are one: what a step computes comes before what is done with it."""
    steps = {name: (start, end) for start, end, name, _ in lanes["compute"] if name.startswith("step")}
    assert min(event[0] for event in lanes["update"]) > steps["step 1"][0]
    commits = sorted(event[1] for event in lanes["commit"])
    assert commits[0] > min(event[1] for event in lanes["update"])
    assert commits[-1] > steps["step 2"][0]


def test_an_interrupted_run_leaves_a_trace_that_is_whole(source, tmp_path, monkeypatch):
    block_backward = Step._block_backward

    def interrupted(step, block, index, *arguments):
        if step._number == 2:
            raise KeyboardInterrupt
        return block_backward(step, block, index, *arguments)

    monkeypatch.setattr(Step, "_block_backward", interrupted)
    with pytest.raises(InterruptedRunError):
        traced(source, tmp_path)
    lanes = lanes_of(tmp_path / "trace.json")
    assert of_lanes(lanes, "commit") == {("commit", None): 1}
    assert ("step 1", None) in of_lanes(lanes, "compute")
    assert {name: overlaps(events) for name, events in lanes.items() if overlaps(events)} == {}


def test_a_trace_can_be_read_while_it_is_written(tmp_path):
    """A killed run leaves the array without its end, and viewers take that."""
    trace = Trace(tmp_path / "trace.json")
    for step in range(3):
        trace.add("compute", f"step {step}", step, step + 1)
        trace.flush()
        text = (tmp_path / "trace.json").read_text("utf-8")
        assert len(lanes_in(json.loads(text + "]"))["compute"]) == step + 1
    trace.extend([("read 0", "read weights", 7, 1, 2)], dropped=5)
    trace.close()
    events = json.loads((tmp_path / "trace.json").read_text("utf-8"))
    assert lanes_in(events)["read 0"][0][2:] == ("read weights", 7)
    assert [event["name"][:6] for event in events if event["ph"] == "i"] == ["5 more"]


def test_without_a_trace_nothing_is_recorded(source, tmp_path, monkeypatch):
    taken = []
    close = PagedStore.close
    monkeypatch.setattr(PagedStore, "close", lambda state: (taken.append(state.take_events()), close(state)))
    monkeypatch.setattr(Trace, "add", lambda *_: pytest.fail("an event"))
    start(configured(source, tmp_path / "run", max_steps=1))
    assert taken == [([], 0)]


@pytest.mark.parametrize(
    ("name", "sentence"), [("here", "exists: choose"), ("none/trace.json", "there is no folder")]
)
def test_a_place_for_which_there_is_no_new_file_is_refused_before_anything_is_done(
    source, tmp_path, name, sentence
):
    (tmp_path / "here").write_text("mine", encoding="utf-8")
    arguments = [f"model={source / 'model'}", f"output_dir={tmp_path / 'run'}"]
    arguments += [f"data.train={source / 'train.jsonl'}", "--trace", str(tmp_path / name)]
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == ConfigError.exit_code
    assert sentence in result.stderr
    assert (tmp_path / "here").read_text("utf-8") == "mine"
    assert not (tmp_path / "run").exists()


def test_a_refused_run_leaves_no_trace(tmp_path):
    with pytest.raises(ConfigError), Trace(tmp_path / "trace.json"):
        raise ConfigError
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_one(source, tmp_path):
    arguments = [f"model={source / 'model'}", f"output_dir={tmp_path / 'run'}", "max_steps=1"]
    arguments += [f"data.train={source / 'train.jsonl'}", "memory.io_backend=threads"]
    result = CliRunner().invoke(app, ["train", *arguments, "--trace", str(tmp_path / "trace.json")])
    assert result.exit_code == 0, result.stderr
    assert of_lanes(lanes_of(tmp_path / "trace.json"), "commit") == {("commit", None): 1}


def test_a_model_without_a_trace_has_spans_that_do_nothing():
    model = PagedModel.__new__(PagedModel)
    model._trace = None
    with model.span("step 1") as nothing:
        assert nothing is None
