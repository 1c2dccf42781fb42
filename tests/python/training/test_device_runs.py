"""Whole runs on a device with memory of its own: in the VRAM and RAM that were planned, with the bits of the CPU."""

import re
from contextlib import nullcontext

import pytest
import torch
from test_generate import NEW, PROMPT, bring_in, make_source, paged, stock

from megatrain_io.config.parse import load
from megatrain_io.errors import ConfigError, DoesNotFitError, InterruptedRunError
from megatrain_io.generate import Generator
from megatrain_io.models.partition import model_parts
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.device.pool import CONTEXT_NBYTES
from megatrain_io.paging.device.simulated import SimulatedDevice
from megatrain_io.paging.trace import Trace
from megatrain_io.planning.compute_time import measured_seconds
from megatrain_io.runs.folder import RunFolder
from megatrain_io.store.layout import ModelLayout
from megatrain_io.training.callbacks import TraceCallback
from paged import DEVICE, Case, partitioned, to_micro_batch
from runs import ENGINE, Reporter, check_equals, configured, metrics_of, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE != "cpu", reason="compares with runs on the CPU"),
]

MIB = 1 << 20


def without_bf16():
    device = SimulatedDevice(3)
    device.has_bf16 = False
    return device


def vram_note(reporter):
    (note,) = (note for note in reporter.starts[0][2] if note.startswith("VRAM: "))
    return [int(number) for number in re.match(r"VRAM: (\d+) MiB of (\d+) MiB", note).groups()]


def test_a_run_keeps_within_the_vram_that_it_was_given(source, whole, tmp_path):
    roomy = SimulatedDevice(1)
    config = configured(source, tmp_path / "roomy", memory={"ram": "1500KiB"})
    _, reporter = start(config, device=roomy)
    check_equals(tmp_path / "roomy", whole)
    assert vram_note(reporter)[0] - CONTEXT_NBYTES // MIB < 20 + 64
    assert {account for account, nbytes in roomy.accounts.nbytes.items() if nbytes} == {
        "weights",
        "gradients",
        "activations",
    }
    too_small = SimulatedDevice(1, nbytes=CONTEXT_NBYTES)
    with pytest.raises(
        DoesNotFitError, match=r"at least, and simulated accelerator has 600.0 MiB"
    ) as refused:
        start(configured(source, tmp_path / "refused"), device=too_small)
    assert not too_small.accounts.nbytes
    least = int(re.search(r"a step needs (\d+) MiB of VRAM at least", str(refused.value))[1]) * MIB
    less = SimulatedDevice(1, nbytes=least - 2 * MIB)
    with pytest.raises(DoesNotFitError, match="VRAM"):
        start(configured(source, tmp_path / "refused"), device=less)
    assert not less.accounts.nbytes
    for commit_every in (1, 2):
        small = SimulatedDevice(1, nbytes=least)
        run = tmp_path / f"least, {commit_every}"
        memory = {"ram": "1500KiB", "commit_every": commit_every}
        # Waited for by an evaluation, a step is counted to its end.
        result, _ = start(configured(source, run, memory=memory, eval_steps=1), device=small)
        check_equals(run, whole)
        assert 0 < small.accounts.peak_nbytes <= least - CONTEXT_NBYTES
        assert result.plan["ledger_bytes"]["ratio"] == pytest.approx(1, abs=0.02)
        assert result.plan["read_bytes_per_step"]["ratio"] == 1


def test_a_run_goes_on_on_another_device(source, whole, stopped):
    _, reporter = start(configured(source, stopped), resume=True, device=SimulatedDevice(2))
    check_equals(stopped, whole)
    assert any(
        "device was cpu and is simulated accelerator" in note
        for _, _, notes in reporter.starts
        for note in notes
    )


def test_a_gpu_without_bf16_trains_in_fp32_and_the_run_goes_on_so(source, tmp_path):
    config = configured(source, tmp_path / "run", memory={"ram": "4MiB"}, precision="auto")
    asked = config.train.model_copy(update={"precision": "bf16"})
    with pytest.raises(ConfigError, match="simulated accelerator does not compute in bf16"):
        start(config.model_copy(update={"train": asked}), device=without_bf16())
    assert not config.output_dir.exists(), "nothing was imported"
    started = Reporter()
    with pytest.raises(InterruptedRunError, match="step 2 "):
        start(config, stop=2, device=without_bf16(), callbacks=[started])
    said = "train.precision is fp32, because simulated accelerator does not compute in bf16"
    assert sum(note.startswith(said) for note in started.starts[0][2]) == 1
    run = RunFolder(config.output_dir)
    assert run.read().precision == load(run.config)[0].train.precision == "fp32"
    for device in (SimulatedDevice(3), Cpu()):
        going_on = Reporter(stop=3)
        with pytest.raises(InterruptedRunError) if device.has_own_memory else nullcontext():
            start(config, resume=True, device=device, callbacks=[going_on])
        assert not any("does not compute in bf16" in note for note in going_on.starts[0][2])
    assert load(run.config)[0].train.precision == "fp32"


def test_a_run_in_bf16_is_refused_by_a_gpu_without_it(source, stopped):
    with pytest.raises(ConfigError, match=r"does not compute in bf16: .*an imported run keeps its precision"):
        start(configured(source, stopped), resume=True, device=without_bf16())


def test_computing_alone_can_be_timed_on_a_device():
    case = Case(dtype=torch.bfloat16, counts=(1,))
    partition, device = partitioned(case), SimulatedDevice(1)
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), "bf16")
    seconds = measured_seconds(partition, layout, to_micro_batch(case.steps[0][0]), device)
    assert len(seconds) == 2 * len(partition.blocks) + 3
    assert all(each > 0 for each in seconds.values())


def test_a_trace_has_the_device_in_it(source, tmp_path):
    path = tmp_path / "trace.json"
    with Trace(path) as trace:
        start(
            configured(source, tmp_path / "run"), device=SimulatedDevice(2), callbacks=[TraceCallback(trace)]
        )
    text = path.read_text()
    assert all(f'"{lane}"' in text for lane in ("copy in", "copy out", "device, block"))
    assert metrics_of(tmp_path / "run")


def test_generating_on_a_device_is_stock_generation(tmp_path):
    from corpus import make_tokenizer

    source = make_source(tmp_path / "source", tied=True)
    run = bring_in(source, tmp_path / "run", "bf16")
    prompt = make_tokenizer()(PROMPT, return_tensors="pt").input_ids
    expected = stock(source, prompt, torch.bfloat16)
    device = SimulatedDevice(3, nbytes=CONTEXT_NBYTES + 514 * MIB)
    with Generator.open(run.path, engine=ENGINE, device=device) as generator:
        assert paged(generator, prompt, NEW) == expected
    assert 0 < device.accounts.peak_nbytes <= 2 * MIB
    assert "gradients" not in device.accounts.nbytes


def test_without_room_for_a_block_the_cpu_generates(tmp_path):
    source = make_source(tmp_path / "source")
    run = bring_in(source, tmp_path / "run", "bf16")
    device = SimulatedDevice(3, nbytes=CONTEXT_NBYTES)
    with Generator.open(run.path, engine=ENGINE, device=device) as generator:
        assert generator.complete(PROMPT, max_new_tokens=2)
    assert not device.accounts.nbytes
