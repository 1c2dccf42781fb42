"""Plans of 7B to 70B on machines that come with the package: python -m benches.plan.models.

Nothing is measured. The first figures are of formulas over the same assumptions as the plan's own beside them: no
commit, all RAM but activations for state that stays, full rates of the drive, reading and writing in turns, 8 P T
operations a step. The last column is what to expect: every step committed, the drive's sustained rate of writing, RAM
for buffers too.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from megatrain_io.data.batch import blank_micro_batch
from megatrain_io.machine.hardware import Hardware, load_hardware
from megatrain_io.models.partition import PartitionedModel, model_parts
from megatrain_io.models.probe import probe
from megatrain_io.planning.flops import work_of
from megatrain_io.planning.job import TrainingJob
from megatrain_io.planning.memory_needs import step_needs
from megatrain_io.planning.planner import make_plan
from megatrain_io.planning.residents import choose_residents
from megatrain_io.planning.simulator import Rates, simulate
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.pool import pool_sizes
from megatrain_io.store.schedule import build_schedule, traffic

LENGTH = 4096
MODELS = {
    "7B": LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=11008,
        num_attention_heads=32,
        vocab_size=32000,
    ),
    "8B": Qwen3Config(
        hidden_size=4096,
        num_hidden_layers=36,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    ),
    "14B": Qwen2Config(
        hidden_size=5120,
        num_hidden_layers=48,
        intermediate_size=13824,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
    ),
    "32B": Qwen2Config(
        hidden_size=5120,
        num_hidden_layers=64,
        intermediate_size=27648,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
    ),
    "70B": LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
TOKENS = {"laptop-8gb": [16384], "desktop-24gb": [16384, 65536], "workstation-32gb": [16384, 65536]}


@dataclass(frozen=True)
class Row:
    """Seconds and bytes of one model on one machine."""

    formula: tuple[float, float, float, float]
    planned: tuple[float, float, float]
    expected: Any


def formula(
    parameters: int, tokens: int, cache: float, machine: Hardware
) -> tuple[float, float, float, float]:
    """Bytes read and written, seconds of I/O in turns and of computing; the state has 12 bytes a parameter."""
    read = (
        14 * parameters
        - 2 * min(cache, 2 * parameters)
        - max(0.0, min(cache, 12 * parameters) - 2 * parameters)
    )
    written = 12 * parameters - min(cache, 12 * parameters)
    seconds = read / machine.read + written / burst(machine)
    return read, written, seconds, 8 * parameters * tokens / machine.flops_per_second


def burst(machine: Hardware) -> float:
    """Bytes a second written until the drive's cache is full."""
    return sum(drive.burst_write_gb_per_s for drive in machine.drives) * 1e9


def row(partition: PartitionedModel, layout: ModelLayout, machine: Hardware, tokens: int) -> Row:
    """The formula, the plan with the same assumptions, and the plan as it would be run."""
    batches = [blank_micro_batch(1, LENGTH, packed=False)] * (tokens // LENGTH)
    inputs = 2 * partition.config.hidden_size * tokens * layout.blocks
    cache = max(0.0, machine.ram - inputs)
    spilled = max(0.0, inputs - machine.ram)
    wanted = formula(layout.parameters, tokens, cache, machine)
    schedule = build_schedule(layout, tied_embeddings=False, training=True)
    residents = choose_residents(layout, schedule, int(cache))
    read, written = traffic(schedule, layout, residents, commits=False)
    work = work_of(partition, layout, [tuple(batch.input_ids.shape) for batch in batches], attention=False)
    pool = pool_sizes(
        layout, tied_embeddings=False, training=True, residents=residents, block_buffers=4, chunk_slots=16
    )
    compute = spread(work.seconds(machine.flops_per_second), wanted[3])
    blocks = range(round(layout.blocks * spilled / inputs))
    played = simulate(
        [(schedule, False)] * 3,
        layout,
        pool,
        compute,
        Rates(machine.read, burst(machine)),
        residents=residents,
        inputs={layout.block(block): inputs / layout.blocks for block in blocks},
    )
    job = TrainingJob(
        hardware=machine,
        precision="bf16",
        partition=partition,
        layout=layout,
        micro_batch=batches[0],
        accumulation=len(batches),
        max_length=LENGTH,
        ram=machine.ram,
        needs=step_needs(partition, layout, batches, 0),
        vram=None if machine.device is None else machine.device.vram,
    )
    expected = make_plan(job, variants=False)
    formula_seconds = max(wanted[2] + spilled / machine.read + spilled / burst(machine), wanted[3])
    return Row(
        (wanted[0] + spilled, wanted[1] + spilled, formula_seconds, wanted[3]),
        (read + spilled, written + spilled, played[-1].seconds),
        expected,
    )


def spread(compute: dict[Any, float], seconds: float) -> dict[Any, float]:
    """The same seconds in all as the formula, which knows no head and no embeddings."""
    total = sum(compute.values())
    return {stop: each * seconds / total for stop, each in compute.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    print(
        "| machine | model | tokens | GB read, formula / plan | GB written | s a step | tokens/s "
        "| as it would be run: s a step | tokens/s | fits |"
    )
    print("|---" * 10 + "|")
    for name in options.models.split(","):
        config = MODELS[name]
        partition = PartitionedModel(config, torch.bfloat16, probe(config))
        layout = ModelLayout.build(model_parts(partition), len(partition.blocks), "bf16")
        for machine_name, counts in TOKENS.items():
            machine = load_hardware(machine_name)
            for tokens in counts:
                found = row(partition, layout, machine, tokens)
                (read, written, seconds, _), planned, expected = found.formula, found.planned, found.expected
                run = "" if expected.time is None else f"{expected.time.seconds:.1f}"
                rate = "" if expected.time is None else f"{expected.tokens_per_second:.0f}"
                fits = "yes" if expected.fits else "; ".join(map(str, expected.problems))
                print(
                    f"| {machine_name} | {name} ({layout.parameters / 1e9:.2f} B) | {tokens:,} "
                    f"| {read / 1e9:.0f} / {planned[0] / 1e9:.0f} | {written / 1e9:.0f} / {planned[1] / 1e9:.0f} "
                    f"| {seconds:.1f} / {planned[2]:.1f} | {tokens / seconds:.0f} / {tokens / planned[2]:.0f} "
                    f"| {run} | {rate} | {fits} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
