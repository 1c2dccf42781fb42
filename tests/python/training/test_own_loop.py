"""A loop of one's own over PagedModel: the bits of training in memory, transactions, and what is refused."""

import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

import megatrain_io as mt
from megatrain_io.data.batch import micro_batch_of
from megatrain_io.errors import (
    ConfigError,
    DataError,
    DoesNotFitError,
    FormatError,
    MegatrainIoError,
    UnsupportedError,
    UnsupportedModelError,
)
from megatrain_io.models import probe_module
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.training import own_loop
from megatrain_io.training.own_settings import device_of
from paged import DEVICE, Case, differing, expected_planes, files, in_memory, make_store, new_device
from reference.reference import Hyperparameters, micro_batches, train

FP32, BF16 = torch.float32, torch.bfloat16
EXAMPLE = Path(__file__).parents[1] / "examples" / "own_loop.py"


def load_example():
    spec = importlib.util.spec_from_file_location("own_loop_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()
Decoder, VOCABULARY = example.Decoder, example.VOCABULARY
STEPS = micro_batches(VOCABULARY, (1, 3, 2, 1), seed=5)
HOW = Hyperparameters(lr=[1e-3, 2e-3, 5e-4, 1e-3])
LARGEST = [torch.zeros((1, 48), dtype=torch.int64)] * 3


class Stock(Decoder):
    """The same decoder with the interface of a transformers model, for the reference."""

    def forward(self, input_ids, labels, num_items_in_batch, **_unused):
        logits = super().forward(input_ids)
        return SimpleNamespace(
            loss=ForCausalLMLoss(logits, labels, VOCABULARY, num_items_in_batch=num_items_in_batch)
        )

    def get_output_embeddings(self):
        return self.head

    def get_input_embeddings(self):
        return self.tokens


def made(kind=Decoder, *, tied=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        module = kind()
    if tied:
        module.head.weight = module.tokens.weight
    return module


def reference(dtype=FP32, *, tied=False, max_grad_norm=None, clip_coefficients=None):
    return train(
        made(Stock, tied=tied),
        STEPS,
        HOW,
        dtype,
        max_grad_norm=max_grad_norm,
        clip_coefficients=clip_coefficients,
    )


def options(**more):
    """How tests train, where they do not say."""
    return {
        "ram": "256MiB",
        "device": new_device(),
        "weight_decay": HOW.weight_decay,
        "betas": (HOW.beta1, HOW.beta2),
        "eps": HOW.eps,
        "largest_step": LARGEST,
    } | more


@contextmanager
def created(path, model=None, **more):
    model = made() if model is None else model
    if not isinstance(model, str | Path | mt.PagedModel) and "blocks" not in more:
        more["blocks"] = "layers"
    with mt.PagedModel.create(model, files(path), **options(**more)) as paged:
        yield paged


def go_on(model, steps=STEPS, how=HOW, until=None):
    """Train from where the model stands; the losses of all steps, which are its state."""
    until = len(steps) if until is None else until
    while model.step_number < until:
        number = model.step_number
        losses = json.loads(model.state or b"[]")[:number]
        with model.step(learning_rate=how.lr[number]) as step:
            losses.append(step.forward(steps[number]).hex())
            step.backward()
            step.state = json.dumps(losses).encode()
    return [float.fromhex(loss) for loss in json.loads(model.state)]


def planes_of(model):
    planes = ("weight", "master", "exp_avg", "exp_avg_sq")
    return {(name, plane): model.read(name, plane) for name, _ in model.weights() for plane in planes}


def check(model, expected, **how):
    assert go_on(model, **how) == expected.losses
    assert differing(planes_of(model), expected_planes(expected)) == []


# --------------------------------------------------------------------------------------------- the bits


def test_the_example_says_that_all_bits_are_equal(capsys):
    example.main()
    assert "losses equal to the bit: True - weights equal to the bit: True" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_module_of_ones_own_has_the_bits_of_the_reference(tmp_path, dtype, tied):
    precision = "fp32" if dtype == FP32 else "bf16"
    with created(tmp_path / "store", made(tied=tied), precision=precision) as model:
        assert not any("not proved" in note for note in model.notes)
        check(model, reference(dtype, tied=tied))


@pytest.mark.parametrize("source", ["instance", "folder"])
def test_a_transformers_model_has_the_bits_of_the_reference(tmp_path, source):
    case = Case("llama", dtype=BF16, counts=(1, 3))
    given = case.model
    if source == "folder":
        given.save_pretrained(tmp_path / "model")
        given = tmp_path / "model"
    with created(tmp_path / "store", given, blocks=None) as model:
        check(model, in_memory(case), steps=case.steps, how=case.hyperparameters)
        if source == "instance":
            with pytest.raises(ConfigError, match="made from a module"):
                model.save(tmp_path / "trained")
            return
        model.save(tmp_path / "trained")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert saved.dtype == BF16
    assert differing(dict(saved.named_parameters()), in_memory(case).weight) == []


def test_clipped_steps_have_the_bits_of_the_reference(tmp_path):
    with created(tmp_path / "store", precision="fp32", max_grad_norm=0.5) as model:
        coefficients = []
        for number, batches in enumerate(STEPS):
            with model.step(learning_rate=HOW.lr[number]) as step:
                step.forward(batches)
                step.backward()
            coefficients.append(step.clip_coefficient)
            assert step.grad_norm > 0
        assert min(coefficients) < 1
        expected = reference(clip_coefficients=coefficients)
        assert differing(planes_of(model), expected_planes(expected)) == []
        # The norm is summed in another order than torch's.
        assert step.grad_norm == pytest.approx(expected.grad_norms[-1], rel=1e-5)


# ------------------------------------------------------------------------------------- transactions


def test_a_model_that_was_closed_goes_on_with_the_same_bits(tmp_path):
    path, expected = files(tmp_path / "store"), reference(BF16)
    with created(tmp_path / "store") as model:
        assert (model.step_number, model.state) == (0, b"")
        go_on(model, until=2)
    with mt.PagedModel.open(made(), path, blocks="layers", **options(weight_decay=0.5)) as model:
        assert model.step_number == 2
        assert [note for note in model.notes if note.startswith("weight_decay was 0.1 and is 0.5")]
    # A module without memory will do: its weights are not looked at.
    with mt.PagedModel.open(lambda: made().to("meta"), path, blocks="layers", **options()) as model:
        assert not [note for note in model.notes if "was" in note]
        check(model, expected)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("moment", ["before", "inside", "forward", "backward"])
def test_an_error_in_a_step_drops_it_and_the_loop_goes_on(tmp_path, whole_runs, moment, max_grad_norm):
    losses, planes = whole_runs[max_grad_norm]
    with created(tmp_path / "store", max_grad_norm=max_grad_norm) as model:
        go_on(model, until=2)
        with pytest.raises(ZeroDivisionError):
            fail(model, moment)
        # Also where this step began to apply the gradients of the one before, which were clipped.
        assert model.step_number == 2
        assert len(json.loads(model.state)) == model.step_number
        assert go_on(model) == losses
        assert differing(planes_of(model), planes) == []


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Losses and planes of runs that nothing interrupts, by ``max_grad_norm``."""
    runs = {}
    for limit in (None, 0.5):
        with created(tmp_path_factory.mktemp("whole") / "store", max_grad_norm=limit) as model:
            runs[limit] = go_on(model), planes_of(model)
    return runs


def fail(model, moment):
    partition = model._source.partition
    with pytest.MonkeyPatch.context() as patch, model.step(learning_rate=1.0) as step:
        if moment == "inside":
            run = partition.run_block
            patch.setattr(
                partition, "run_block", lambda index, *args: run(index, *args) if index < 2 else 1 / 0
            )
        if moment != "before":
            step.forward(STEPS[2])
        if moment == "backward":
            step.backward()
        step.state = b"lost"
        raise ZeroDivisionError


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_own_loop as test

with test.created(Path(sys.argv[1])) as model:
    test.go_on(model, until=2)
    with model.step(learning_rate=1.0) as step:
        step.forward(test.STEPS[2])
        step.backward()
        step.state = b"lost"
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_kill_in_a_step_loses_that_step_and_the_loop_goes_on(tmp_path, whole_runs):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    losses, planes = whole_runs[None]
    with mt.PagedModel.open(made(), files(tmp_path / "store"), blocks="layers", **options()) as model:
        # No update of the third step was written before the second one was durable.
        assert model.step_number == len(json.loads(model.state)) == 2
        assert go_on(model) == losses
        assert differing(planes_of(model), planes) == []


def test_after_an_error_the_model_stands_where_its_file_does(tmp_path, monkeypatch):
    with created(tmp_path / "store") as model:
        go_on(model, until=1)
        model.wait_durable()
        older = model._store.blob
        go_on(model, until=2)
        monkeypatch.setattr(own_loop.PagedStore, "blob", older)  # as if the second had not been written
        with pytest.raises(ZeroDivisionError):
            fail(model, "before")
        assert model.step_number == len(json.loads(model.state)) == 1


def test_a_step_that_is_left_halfway_is_dropped_and_says_so(tmp_path):
    with created(tmp_path / "store") as model:
        with pytest.raises(MegatrainIoError, match="left without forward"), model.step(1e-3):
            pass
        with pytest.raises(MegatrainIoError, match="left without backward"), model.step(1e-3) as step:
            step.forward(STEPS[0])
        assert model.step_number == 0


def test_calls_in_the_wrong_order_are_refused(tmp_path):
    with created(tmp_path / "store") as model, model.step(1e-3) as step:
        with pytest.raises(MegatrainIoError, match="after forward"):
            step.backward()
        step.forward(STEPS[0])
        with pytest.raises(MegatrainIoError, match="all micro-batches of the step at once"):
            step.forward(STEPS[0])
        for name in ("wait_durable", "close"):
            with pytest.raises(MegatrainIoError, match=f"{name} was called while a step is under way"):
                getattr(model, name)()
        with pytest.raises(MegatrainIoError, match="while a step is under way"):
            model.evaluate(STEPS[0])
        with pytest.raises(MegatrainIoError, match="while a step is under way"), model.step(1e-3):
            pass
        step.backward()


def test_the_callers_bytes_stay_until_they_are_set_again(tmp_path):
    with created(tmp_path / "store") as model:
        for state in (b"one\ntwo\x00", None):
            with model.step(1e-3) as step:
                if state is not None:
                    step.state = state
                with pytest.raises(ConfigError, match="245,760 are kept"):
                    step.state = bytes(1 << 20)
                with pytest.raises(ConfigError, match="must be bytes"):
                    step.state = "text"
                step.forward(STEPS[0])
                step.backward()
    with mt.PagedModel.open(made(), files(tmp_path / "store"), blocks="layers", **options()) as model:
        assert (model.step_number, model.state) == (2, b"one\ntwo\x00")


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(DEVICE != "cpu", reason="the memory of a device is divided once")
def test_ram_is_divided_anew_for_larger_steps_and_stays_within_the_budget(tmp_path):
    ram = 2 << 20
    with created(tmp_path / "store", ram=ram, largest_step=None) as model:
        sizes = [model._size]
        for batches in STEPS:
            with model.step(1e-3) as step:
                step.forward(batches)
                step.backward()
            sizes.append(model._size)
        assert sizes[0] is None
        assert len(set(sizes)) > 2
        assert 0 < model.ledger.total()[1] <= ram
        assert differing(planes_of(model), planes_in_one_go(tmp_path)) == []


@pytest.mark.skipif(DEVICE != "cpu", reason="needs other RAM on a device")
def test_gradients_that_do_not_fit_in_ram_wait_on_the_drive_and_no_bit_changes(tmp_path):
    with created(tmp_path / "whole", max_grad_norm=0.5) as model:
        losses, planes, records = go_on(model), planes_of(model), len(model._store.layout.records)
        assert len(model._store.residents.gradients) == records
    with pytest.raises(DoesNotFitError) as refused:
        created(tmp_path / "store", ram="100KiB", max_grad_norm=0.5).__enter__()
    least = re.search(r"needs ([\d.]+) MiB at least", str(refused.value))[1]
    with created(tmp_path / "store", ram=f"{least}MiB", max_grad_norm=0.5) as model:
        assert go_on(model) == losses
        assert len(model._store.residents.gradients) < records
        assert differing(planes_of(model), planes) == []
        assert model.ledger.total()[1] <= float(least) * 2**20


def planes_in_one_go(tmp_path):
    with created(tmp_path / "other") as model:
        for batches in STEPS:
            with model.step(1e-3) as step:
                step.forward(batches)
                step.backward()
        return planes_of(model)


def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        DoesNotFitError, match=r"ram is 0\.1 MiB, and a step of 3 micro-batches with 1 rows of 48"
    ):
        created(tmp_path / "store", ram="100KiB").__enter__()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ what goes in and out


def test_losses_are_measured_in_groups_as_in_memory(tmp_path):
    stock, batches = made(Stock), [batch for step in STEPS for batch in step]
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    with torch.no_grad():
        losses = [stock(**batch, num_items_in_batch=1).loss.item() for batch in batches]
    with created(tmp_path / "store", precision="fp32") as model:
        with pytest.raises(ConfigError, match=r"it must be torch\.float32 or None"):
            next(model.weights(BF16))
        assert model.evaluate(batches[:1]) == pytest.approx(losses[0] / tokens[0], rel=1e-6)
        assert len([*model._groups([micro_batch_of(batch) for batch in batches])]) > 1
        assert model.evaluate(batches) == pytest.approx(sum(losses) / sum(tokens), rel=1e-6)
        assert model.step_number == 0


def test_tokens_alone_train_all_of_them_and_padding_is_not_trained():
    ids = torch.arange(10).view(2, 5)
    batch = micro_batch_of(ids)
    assert batch.shift_labels.tolist() == [[1, 2, 3, 4, -100], [6, 7, 8, 9, -100]]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = micro_batch_of({"input_ids": ids, "attention_mask": mask})
    assert padded.shift_labels.tolist() == [[1, 2, -100, -100, -100], [6, 7, 8, 9, -100]]
    assert micro_batch_of(padded) is padded


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({"labels": torch.zeros(1, 4)}, "must have input_ids"),
        ({"input_ids": torch.zeros((1, 4), dtype=torch.int64), "token_type_ids": None}, "token_type_ids"),
        (torch.zeros(1, 4), r"input_ids of a micro-batch is torch.float32 \[1, 4\]"),
        (torch.zeros(4, dtype=torch.int64), r"int64 \[B, T\]"),
        (
            mt.MicroBatch(torch.zeros((1, 4), dtype=torch.int64), torch.zeros((1, 3))),
            "shift_labels of a micro-batch",
        ),
        (torch.full((1, 4), VOCABULARY), f"a label is {VOCABULARY}, and the model has {VOCABULARY} scores"),
        (torch.full((1, 4), -1), "a token is -1"),
        (
            mt.MicroBatch(torch.zeros((1, 4), dtype=torch.int64), torch.full((1, 4), -100)),
            "no token has a label",
        ),
    ],
)
def test_micro_batches_that_cannot_be_used_are_refused(opened_once, batch, reason):
    with pytest.raises(DataError, match=reason), opened_once.step(1e-3) as step:
        step.forward([batch])
    assert opened_once.step_number == 0


def test_what_is_no_list_of_micro_batches_is_refused(opened_once):
    with pytest.raises(DataError, match="micro-batches are None: give a list"):
        opened_once.evaluate(None)


@pytest.fixture(scope="module")
def opened_once(tmp_path_factory):
    with created(tmp_path_factory.mktemp("once") / "store") as model:
        yield model


def test_weights_are_read_in_either_dtype(opened_once):
    module = dict(made().named_parameters())
    assert list(module) == [name for name, _ in opened_once.weights()]
    for dtype in (None, BF16, FP32):
        for name, tensor in opened_once.weights(dtype):
            assert tensor.dtype == (dtype or BF16)
            # To nearest, but ties, which are rare.
            torch.testing.assert_close(tensor.float(), module[name].detach(), rtol=2**-8, atol=0)
            assert dtype != FP32 or torch.equal(tensor, module[name])
    with pytest.raises(ConfigError, match=r"dtype is torch\.float16"):
        next(opened_once.weights(torch.float16))
    with pytest.raises(ConfigError, match="no parameter 'head'"):
        opened_once.read("head")
    with pytest.raises(ConfigError, match="plane is 'momentum'"):
        opened_once.read("head.weight", "momentum")


def test_a_module_that_fits_nowhere_is_made_by_a_function_and_its_weights_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_module, "SMALL_PARAMETERS_MAX", 100)
    monkeypatch.setattr("megatrain_io.training.model_source.SMALL_PARAMETERS_MAX", 100)
    values, asked = dict(made().named_parameters()), []

    def weights(name, shape):
        asked.append(name)
        assert values[name].shape == shape
        return values[name]

    with created(tmp_path / "store", Decoder, weights=weights) as model:
        assert [note for note in model.notes if "was not proved" in note and "Give small=" in note]
        assert asked == list(values)
        check(model, reference(BF16))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = example.Block()

    def forward(self, hidden, mask, *, scale):
        return self.inner(hidden) * scale + mask, None


class Elaborate(nn.Module):
    """All that is allowed: a list that lies deeper, tuples, arguments by name, scores in an object, a buffer."""

    def __init__(self):
        super().__init__()
        self.body = Decoder()
        self.body.layers = nn.ModuleList(Scaled() for _ in range(3))
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, tokens, position_ids=None, **more):
        body, positions = self.body, torch.arange(tokens.shape[1]) if position_ids is None else position_ids
        hidden = self.dropout(body.tokens(tokens) + body.positions(positions.to(tokens.device)))
        mask = more.get("attention_mask", torch.zeros_like(tokens))[..., None].to(hidden.dtype)
        for layer in body.layers:
            hidden, _ = layer(hidden, mask, scale=self.scale.to(hidden.dtype))
        return SimpleNamespace(logits=body.head(body.norm(hidden)))


@contextmanager
def elaborate(path, **more):
    ids = STEPS[0][0]["input_ids"]
    optional = {"position_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
    batches = [{"input_ids": ids}, {"input_ids": ids, **optional}]
    with created(path, Elaborate(), blocks="body.layers", largest_step=batches, **more) as model:
        yield model, batches


def test_blocks_may_take_and_return_more_than_the_hidden_state(tmp_path):
    """That they are equal then was proved when the file was made."""
    with elaborate(tmp_path / "store") as (model, batches):
        assert not any("not proved" in note for note in model.notes)
        assert model.evaluate(batches[:1]) != model.evaluate(batches[1:])
    with (
        created(tmp_path / "other") as model,
        pytest.raises(ConfigError, match="Decoder: the micro-batch has position_ids, and forward takes no"),
    ):
        model.evaluate(batches[1:])


def test_dropout_follows_from_the_seed_alone(tmp_path):
    losses = {}
    for name, seed in (("one", 0), ("other", 1), ("again", 0)):
        torch.manual_seed(3)  # of the weights
        with elaborate(tmp_path / name, seed=seed) as (model, batches):
            losses[name] = go_on(model, [batches] * 2, until=1 if name == "again" else 2)
    with mt.PagedModel.open(
        Elaborate(), files(tmp_path / "again"), blocks="body.layers", **options(largest_step=batches)
    ) as model:
        assert go_on(model, [batches] * 2) == losses["one"]
    assert losses["other"] != losses["one"]


def test_the_weights_of_a_module_are_not_kept_in_ram(tmp_path):
    module = made()
    weight = weakref.ref(module.head.weight)
    with mt.PagedModel.create(module, files(tmp_path / "store"), blocks="layers", **options()) as model:
        del module
        gc.collect()
        assert weight() is None
        assert model.evaluate(STEPS[0]) > 0


def test_nothing_is_left_behind_when_a_file_cannot_be_opened(tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise DoesNotFitError("no room")

    monkeypatch.setattr(own_loop.PagedStore, "start", full)
    with pytest.raises(DoesNotFitError, match="no room"):
        created(tmp_path / "store").__enter__()
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------- refusals


class Shuffled(Decoder):
    def forward(self, input_ids):
        self.layers[0], self.layers[1] = self.layers[1], self.layers[0]
        return super().forward(input_ids)


class Skipping(Decoder):
    """Hands what enters the first block on to the head."""

    def forward(self, input_ids):
        hidden = first = self.tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden + first)) + self.positions(input_ids % 64)[..., :1]


class Between(Decoder):
    """Works between two blocks."""

    def forward(self, input_ids):
        hidden = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            hidden = layer(2 * hidden)
        return self.head(self.norm(hidden))


class Unused(Decoder):
    def __init__(self):
        super().__init__()
        self.forgotten = nn.Linear(3, 3)


class UnusedInside(Decoder):
    def __init__(self):
        super().__init__()
        self.layers[2].forgotten = nn.Linear(3, 3)


class Shared(Decoder):
    def __init__(self):
        super().__init__()
        self.layers[1].up.weight = self.layers[0].up.weight


class LastTokenOnly(Decoder):
    def forward(self, input_ids):
        return super().forward(input_ids)[:, -1]


class Texts(Decoder):
    def forward(self, input_ids):
        return {"text": super().forward(input_ids)}


class Mixing(Decoder):
    def forward(self, input_ids):
        return super().forward(input_ids).cumsum(dim=1)


class Counting(Decoder):
    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, input_ids):
        if self.training:
            self.passes += 1
        return super().forward(input_ids)


class OnMeta(Decoder):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(3, device="meta"))


class Whole(Decoder):
    def __init__(self):
        super().__init__()
        self.head.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)


class Frozen(Decoder):
    def __init__(self):
        super().__init__()
        self.tokens.weight.requires_grad_(False)


class Passing(Decoder):
    """Its blocks are called through another of their methods."""

    def forward(self, input_ids):
        hidden = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            hidden = layer.forward(hidden)
        return self.head(self.norm(hidden))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Shuffled, r"in the order \[1, 0, "),
        (Skipping, "what enters its first block is used behind the last one, too"),
        (Between, "changes the hidden state before block 1"),
        (Unused, r"parameter forgotten\.weight takes no part in the loss"),
        (UnusedInside, r"no gradient reaches parameter layers\.2\.forgotten\.weight"),
        (Shared, r"layers\.0\.up\.weight and layers\.1\.up\.weight are one parameter"),
        (LastTokenOnly, r"for tokens \[1, 2\] forward returned scores \[1, 101\]"),
        (Texts, "forward returned dict"),
        (Mixing, "scores of one token depend on others"),
        (Counting, "training changes buffer passes"),
        (OnMeta, "buffer table has no values"),
        (Whole, r"parameter head\.weight is torch\.int8"),
        (Frozen, r"1 of its parameters are not trained, the first is tokens\.weight"),
        (Passing, r"calls the blocks of layers in the order \[\]"),
    ],
)
def test_a_module_that_cannot_be_equal_is_refused_by_name(tmp_path, kind, reason):
    with pytest.raises(UnsupportedModelError, match=f"^{kind.__name__}: .*{reason}"):
        created(tmp_path / "store", kind()).__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"blocks": None}, r"blocks is missing.*'layers'"),
        ({"blocks": "blocks"}, r"no module list 'blocks' .* it has layers"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"precision": ["bf16"]}, r"precision is \['bf16'\]"),
        ({"ram": "much"}, "ram is 'much'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": torch.device("meta")}, "device is meta"),
        ({"device": 3}, "device is 3"),
        *(({"seed": seed}, "seed is .*a whole number from 0") for seed in ("a", None, -1, 1.5, 2**63, True)),
        ({"device": "cpu", "vram": "1GiB"}, "no GPU computes"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"betas": (0.9,)}, "betas is"),
        ({"betas": (0.9, None)}, "betas is"),
        ({"betas": "ab"}, "betas is 'ab'"),
        ({"betas": 0.9}, "betas is 0.9"),
        ({"eps": float("inf")}, "eps is inf"),
        ({"eps": "x"}, "eps is 'x'"),
        ({"max_grad_norm": "x"}, "max_grad_norm is 'x'"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"weight_decay": "x"}, "weight_decay is 'x'"),
        *(
            (
                {"weight_decay": lambda *_, given=given: given},
                r"weight_decay of tokens\.weight \[101, 48\], by the",
            )
            for given in (-1.0, float("nan"), None, "x")
        ),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"small": nn.Linear(2, 2)}, "small is a Linear, and the module a Decoder"),
        ({"model": lambda: 3}, "made a int"),
        ({"model": lambda: Decoder()}, "has no values"),  # noqa: PLW0108 - a function, not the class
        ({"weights": lambda *_: torch.zeros(3)}, r"weights gave torch\.float32 \[3\]"),
        ({"weights": lambda *_: None}, r"weights gave a NoneType for tokens\.weight"),
        ({"weights": {}}, "weights is a dict: it must be a function"),
        ({"model": 3, "blocks": None}, "model is a int"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, more, reason):
    with pytest.raises(ConfigError, match=reason):
        created(tmp_path / "store", **more).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_made_over_another_nor_opened_with_another_model(tmp_path):
    path, case = tmp_path / "store", Case(counts=(1,))
    with created(path), pytest.raises(ConfigError, match=r"exists: open it with PagedModel\.open"):
        created(path).__enter__()
    wider = made()
    wider.layers[3].up = nn.Linear(example.WIDTH, 7)
    wider.layers[3].down = nn.Linear(7, example.WIDTH)
    with pytest.raises(
        ConfigError, match=r"layers\.3\.up\.weight is \[7, 48\] in the model, \[192, 48\] in the file"
    ):
        mt.PagedModel.open(wider, files(path), blocks="layers", **options())
    make_store(tmp_path / "run", case)
    with pytest.raises(FormatError, match=r"not made by PagedModel\.create"):
        mt.PagedModel.open(case.model, files(tmp_path / "run"), **options())


@pytest.mark.parametrize(
    ("path", "reason"),
    [("nope", "nope does not exist: make it with PagedModel.create"), (".", "is a folder"), (3, "is 3")],
)
def test_a_path_without_a_file_is_refused(tmp_path, path, reason):
    path = tmp_path / path if isinstance(path, str) else path
    with pytest.raises(ConfigError, match=reason):
        mt.PagedModel.open(made(), path, blocks="layers", **options())


def test_a_file_is_made_only_in_a_folder_that_exists(tmp_path):
    with pytest.raises(ConfigError, match="nope does not exist: make that folder"):
        mt.PagedModel.create(made(), tmp_path / "nope" / "store", blocks="layers", **options())
    assert list(tmp_path.iterdir()) == []


def test_a_device_may_be_torchs_and_one_that_is_missing_is_called_by_the_argument(monkeypatch):
    with ExitStack() as closing:
        assert isinstance(device_of(torch.device("cpu"), "bf16", None, closing), Cpu)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for device, vram, reason in (
            ("cuda", None, "^device is 'cuda', and torch finds no"),
            (torch.device("cuda", 0), None, "^device is 'cuda', and torch finds no"),
            (None, "1GiB", "^vram is given, and torch finds no"),
        ):
            with pytest.raises(UnsupportedError, match=reason):
                device_of(device, "bf16", vram, closing)


def test_a_learning_rate_that_is_none_is_refused(opened_once):
    for rate in (-1.0, float("nan"), float("inf"), "x", None):
        with pytest.raises(ConfigError, match="learning_rate is"), opened_once.step(rate):
            pass
