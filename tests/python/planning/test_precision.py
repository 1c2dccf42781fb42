"""Which precision a run has where ``train.precision`` is auto: its own, else bf16, else what the GPU can."""

from pathlib import Path

import pytest

from megatrain_io.config.parse import load
from megatrain_io.config.schema import DataConfig, RunConfig, TrainConfig
from megatrain_io.errors import ConfigError
from megatrain_io.machine.hardware import Gpu
from megatrain_io.planning.resolve import resolve_precision
from megatrain_io.runs.folder import RunFolder

HERE = Path()
OLD_GPU = Gpu(name="Tesla T4", vram=1 << 34, has_bf16=False)


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def test_auto_is_the_default_and_bf16_where_nothing_speaks_against_it(run):
    assert TrainConfig().precision == "auto"
    assert resolve_precision("auto", HERE, run, None) == ("bf16", [])


def test_auto_is_fp32_on_a_gpu_without_bf16_and_that_is_said_with_its_price(run):
    precision, (note,) = resolve_precision("auto", HERE, run, OLD_GPU)
    assert precision == "fp32"
    for words in ("Tesla T4 does not compute in bf16", "16 bytes are read and 12 written", "slower"):
        assert words in note


@pytest.mark.parametrize("imported", ["bf16", "fp32"])
def test_auto_is_the_precision_of_an_imported_run(run, imported):
    run.write(imported, [run.own_store], "uuid", HERE)
    assert resolve_precision("auto", HERE, run, None) == (imported, [])


def test_a_run_of_another_model_says_nothing(run):
    run.write("fp32", [run.own_store], "uuid", Path("other"))
    assert resolve_precision("auto", HERE, run, None)[0] == "bf16"
    assert resolve_precision("auto", Path("other/config.json"), run, None)[0] == "fp32"


def test_an_imported_run_keeps_its_precision_on_a_gpu_without_bf16(run):
    run.write("fp32", [run.own_store], "uuid", HERE)
    assert resolve_precision("auto", HERE, run, OLD_GPU) == ("fp32", [])
    run.write("bf16", [run.own_store], "uuid", HERE)
    with pytest.raises(ConfigError, match=r"T4 does not compute in bf16: .* choose a new output_dir"):
        resolve_precision("auto", HERE, run, OLD_GPU)


def test_what_was_asked_for_is_kept_or_refused(run):
    for precision in ("bf16", "fp32"):
        assert resolve_precision(precision, HERE, run, None) == (precision, [])
    assert resolve_precision("fp32", HERE, run, OLD_GPU) == ("fp32", [])
    with pytest.raises(ConfigError, match=r"T4 does not compute in bf16: set train\.precision=fp32"):
        resolve_precision("bf16", HERE, run, OLD_GPU)


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_a_precision_is_written_and_read_back(tmp_path, precision):
    data = DataConfig(train=["data.jsonl"])
    config = RunConfig(model=".", output_dir=".", data=data, train=TrainConfig(precision=precision))
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert load(path) == (config, [])
