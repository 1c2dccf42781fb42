"""Which precision a run has where ``train.precision`` is auto: its own, else bf16, else what the GPU can."""

from pathlib import Path

import pytest

from megatrain_io.config.parse import load
from megatrain_io.config.schema import DataConfig, RunConfig, TrainConfig
from megatrain_io.errors import ConfigError, MegatrainIoError
from megatrain_io.planning.resolve import precision_of, resolve_precision
from megatrain_io.runs.folder import RunFolder


def config(precision):
    data = DataConfig(train=["data.jsonl"])
    return RunConfig(model=".", output_dir=".", data=data, train=TrainConfig(precision=precision))


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def test_auto_is_the_default_and_bf16_where_nothing_speaks_against_it(run):
    assert TrainConfig().precision == "auto"
    resolved, notes = resolve_precision(config("auto"), run, without_bf16=None)
    assert (precision_of(resolved), notes) == ("bf16", [])


def test_auto_is_fp32_on_a_gpu_without_bf16_and_that_is_said_with_its_price(run):
    resolved, notes = resolve_precision(config("auto"), run, without_bf16="Tesla T4")
    assert precision_of(resolved) == "fp32"
    (note,) = notes
    for words in ("Tesla T4 does not compute in bf16", "16 bytes are read and 12 written", "slower"):
        assert words in note


@pytest.mark.parametrize("imported", ["bf16", "fp32"])
def test_auto_is_the_precision_of_an_imported_run(run, imported):
    run.write(imported, [run.own_store], "uuid", Path())
    resolved, notes = resolve_precision(config("auto"), run, without_bf16=None)
    assert (precision_of(resolved), notes) == (imported, [])


def test_a_run_of_another_model_says_nothing(run):
    run.write("fp32", [run.own_store], "uuid", Path("other"))
    assert precision_of(resolve_precision(config("auto"), run, without_bf16=None)[0]) == "bf16"
    named = config("auto").model_copy(update={"model": Path("other/config.json")})
    assert precision_of(resolve_precision(named, run, without_bf16=None)[0]) == "fp32"


def test_an_imported_run_keeps_its_precision_on_a_gpu_without_bf16(run):
    run.write("fp32", [run.own_store], "uuid", Path())
    resolved, notes = resolve_precision(config("auto"), run, without_bf16="GPU")
    assert (precision_of(resolved), notes) == ("fp32", [])
    run.write("bf16", [run.own_store], "uuid", Path())
    with pytest.raises(ConfigError, match=r"GPU does not compute in bf16: .* choose a new output_dir"):
        resolve_precision(config("auto"), run, without_bf16="GPU")


def test_what_was_asked_for_is_kept_or_refused(run):
    for precision in ("bf16", "fp32"):
        assert resolve_precision(config(precision), run, without_bf16=None) == (config(precision), [])
    assert resolve_precision(config("fp32"), run, without_bf16="GPU") == (config("fp32"), [])
    with pytest.raises(ConfigError, match=r"GPU does not compute in bf16: set train\.precision=fp32"):
        resolve_precision(config("bf16"), run, without_bf16="GPU")


def test_only_a_resolved_precision_is_used(tmp_path):
    with pytest.raises(MegatrainIoError, match=r"train\.precision is auto"):
        precision_of(config("auto"))
    for precision in ("auto", "bf16", "fp32"):
        path = tmp_path / f"{precision}.yaml"
        path.write_text(config(precision).to_yaml())
        assert load(path) == (config(precision), [])
