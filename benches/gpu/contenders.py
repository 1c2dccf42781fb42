"""The contenders of ``peers.py``: one and the same training on a GPU by megatrain-io, stock torch and DeepSpeed.

Each runs in a process of its own. All start from the weights of ``step/contenders.py`` and train the same tokens in
every step, with one loss over all of a step's tokens, so that losses can be compared. One budget of VRAM holds for all.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from benches.gpu import train_step
from benches.harness.comparison import SkippedError, answer
from benches.step import contenders as step_contenders
from benches.step.contenders import (
    BETAS,
    DECAY,
    DEEPSPEED,
    EPS,
    LEARNING_RATE,
    Contender,
    Figures,
    Job,
    measured,
)

# What a step finds that the first ones build is not its own.
WARM_UP = train_step.WARM_UP


def ours(job: Job) -> Figures:
    """The training of ``train_step.py``; without a GPU on the device that is made up."""
    from megatrain_io.errors import DoesNotFitError

    on_gpu = job["device"] == "cuda"
    store = str(step_contenders.store_of(job))
    try:
        found = train_step.train(
            {**job, "store": store, "frozen": False, "device": "cuda" if on_gpu else "simulated"}
        )
    except DoesNotFitError as error:
        raise SkippedError(f"it does not fit: {one_line(error)}") from error
    return {
        **found,
        # As all others are counted; what the engine counted is beside it.
        "read": found["read_by_system"],
        "written": found["written_by_system"],
        "by_engine": [found["read"], found["written"]],
        "vram_peak": found["vram_peak"] if on_gpu else None,
    }


def torch_offload(job: Job) -> Figures:
    """FSDP2 in a world of one: all that lasts is in RAM and in fp32, and one block at a time in bf16 on the device."""
    import torch
    from torch import distributed
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    on_gpu = job["device"] == "cuda"
    with vram_bounded(job):
        model = step_contenders.model_of(job).float()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo", store=distributed.HashStore(), rank=0, world_size=1
        )
        mesh = distributed.init_device_mesh(job["device"], (1,))
        how = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
            "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu),
        }
        for block in model.model.layers:
            fully_shard(block, **how)
        fully_shard(model, **how)
        adamw = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )
        batches = [ids.to(job["device"]) for ids in step_contenders.tokens_of(job)]
        items = len(batches) * (job["tokens"] - 1)

        def step(_number: int) -> tuple[float, Mapping[str, float]]:
            parts, total = step_contenders.Parts(), torch.zeros((), device=job["device"])
            for ids in batches:
                loss = model(input_ids=ids, labels=ids, num_items_in_batch=items, use_cache=False).loss
                loss.backward()
                total += loss.detach()
            parts.mark("forward and backward")
            adamw.step()
            adamw.zero_grad()
            parts.mark("optimizer")
            return total.item(), parts.seconds

        try:
            return counted(measured(step, {**job, "steps": job["steps"] + WARM_UP}), job)
        finally:
            distributed.destroy_process_group()


def deepspeed(job: Job) -> Figures:
    """The contender of ``step/train_step.py``, with another accelerator."""
    with vram_bounded(job):
        return counted(step_contenders.deepspeed({**job, "steps": job["steps"] + WARM_UP}), job)


@contextmanager
def vram_bounded(job: Job) -> Iterator[None]:
    """Torch's allocator refuses what is beyond the budget, as it does for ours.

    Raises:
        SkippedError: it refused.
    """
    import torch

    if job["device"] == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, job["vram_of_torch"] / total)), 0)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SkippedError(f"it does not fit the VRAM: {one_line(error)}") from error


def counted(found: Figures, job: Job) -> Figures:
    """What ``measured`` found, in the form of ``train_step.train``."""
    import torch

    steps = found["steps"][WARM_UP:]
    return {
        "seconds": [step["seconds"] for step in steps],
        "losses": [step["loss"] for step in found["steps"]],
        "read": statistics.fmean(step["read"] for step in steps),
        "written": statistics.fmean(step["written"] for step in steps),
        "parts": [step["parts"] for step in steps],
        "peak_rss": found["peak_rss"],
        "vram_peak": torch.cuda.max_memory_allocated() if job["device"] == "cuda" else None,
    }


def one_line(error: BaseException) -> str:
    """The first line of what it says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


OURS, OFFLOAD = "megatrain-io", "torch, FSDP2 with CPU offload"
CONTENDERS: dict[str, Contender] = {
    # The whole model, in fp32, passes through RAM when its store is made.
    OURS: Contender(ours, {}, ram=4.5, disk=26.0),
    # Parameters, gradients and moments, and room: torch rounds pinned memory up to powers of two.
    OFFLOAD: Contender(torch_offload, {}, ram=20.0),
    DEEPSPEED: Contender(deepspeed, {}, ram=10.0, disk=20.0),
}


if __name__ == "__main__":
    answer(lambda: step_contenders.run(json.loads(sys.argv[2]), CONTENDERS))
