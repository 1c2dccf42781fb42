"""A decoder of one's own, trained by a loop of one's own, as in the example and by the reference."""

import importlib.util
import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

import megatrain_io as mt
from paged import differing, expected_planes, files, new_device
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
    more.setdefault("precision", "bf16")  # whatever computes fastest here
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
