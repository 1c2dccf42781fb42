"""A loop of one's own over PagedModel: the bits of training in memory, transactions, memory, what goes in and out."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import megatrain_io as mt
from megatrain_io.data.batch import micro_batch_of
from megatrain_io.errors import (
    ConfigError,
    DoesNotFitError,
    MegatrainIoError,
)
from megatrain_io.models import probe_module
from megatrain_io.training import own_loop
from own_loops import (
    BF16,
    FP32,
    HOW,
    STEPS,
    Decoder,
    Stock,
    check,
    created,
    example,
    go_on,
    made,
    options,
    planes_of,
    reference,
)
from paged import DEVICE, Case, differing, expected_planes, files, in_memory
from reference.reference import train as train_in_memory

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


class Partly(Decoder):
    """Has parameters that it does not train, and some that no gradient reaches, in a block and outside."""

    def __init__(self):
        super().__init__()
        self.layers[2].forgotten = nn.Linear(3, 3)
        self.forgotten = nn.Linear(3, 3)
        self.positions.weight.requires_grad_(False)
        self.layers[0].up.weight.requires_grad_(False)


class StockPartly(Stock, Partly):
    pass


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_what_a_module_does_not_train_stays_as_it_is(tmp_path, dtype):
    expected = train_in_memory(made(StockPartly), STEPS, HOW, dtype)
    with created(tmp_path / "store", made(Partly), precision="fp32" if dtype == FP32 else "bf16") as model:
        assert sum("stay as they are" in note for note in model.notes) == 2
        assert go_on(model) == expected.losses
        for name, weight in expected.weight.items():
            assert torch.equal(model.read(name), weight), name
            master = expected.master[name] if expected.updates.get(name) else weight.float()
            assert torch.equal(model.read(name, "master"), master), name
        assert dict(model.weights(FP32)).keys() == expected.weight.keys()
        moved = [name for name, count in expected.updates.items() if count]
        assert len(moved) == len(expected.weight) - 6
        assert all(torch.equal(model.read(name, "exp_avg"), expected.exp_avg[name]) for name in moved)
        with pytest.raises(ConfigError, match=r"positions\.weight is not trained: it has no exp_avg"):
            model.read("positions.weight", "exp_avg")


class Noting(example.Block):
    """Notes whether its weights require gradients, by which torch chooses kernels; no gradient reaches one of them."""

    seen: ClassVar[set[tuple[bool, ...]]] = set()

    def __init__(self):
        super().__init__()
        self.forgotten = nn.Linear(3, 3)

    def forward(self, hidden):
        weights = (self.up.weight, self.forgotten.weight)
        self.seen.add((torch.is_grad_enabled(), *(weight.requires_grad for weight in weights)))
        return super().forward(hidden)


def test_weights_require_gradients_in_the_forward_pass_as_they_do_in_memory(tmp_path):
    module = made()
    module.layers = nn.ModuleList([Noting() for _ in module.layers])
    with created(tmp_path / "store", module) as model:
        Noting.seen.clear()
        go_on(model, until=1)
    assert Noting.seen == {(False, True, True), (True, True, True)}


class Halving(nn.Module):
    """A block without parameters."""

    def forward(self, hidden):
        return hidden * 0.5


class WithoutParameters(Decoder):
    def __init__(self):
        super().__init__()
        self.layers.insert(2, Halving())
        self.layers.append(Halving())


class StockWithoutParameters(Stock, WithoutParameters):
    pass


def test_blocks_without_parameters_are_passed_as_any(tmp_path):
    expected = train_in_memory(made(StockWithoutParameters), STEPS, HOW, FP32)
    with created(tmp_path / "store", made(WithoutParameters), precision="fp32") as model:
        go_on(model, until=2)
    more = {name: value for name, value in options().items() if name != "largest_step"}
    with mt.PagedModel.open(
        made(WithoutParameters), files(tmp_path / "store"), blocks="layers", **more
    ) as model:
        check(model, expected)


class HandingBlock(example.Block):
    """Returns more than the hidden state, and takes what the block before it returned so."""

    def forward(self, hidden, before):
        output = super().forward(hidden if before is None else hidden + before)
        return output, output * hidden


class Handing(Decoder):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(HandingBlock() for _ in range(3))

    def forward(self, input_ids):
        hidden, before = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1])), None
        for layer in self.layers:
            hidden, before = layer(hidden, before)
        return self.head(self.norm(hidden))


class StockHanding(Stock, Handing):
    pass


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_what_a_block_returns_besides_reaches_the_next_one_and_its_gradient_comes_back(tmp_path, dtype):
    precision = "fp32" if dtype == FP32 else "bf16"
    with created(tmp_path / "store", made(Handing), precision=precision) as model:
        check(model, train_in_memory(made(StockHanding), STEPS, HOW, dtype))


class Keeping(example.Block):
    """Keeps what it computed last, in an attribute, a list and a dictionary, made at once and when it is called."""

    def __init__(self):
        super().__init__()
        self.last, self.all = None, []

    def forward(self, hidden):
        output = super().forward(hidden)
        self.last, self.by_name = output, {"output": output}
        self.all.append(output)
        return output


def test_blocks_that_keep_tensors_between_calls_have_the_bits_of_the_reference(tmp_path, monkeypatch):
    """They held the weights of a block where their memory is needed for the next one's."""
    expected = reference()
    monkeypatch.setattr(example, "Block", Keeping)
    with created(tmp_path / "store", made(), precision="fp32") as model:
        check(model, expected)


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


@pytest.mark.parametrize("source", ["folder", "module"])
def test_a_configuration_that_changed_is_named_when_the_file_is_opened(tmp_path, source):
    model = Case("llama", dtype=BF16).model
    model.config.id2label = dict.fromkeys(range(99), "x" * 50)

    def given():
        if source == "module":
            return model
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    how = {"ram": "64MiB", "device": "cpu"}
    with mt.PagedModel.create(given(), tmp_path / "store", precision="bf16", **how):
        pass
    with mt.PagedModel.open(given(), tmp_path / "store", **how) as opened:
        assert not [note for note in opened.notes if "of the configuration" in note]
    model.config.rms_norm_eps, model.config.use_cache, model.config.id2label = 1e-3, True, {0: "y"}
    with mt.PagedModel.open(given(), tmp_path / "store", **how) as opened:
        [said] = [note for note in opened.notes if "of the configuration" in note]
    assert said.startswith("rms_norm_eps of the configuration was 1e-06 and is 0.001: ")


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
import own_loops as test

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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
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
            master = module[name].detach()
            # To nearest, ties away from zero.
            nearest = ((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(BF16)
            assert torch.equal(tensor, master if dtype == FP32 else nearest)
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
    with mt.PagedModel.create(
        module, files(tmp_path / "store"), blocks="layers", **options(precision="bf16")
    ) as model:
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
