"""Which precision a run has where ``train.precision`` is auto: its own, else what computes fastest here."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain_io.config.parse import load
from megatrain_io.config.schema import DataConfig, RunConfig, TrainConfig
from megatrain_io.errors import ConfigError
from megatrain_io.machine.hardware import Gpu
from megatrain_io.machine.precision import fastest_of
from megatrain_io.planning.resolve import resolve_precision
from megatrain_io.runs.folder import RunFolder
from model_sources import FAMILIES, save

HERE = Path()
OLD_GPU = Gpu(name="Tesla T4", vram=1 << 34, has_bf16=False)


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def test_auto_is_the_default_and_what_computes_fastest_and_says_so(run):
    """On an AVX2 CPU bf16 was taken without a word, and its products took 80 times as long as those of fp32."""
    assert TrainConfig().precision == "auto"
    precision, (note,) = resolve_precision("auto", HERE, run, None, on_cpu=lambda: "bf16")
    assert (precision, note) == ("bf16", "train.precision is bf16, in which this processor computes fastest")
    precision, (note,) = resolve_precision("auto", HERE, run, None, on_cpu=lambda: "fp32")
    assert precision == "fp32"
    for words in ("this processor computes faster in it than in bf16", "16 bytes are read and 12 written"):
        assert words in note
    new_gpu = OLD_GPU.model_copy(update={"name": "RTX 4090", "has_bf16": True})
    assert resolve_precision("auto", HERE, run, new_gpu, on_cpu=lambda: "fp32") == (
        "bf16",
        ["train.precision is bf16, in which RTX 4090 computes fastest"],
    )


@pytest.mark.parametrize(
    ("features", "has_kernels", "is_x86", "expected"),
    [
        (["avx2", "avx512f", "avx512_bf16"], True, True, "bf16"),
        (["avx2", "avx512f", "avx512_bf16", "amx_bf16"], True, True, "bf16"),
        (["avx2", "fma"], False, True, "fp32"),
        (["avx2", "avx512f", "avx512_bf16"], False, True, "fp32"),  # the environment masks them
        (["avx2", "avx512f"], True, True, None),  # bf16 by conversions: timed
        (["asimd", "bf16"], False, False, None),
        ([], None, True, None),
    ],
)
def test_what_a_cpu_computes_fastest_in_is_read_off_its_flags_or_timed(
    features, has_kernels, is_x86, expected
):
    assert fastest_of(features, has_kernels=has_kernels, is_x86=is_x86) == expected


@pytest.mark.slow
def test_a_cpu_whose_bf16_is_masked_imports_in_fp32(tmp_path):
    """As an AVX2 laptop does: by the command line, with what torch and oneDNN are told to leave unused."""
    model, run = save(tmp_path / "model", FAMILIES["llama"]()), tmp_path / "run"
    masked = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-m", "megatrain_io", "import", str(model), str(run)]
    done = subprocess.run(command, env=masked, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert RunFolder(run).read().precision == "fp32" or platform.machine() not in {"x86_64", "AMD64"}


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
    assert resolve_precision("auto", HERE, run, None, on_cpu=lambda: "bf16")[0] == "bf16"
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
