"""Whether training on a GPU has the losses of training in its memory: python -m benches.gpu.losses --device cuda.

The tests' tiny Llama trains a few steps of several micro-batches: paged, through the device, and in memory, by stock
transformers on the same device with the reference's sums, its rounding and torch's fused AdamW over fp32 masters on the
CPU. Both use deterministic algorithms. With ``--device simulated`` every bit must be equal, or the command fails; on a
GPU it says how far they are.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benches.harness.comparison import answer, child

Figures = dict[str, Any]
TESTS = Path(__file__).parents[2] / "tests"
MICRO_BATCHES = (3, 2, 4, 1, 3)
# Without it cuBLAS refuses to be deterministic.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def train_in_memory(case: Any, device: Any) -> Any:
    """As the reference trains, but with weights on ``device``, and masters and AdamW on the CPU."""
    import torch

    from reference.reference import Result, accumulate, is_matrix, round_half_away, untie

    asked, model = case.hyperparameters, case.model.to(device)
    # As stock loops on a GPU pass it: a number would be multiplied by as its inverse there, not divided by.
    model.register_forward_pre_hook(
        lambda _, args, named: (
            args,
            {**named, "num_items_in_batch": torch.tensor(named["num_items_in_batch"], device=device)},
        ),
        with_kwargs=True,
    )
    leaves = untie(model)
    masters = {
        name: torch.nn.Parameter(own[0].detach().float().cpu().clone()) for name, own in leaves.items()
    }
    is_bf16 = case.dtype == torch.bfloat16
    named = masters.items()
    adamw = torch.optim.AdamW(
        [
            {"params": [m for n, m in named if is_matrix(n, m)], "weight_decay": asked.weight_decay},
            {"params": [m for n, m in named if not is_matrix(n, m)], "weight_decay": 0.0},
        ],
        betas=(asked.beta1, asked.beta2),
        eps=asked.eps,
        fused=True,
    )

    def write_weights() -> None:
        for name, master in masters.items():
            for leaf in leaves[name]:
                leaf.data = (round_half_away(master) if is_bf16 else master.detach().clone()).to(device)

    write_weights()
    losses = []
    for step, rate in zip(case.steps, asked.lr, strict=True):
        moved = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in step]
        loss, gradients = accumulate(model, leaves, moved)
        losses.append(loss)
        for name, master in masters.items():
            master.grad = gradients[name].cpu()
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        write_weights()
    return Result(
        losses=losses,
        weight={name: own[0].detach().cpu() for name, own in leaves.items()},
        master={name: master.detach() for name, master in masters.items()},
        exp_avg={name: adamw.state[master]["exp_avg"] for name, master in masters.items()},
        exp_avg_sq={name: adamw.state[master]["exp_avg_sq"] for name, master in masters.items()},
    )


def train_paged(case: Any, device: Any, path: Path) -> tuple[list[float], dict[tuple[str, str], Any]]:
    """Losses, and all planes of the store afterwards."""
    import paged

    paged.make_store(path, case, drives=1)
    with paged.opened(path, case, drives=1, device=device) as model, device.pin(model.state.pool_memory()):
        return paged.train(model, case), paged.all_planes(model.state)


def new_device(name: str) -> Any:
    if name == "simulated":
        from megatrain_io.paging.device.simulated import SimulatedDevice

        return SimulatedDevice()
    from megatrain_io.paging.device.cuda import Cuda

    return Cuda()


def compare(job: Figures) -> list[Figures]:
    """In the child: all cases on one device."""
    sys.path[:0] = [str(TESTS), str(TESTS / "python" / "support")]
    import torch

    from paged import Case, expected_planes

    torch.use_deterministic_algorithms(True)
    # Where it is installed it would compute the loss of one side alone.
    sys.modules["liger_kernel"] = None  # type: ignore[assignment]
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for tied in (False, True):
            case = Case(tied=tied, dtype=dtype, counts=MICRO_BATCHES)
            device = new_device(job["device"])
            with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
                losses, planes = train_paged(case, device, Path(folder) / "store")
            expected = train_in_memory(case, device.torch_device)
            rows.append(
                {
                    "device": device.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "tied": tied,
                    "losses": losses,
                    "expected": expected.losses,
                    **differences(planes, expected_planes(expected)),
                }
            )
    return rows


def differences(
    planes: Mapping[tuple[str, str], Any], expected: Mapping[tuple[str, str], Any]
) -> dict[str, int]:
    """Values whose bits differ: of weights, and of what the optimizer keeps."""
    import torch

    found = {"weights": 0, "of_weights": 0, "optimizer": 0, "of_optimizer": 0}
    for key, value in planes.items():
        bits = torch.int16 if value.dtype == torch.bfloat16 else torch.int32
        kind = "weights" if key[1] == "weight" else "optimizer"
        found[kind] += int((value.view(bits) != expected[key].view(bits)).sum())
        found[f"of_{kind}"] += value.numel()
    return found


def largest_difference(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Relative to the loss in memory."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


def is_equal(row: Figures) -> bool:
    """In all bits."""
    return row["losses"] == row["expected"] and not row["weights"] and not row["optimizer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "simulated"], default="cuda")
    parser.add_argument("--folder", type=Path, default=Path(), help="for a store of a few MB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every loss")
    options = parser.parse_args()
    job = {"device": options.device, "folder": str(options.folder.absolute())}
    rows = child(__spec__.name, sys.executable, [json.dumps(job)], ENVIRONMENT)
    print(
        f"{len(MICRO_BATCHES)} steps of {', '.join(map(str, MICRO_BATCHES))} micro-batches on {rows[0]['device']}\n"
    )
    print(
        "| weights | head | losses bit-equal | largest relative difference | weights that differ | "
        "masters and moments that differ |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['dtype']} | {'tied' if row['tied'] else 'its own'} | "
            f"{'yes' if row['losses'] == row['expected'] else 'NO'} | "
            f"{largest_difference(row['losses'], row['expected']):.2g} | {row['weights']} of {row['of_weights']} | "
            f"{row['optimizer']} of {row['of_optimizer']} |"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.device == "simulated" and not all(map(is_equal, rows)):
        sys.exit("paged training through the simulated device differs from training in memory")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        answer(lambda: compare(json.loads(sys.argv[2])))
    else:
        main()
