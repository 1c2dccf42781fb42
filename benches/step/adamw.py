"""AdamW on the CPU, side by side: ours (f32, and split weights), torch's fused one, and DeepSpeedCPUAdam.

    python -m benches.step.adamw --rounds 5 --parameters 67108864

Each contender is a process of its own, started anew in each round, and they take turns; within a process the median of
some steps counts, after two that touch the memory. The figure is parameters a second: what a kernel moves in bytes
depends on how bytes are counted. Before anything is timed the bits of our step are compared with those of torch.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benches.harness.comparison import (
    SkippedError,
    answer,
    child,
    in_turn,
    machine,
    machine_text,
    shown,
    tell,
)

STEPS = 7
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
TORCH = "torch AdamW, fused"
Figure = dict[str, float]


def timed(step: Callable[[], object], parameters: int) -> Figure:
    """Median of some steps, after two that are not counted."""
    walls, cpus = [], []
    for number in range(STEPS + 2):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        if number >= 2:
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    return {
        "parameters_per_s": parameters / statistics.median(walls),
        "cpu_ns_per_parameter": statistics.median(cpus) / parameters * 1e9,
    }


def ours(parameters: int, name: str) -> Figure:
    """The kernel that training runs, over memory like its pool."""
    from megatrain_io.machine.measure import Workload

    return timed(Workload(name, parameters).run, parameters)


def parameter_of(parameters: int) -> Any:
    """One tensor with a gradient, from a fixed seed."""
    import torch

    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(parameters, generator=generator))
    parameter.grad = torch.randn(parameters, generator=generator)
    return parameter


def torch_fused(parameters: int) -> Figure:
    """What ours must equal."""
    import torch

    optimizer = torch.optim.AdamW([parameter_of(parameters)], fused=True, **SETTINGS)
    return timed(optimizer.step, parameters)


def deepspeed(parameters: int) -> Figure:
    """DeepSpeedCPUAdam in AdamW mode, f32."""
    kept = os.dup(1)
    os.dup2(2, 1)  # its build prints to standard output, which is for the figures
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam([parameter_of(parameters)], adamw_mode=True, **SETTINGS)
    except ImportError as error:
        raise SkippedError(f"deepspeed is not installed ({error})") from error
    except Exception as error:
        raise SkippedError(f"DeepSpeedCPUAdam cannot be built here: {str(error).splitlines()[-1]}") from error
    finally:
        os.dup2(kept, 1)
    return timed(optimizer.step, parameters)


def same_bits(parameters: int, steps: int = 3) -> bool:
    """Whether weights and moments of our f32 step are those of torch, bit for bit, over some steps."""
    import torch

    from megatrain_io.machine.measure import adamw_step

    parameter = parameter_of(parameters)
    optimizer = torch.optim.AdamW([parameter], fused=True, **SETTINGS)
    zeros = bytes(4 * parameters)
    planes = [parameter.detach().numpy().tobytes(), zeros, zeros]
    for step in range(1, steps + 1):
        gradient = parameter.grad.numpy().tobytes()
        adamw = (SETTINGS["lr"], *SETTINGS["betas"], SETTINGS["eps"], step)
        planes = adamw_step(planes[0], gradient, (planes[1], planes[2]), adamw, SETTINGS["weight_decay"])
        optimizer.step()
        state = optimizer.state[parameter]
        theirs = [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]
        if planes != [plane.numpy().tobytes() for plane in theirs]:
            return False
        parameter.grad = parameter.grad.roll(1)
    return True


CONTENDERS: dict[str, tuple[Callable[..., Figure], tuple[str, ...]]] = {
    # In place as the peers; and into other memory, as a chunk is updated that is paged.
    "megatrain-io f32": (ours, ("adamw f32 in place",)),
    "megatrain-io split": (ours, ("adamw split in place",)),
    "megatrain-io f32, paged": (ours, ("adamw f32",)),
    "megatrain-io split, paged": (ours, ("adamw split",)),
    TORCH: (torch_fused, ()),
    "DeepSpeedCPUAdam": (deepspeed, ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=64 << 20)
    parser.add_argument(
        "--only", default="", help="contenders whose names hold one of these words: io,torch,DeepSpeed"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has deepspeed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure of every round")
    options = parser.parse_args()
    words = [word.strip() for word in options.only.split(",") if word.strip()]
    names = [name for name in CONTENDERS if not words or any(word in name for word in words)]
    facts = machine(Path(), options.peer_python)
    # A tail that fills no vector, so that both paths of the kernel are compared.
    is_same = same_bits(1_000_003)
    results: dict[str, list[Figure]] = {name: [] for name in names}
    skipped: dict[str, str] = {}
    for number, name in in_turn(names, options.rounds):
        if name in skipped:
            continue
        tell(f"round {number + 1} of {options.rounds}: {name}")
        python = options.peer_python if name == "DeepSpeedCPUAdam" else sys.executable
        path = f"{Path(python).parent}:{os.environ.get('PATH', '')}"
        try:
            said = child(
                __spec__.name,
                python,
                [name, str(options.parameters)],
                {"DS_ACCELERATOR": "cpu", "PATH": path},
            )
            results[name].append(said)
        except SkippedError as reason:
            skipped[name] = str(reason)
            tell(f"{name} is skipped: {reason}")
    results = {name: rounds for name, rounds in results.items() if rounds}
    print(
        f"{machine_text(facts)}\n{options.parameters} parameters, {options.rounds} rounds; medians (least to most)"
    )
    print(
        f"bits of f32 weights and moments equal torch's fused AdamW after 3 steps: {'yes' if is_same else 'NO'}\n"
    )
    print(
        "| contender | M parameters/s | relative to torch in the same round | CPU ns a parameter |\n|---|---|---|---|"
    )
    for name, rounds in results.items():
        pace = [each["parameters_per_s"] for each in rounds]
        base = [each["parameters_per_s"] for each in results.get(TORCH, [])]
        ratio = shown([a / b for a, b in zip(pace, base, strict=True)]) if base else ""
        cpu = shown([each["cpu_ns_per_parameter"] for each in rounds])
        print(f"| {name} | {shown([each / 1e6 for each in pace], 0)} | {ratio} | {cpu} |")
    for name, reason in skipped.items():
        print(f"\n{name} was skipped: {reason}")
    if options.json is not None:
        plain = {"rounds": options.rounds, "parameters": options.parameters, "steps": STEPS}
        everything = {
            "machine": facts,
            "options": plain,
            "same_bits": is_same,
            "results": results,
            "skipped": skipped,
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if not is_same:
        sys.exit("the bits differ")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        contender, count = sys.argv[2:]
        answer(lambda: CONTENDERS[contender][0](int(count), *CONTENDERS[contender][1]))
    else:
        main()
