"""`verify --model`: on this machine, a small copy of an architecture trains paged to the bits of training in memory."""

import json
import tempfile
from dataclasses import replace

import pytest
import torch

from families import run
from megatrain_io.training import own_loop, verify_model
from megatrain_io.training.own_loop import PagedModel
from small_models import small_config


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(tmp_path, monkeypatch):
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert [*place.iterdir()] == []


def model_of(tmp_path, family):
    """A model folder with its configuration alone."""
    small_config(family).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own models
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama tied", "gpt2", "mixtral"])
def test_a_model_is_compared_by_its_configuration_alone(tmp_path, monkeypatch, family, precision):
    monkeypatch.setattr("megatrain_io.training.own_settings.fastest_on_cpu", lambda: precision)
    result = run("verify", "--model", model_of(tmp_path, family), "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["equal"], said["differing"], said["steps"]) == (True, [], 3)
    assert (said["model_type"], said["precision"], said["device"]) == (family.split()[0], precision, "cpu")
    assert said["tensors"] > 20
    assert len({*said["losses"]}) == 3


@pytest.mark.filterwarnings("ignore")
def test_the_result_is_one_sentence_and_its_state_is_paged(tmp_path, monkeypatch):
    starts = []
    start = own_loop.PagedStore.start
    monkeypatch.setattr(
        own_loop.PagedStore,
        "start",
        lambda *args, **how: starts.append(how["residents"]) or start(*args, **how),
    )
    result = run("verify", "--model", model_of(tmp_path, "qwen3") / "config.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    assert "qwen3: 3 paged steps of a copy of reduced width (" in result.stdout
    assert "have the bits of training in memory: losses, and weight, master and moments of " in result.stdout
    assert len(starts) == 1
    assert not starts[0].chunks, "state stays in RAM"


@pytest.mark.filterwarnings("ignore")
def test_one_bit_that_differs_is_named_and_ends_with_the_code_of_refusals(tmp_path, monkeypatch):
    read = PagedModel.read

    def flipping(paged, name, plane="weight"):
        tensor = read(paged, name, plane)
        if (name, plane) == ("model.norm.weight", "exp_avg_sq"):
            tensor.view(torch.int32)[3] ^= 1
        return tensor

    monkeypatch.setattr(PagedModel, "read", flipping)
    model = model_of(tmp_path, "llama")
    result = run("verify", "--model", model, "--json")
    assert result.exit_code == 5
    said = json.loads(result.stdout)
    assert (said["equal"], said["differing"]) == (False, ["the exp_avg_sq of model.norm.weight differs"])
    text = run("verify", "--model", model).stdout
    assert (
        "are not those in memory: the exp_avg_sq of model.norm.weight differs. Do not train it on this"
        in text
    )


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_update_is_seen(tmp_path, monkeypatch):
    adamw = own_loop.AdamWStep
    monkeypatch.setattr(
        own_loop,
        "AdamWStep",
        lambda step, rate, *others: adamw(step, rate * (1 + 0.01 * (step == 2)), *others),
    )
    said = json.loads(run("verify", "--model", model_of(tmp_path, "llama"), "--json").stdout)
    assert said["differing"][0].startswith("the loss of step 3 is ")
    assert any(phrase.startswith("the master of ") for phrase in said["differing"])


@pytest.mark.filterwarnings("ignore")
def test_what_plan_refuses_is_refused_with_its_words(tmp_path):
    model = model_of(tmp_path, "bert")
    result = run("verify", "--model", model, "--json")
    assert result.exit_code == 5
    planned = run("plan", model, "--json")
    assert json.loads(result.stdout)["error"] == json.loads(planned.stdout)["error"]
    assert "bert: it looks at later tokens" in result.output


@pytest.mark.filterwarnings("ignore")
def test_the_option_that_a_refusal_names_is_taken(tmp_path):
    model = model_of(tmp_path, "openai-gpt")
    assert "--block-list" in run("verify", "--model", model).output
    result = run("verify", "--model", model, "--block-list", "transformer.h")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give the run folder"),
        (["run", "--model", "m"], 2, "not both"),
        (["--model", "m", "--from-older-state"], 2, "not both"),
        (["run", "--block-list", "h"], 2, "are for --model"),
        (["--model", "nowhere"], 5, "nowhere"),
    ],
)
def test_what_is_wrong_with_the_command_is_said(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    result = run("verify", *arguments, "--json")
    assert result.exit_code == code, result.output
    assert message in json.loads(result.stdout)["error"]["message"]


def test_a_report_of_a_gpu_says_where_all_bits_must_be_equal():
    report = verify_model.ModelReport("llama", 10, 2, 3, "bf16", "NVIDIA H200", 1.0, (1.0,), ("a", "b", "c"))
    assert "are not those in memory: a, and 2 more. On a GPU some kernels add" in str(report)
    assert "have the bits" in str(replace(report, differing=()))
