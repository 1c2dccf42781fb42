"""What PagedModel refuses, by name and before anything is written."""

from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import nn

import megatrain_io as mt
from megatrain_io.errors import (
    ConfigError,
    DataError,
    FormatError,
    UnsupportedError,
    UnsupportedModelError,
)
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.training.own_settings import device_of
from own_loops import VOCABULARY, Decoder, created, example, made, options
from paged import Case, files, make_store


@pytest.fixture(scope="module")
def opened_once(tmp_path_factory):
    with created(tmp_path_factory.mktemp("once") / "store") as model:
        yield model


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


class Sometimes(Decoder):
    """Only some of its blocks use what all of them have."""

    def __init__(self):
        super().__init__()
        for index, layer in enumerate(self.layers):
            layer.scale = nn.Parameter(torch.ones(1))
            if index % 2:
                layer.register_forward_hook(lambda layer, _args, output: output * layer.scale)


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


class Passing(Decoder):
    """Its blocks are called through another of their methods."""

    def forward(self, input_ids):
        hidden = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            hidden = layer.forward(hidden)
        return self.head(self.norm(hidden))


HOARD = []


class HoardingBlock(example.Block):
    def forward(self, hidden):
        HOARD.append(super().forward(hidden))
        return HOARD[-1]


class Hoarding(Decoder):
    """Its blocks leave their output where nobody finds it."""

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.__class__ = HoardingBlock


class ReadingBlock(example.Block):
    def forward(self, hidden, left):
        left.append(super().forward(hidden))
        return left[-1] + left[0]


class Reading(Decoder):
    """Each block reads what the one before it left in a list."""

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.__class__ = ReadingBlock

    def forward(self, input_ids):
        hidden, left = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1])), []
        for layer in self.layers:
            hidden = layer(hidden, left)
        return self.head(self.norm(hidden))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Hoarding, r"block 0 keeps tensors that hold layers\.0\.\S+ behind its call"),
        (
            Reading,
            r"block 2 takes an input .* that carries gradient to block 0: .* blocks must hand nothing else on",
        ),
        (Shuffled, r"in the order \[1, 0, "),
        (Skipping, "what enters its first block is used behind the last one, too"),
        (Between, "changes the hidden state before block 1"),
        (Sometimes, r"no gradient reaches parameter layers\.\d\.scale, while one reaches layers\.\d\.scale"),
        (Shared, r"layers\.0\.up\.weight and layers\.1\.up\.weight are one parameter"),
        (LastTokenOnly, r"for tokens \[1, 2\] forward returned scores \[1, 101\]"),
        (Texts, "forward returned dict"),
        (Mixing, "scores of one token depend on others"),
        (Counting, "training changes buffer passes"),
        (OnMeta, "buffer table has no values"),
        (Whole, r"parameter head\.weight is torch\.int8"),
        (Passing, r"calls the blocks of layers in the order \[\]"),
    ],
)
def test_a_module_that_cannot_be_equal_is_refused_by_name(tmp_path, kind, reason):
    with pytest.raises(UnsupportedModelError, match=f"^{kind.__name__}: .*{reason}"):
        created(tmp_path / "store", kind()).__enter__()
    assert list(tmp_path.iterdir()) == []


class LateBlock(example.Block):
    """Uses a parameter in texts that are longer than those of the probe."""

    def __init__(self):
        super().__init__()
        self.late = nn.Parameter(torch.ones(1))

    def forward(self, hidden):
        hidden = super().forward(hidden)
        return hidden * self.late if hidden.shape[1] > 20 else hidden


class Late(Decoder):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(LateBlock() for _ in range(3))


class LateHead(Decoder):
    def __init__(self):
        super().__init__()
        self.late = nn.Parameter(torch.ones(1))

    def forward(self, input_ids):
        scores = super().forward(input_ids)
        return scores * self.late if scores.shape[1] > 20 else scores


@pytest.mark.parametrize(("kind", "name"), [(Late, r"layers\.\d\.late"), (LateHead, "late")])
def test_a_gradient_that_none_was_thought_to_be_ends_its_step_by_name(tmp_path, kind, name):
    short, long = torch.zeros((1, 9), dtype=torch.int64), torch.zeros((1, 30), dtype=torch.int64)
    with created(tmp_path / "store", made(kind), largest_step=[short]) as model:
        assert sum("no gradient reaches them" in note for note in model.notes) == 1
        for text, reason in ((short, None), (long, f"a gradient reaches parameter {name} in this step")):
            refused = pytest.raises(UnsupportedModelError, match=reason) if reason else nullcontext()
            with refused, model.step(1e-3) as step:
                step.forward([text])
                step.backward()
        assert model.step_number == 1
    with pytest.raises(UnsupportedModelError, match=f"a gradient reaches parameter {name}"):
        created(tmp_path / "other", made(kind), largest_step=[long]).__enter__()
    assert not (tmp_path / "other").exists()


def test_a_module_that_trains_other_parameters_than_its_file_is_refused_by_name(tmp_path):
    with created(tmp_path / "store"):
        pass
    other = made()
    other.layers[1].up.bias.requires_grad_(False)
    more = {name: value for name, value in options().items() if name != "largest_step"}
    reason = r"keeps layers\.1\.up\.bias as bf16, and the model has it as raw16 now .*requires_grad"
    with pytest.raises(ConfigError, match=reason):
        mt.PagedModel.open(other, files(tmp_path / "store"), blocks="layers", **more)


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
        assert isinstance(device_of(torch.device("cpu"), "bf16", None, closing)[0], Cpu)
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
