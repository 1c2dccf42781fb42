"""The contenders of ``train_step.py``: one and the same training in stock torch, in DeepSpeed and in megatrain-io.

Each runs in a process of its own and answers with what each of its steps took. All start from the same random weights,
rounded to bf16, and train the same tokens in every step, so that losses can be compared.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches.harness.comparison import SkippedError, answer

LEARNING_RATE, BETAS, EPS, DECAY = 3e-4, (0.9, 0.95), 1e-8, 0.01
SEED = 1
TOKENS = 256
HEAD_DIM = 64
COMMIT_SELDOM = 100
# The optimizer in RAM converts gradients in parts of so many parameters: a second copy of all would be waste.
PART_PARAMETERS = 64 << 20


@dataclass(frozen=True)
class Size:
    """A Llama model: heads of 64, as many for keys and values, head and embeddings of their own."""

    hidden: int
    layers: int
    inter: int
    vocab: int

    @property
    def parameters(self) -> int:
        """All of them are trained."""
        block = 4 * self.hidden**2 + 3 * self.hidden * self.inter + 2 * self.hidden
        return self.layers * block + 2 * self.vocab * self.hidden + self.hidden


SIZES = {
    "tiny": Size(256, 2, 704, 1024),
    "171M": Size(1024, 12, 2816, 8192),
    "325M": Size(1024, 24, 2816, 8192),
    "1.2B": Size(2048, 24, 5504, 8192),
    "1.3B": Size(2048, 24, 5504, 32000),
    "7B": Size(4096, 32, 11008, 32000),
}

Job = Mapping[str, Any]
Figures = dict[str, Any]


def config_of(size: Size) -> Any:
    """The configuration, in transformers' words."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.inter,
        vocab_size=size.vocab,
        num_attention_heads=size.hidden // HEAD_DIM,
        num_key_value_heads=size.hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
        attention_dropout=0.0,
    )


def dtype_of(job: Job) -> Any:
    """What it computes in: bf16, if it does not say."""
    import torch

    return {"bf16": torch.bfloat16, "f32": torch.float32}[job.get("dtype", "bf16")]


def model_of(job: Job) -> Any:
    """Random weights, drawn in fp32 and rounded to the dtype; buffers (rotary frequencies) stay in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config_of(SIZES[job["size"]]), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype_of(job))
    return model.train()


def tokens_of(job: Job) -> list[Any]:
    """One row of tokens for each micro-batch, ``tokens`` of them if it says so; all steps train the same ones."""
    import torch

    random = torch.Generator().manual_seed(SEED)
    shape = (1, job.get("tokens", TOKENS))
    return [
        torch.randint(SIZES[job["size"]].vocab, shape, generator=random) for _ in range(job["micro_batches"])
    ]


def micro_batches(job: Job) -> list[Any]:
    """The same rows, with labels, for a contender of ours."""
    import torch

    from megatrain_io.data.batch import MicroBatch

    shift = lambda ids: torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()  # noqa: E731
    return [MicroBatch(ids, shift(ids)) for ids in tokens_of(job)]


# --------------------------------------------------------------------------------------------- measuring


def drive_bytes() -> tuple[int, int]:
    """Bytes that this process made the drives read and write."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(": ") for line in lines)
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def reset_peak_rss() -> None:
    """Forget what building the model took."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_rss() -> int:
    """Most bytes of RAM since ``reset_peak_rss``."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in text.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def thread_seconds() -> dict[str, float]:
    """CPU seconds of this process by the name of a thread, without the number at its end."""
    ticks, found = os.sysconf("SC_CLK_TCK"), dict[str, float]()
    for stat in Path("/proc/self/task").glob("*/stat"):
        name, fields = stat.read_text(encoding="utf-8").partition("(")[2].rsplit(")", 1)
        kind = "main" if stat.parent.name == str(os.getpid()) else name.rstrip("0123456789-")
        user, system = fields.split()[11:13]
        found[kind] = found.get(kind, 0.0) + (int(user) + int(system)) / ticks
    return found


def measured(step: Callable[[int], tuple[float, Mapping[str, float]]], job: Job) -> Figures:
    """Run all steps; ``step(number)`` gives the loss and where its time went."""
    import torch

    reset_peak_rss()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    rows = []
    for number in range(1, job["steps"] + 1):
        (read, written), threads = drive_bytes(), thread_seconds()
        wall, cpu = time.perf_counter(), time.process_time()
        loss, parts = step(number)
        row = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "loss": loss}
        now = drive_bytes()
        row["threads"] = {kind: spent - threads.get(kind, 0.0) for kind, spent in thread_seconds().items()}
        rows.append({**row, "read": now[0] - read, "written": now[1] - written, "parts": dict(parts)})
    return {"steps": rows, "peak_rss": peak_rss(), "torch_threads": torch.get_num_threads()}


class Parts:
    """Time since the last mark, added up by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        """What went by since the last mark was ``name``."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


# ------------------------------------------------------------------------------------------- stock torch


def torch_in_ram(job: Job) -> Figures:
    """Weights and gradients in the dtype, torch's fused AdamW over fp32 masters; without ``updates`` no AdamW."""
    import torch

    model, batches = model_of(job), tokens_of(job)
    if job["checkpoints"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    items = sum(ids.numel() - 1 for ids in batches)
    update = _optimizer(model) if job["updates"] else lambda: None

    def step(_number: int) -> tuple[float, Mapping[str, float]]:
        parts, total = Parts(), torch.zeros(())
        for ids in batches:
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=items, use_cache=False).loss
            parts.mark("forward")
            loss.backward()
            parts.mark("backward")
            total += loss.detach()
        update()
        model.zero_grad()
        parts.mark("optimizer")
        return total.item(), parts.seconds

    return measured(step, job)


def _optimizer(model: Any) -> Callable[[], None]:
    """AdamW over the weights themselves where they are fp32; else over masters, which are copied back."""
    import torch

    settings = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "fused": True}
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        adamw = torch.optim.AdamW(model.parameters(), **settings)
        return adamw.step
    pairs = [(parameter, torch.nn.Parameter(parameter.detach().float())) for parameter in model.parameters()]
    masters = [master for _, master in pairs]
    adamw = torch.optim.AdamW(masters, **settings)
    parts: list[list[Any]] = [[]]
    for pair in pairs:
        if sum(master.numel() for _, master in parts[-1]) + pair[1].numel() > PART_PARAMETERS and parts[-1]:
            parts.append([])
        parts[-1].append(pair)

    def update() -> None:
        # AdamW passes over what has no gradient.
        for part in parts:
            for parameter, master in part:
                master.grad, parameter.grad = parameter.grad.float(), None
            adamw.step()
            with torch.no_grad():
                for parameter, master in part:
                    parameter.copy_(master)
                    master.grad = None

    return update


# --------------------------------------------------------------------------------------------- DeepSpeed


def deepspeed_config(job: Job, folder: Path) -> dict[str, Any]:
    """ZeRO-3 with parameters and optimizer on NVMe; the buffers hold the largest tensor."""
    size = SIZES[job["size"]]
    largest = max(size.vocab * size.hidden, size.inter * size.hidden)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": job["micro_batches"],
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY},
        },
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "sub_group_size": 20_000_000,
            "stage3_prefetch_bucket_size": 20_000_000,
            "stage3_max_live_parameters": 50_000_000,
            # Without this it keeps more parameters than it has buffers, and fails.
            "stage3_max_reuse_distance": 50_000_000,
            "offload_param": {
                "device": "nvme",
                "nvme_path": str(folder),
                "buffer_count": 24,
                "buffer_size": max(9_000_000, largest),
                "max_in_cpu": 0,
                "pin_memory": True,
            },
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": str(folder),
                "buffer_count": 5,
                "pin_memory": True,
            },
        },
        "aio": {
            "block_size": 1 << 20,
            "queue_depth": 32,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        },
        "steps_per_print": 10**9,
    }


def deepspeed(job: Job) -> Figures:
    """One process; activations stay, as with these settings checkpoints change its losses."""
    try:
        import deepspeed as peer
    except ImportError as error:
        raise SkippedError(f"deepspeed is not installed ({error})") from error
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"
    )
    model = model_of(job)
    try:
        peer.init_distributed("nccl" if job.get("device") == "cuda" else "gloo")
        config = deepspeed_config(job, Path(job["folder"]))
        engine, *_ = peer.initialize(model=model, model_parameters=model.parameters(), config=config)
        del model
        batches = [ids.to(engine.device) for ids in tokens_of(job)]

        def step(_number: int) -> tuple[float, Mapping[str, float]]:
            parts, total = Parts(), 0.0
            for ids in batches:
                loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
                parts.mark("forward")
                engine.backward(loss)
                parts.mark("backward")
                engine.step()
                parts.mark("optimizer")
                total += loss.item() / len(batches)
            return total, parts.seconds

        return measured(step, job)
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise SkippedError(f"DeepSpeed fails: {type(error).__name__}: {text.splitlines()[-1]}") from error


# -------------------------------------------------------------------------------------------------- ours


def make_store(job: Job) -> Figures:
    """The store that one of ours trains, made in a process of its own: the whole model passes through its RAM."""
    from megatrain_io.models.partition import PartitionedModel, model_parts
    from megatrain_io.models.probe import probe
    from megatrain_io.runs.import_model import create_store
    from megatrain_io.store.layout import ModelLayout

    config = config_of(SIZES[job["size"]])
    partition = PartitionedModel(config, dtype_of(job), probe(config))
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), job.get("dtype", "bf16"))
    source = dict(model_of(job).named_parameters())
    create_store(
        [store_of(job)],
        layout,
        lambda place, start, stop: source[place.name].detach().reshape(-1)[start:stop],
        model={},
        blob=b"0",
    )
    return {"parameters": layout.parameters}


def store_of(job: Job) -> Path:
    """Where a contender of ours has its store."""
    return Path(job["folder"]) / "store.mtio"


def ours(job: Job) -> Figures:
    """``resident``: share of the state that stays in RAM; ``commit_every``: steps between two commits."""
    from megatrain_io.machine.threads import let_waiting_threads_yield

    let_waiting_threads_yield(os.environ)  # as the command line does, before torch is imported

    from benches.step.bound import bytes_of_phases
    from megatrain_io.models.partition import PartitionedModel
    from megatrain_io.models.probe import probe
    from megatrain_io.paging.paged_model import PagedPartition
    from megatrain_io.planning.residents import choose_residents, resident_nbytes
    from megatrain_io.store.paged_store import AdamWStep, PagedStore, TensorSettings

    config = config_of(SIZES[job["size"]])
    partition = PartitionedModel(config, dtype_of(job), probe(config))
    batches = micro_batches(job)
    with PagedStore(store_of(job)) as state:
        model = PagedPartition(partition, state)
        layout, schedule = state.layout, model.training_schedule
        state_nbytes = sum(map(layout.record_weight_bytes, range(len(layout.records))))
        state_nbytes += sum(map(layout.update_extent_bytes, layout.chunks))
        residents = choose_residents(layout, schedule, int(job["resident"] * state_nbytes))
        state.start(
            model.pool_sizes(training=True, residents=residents),
            residents=residents,
            settings=lambda _place: TensorSettings(DECAY),
        )

        def step(number: int) -> tuple[float, Mapping[str, float]]:
            before = state.timings()
            blob = (lambda _loss: b"%d" % number) if number % job["commit_every"] == 0 else None
            adamw = AdamWStep(number, LEARNING_RATE, *BETAS, EPS)
            loss = model.train_step(batches, adamw, blob).loss
            return loss, {name: value - before[name] for name, value in state.timings().items()}

        found = measured(step, job)
        clock = time.perf_counter()
        state.wait_durable()
        commits = job["commit_every"] == 1
        return {
            **found,
            "durable_seconds": time.perf_counter() - clock,
            "ledger_peak": state.ledger.total()[1],
            "resident_bytes": resident_nbytes(residents, layout),
            "scheduled": bytes_of_phases(schedule, layout, residents, commits=commits),
            "notes": state.notes,
        }


# ------------------------------------------------------------------------------------------------- the contenders


@dataclass(frozen=True)
class Contender:
    """What runs, with which settings, and what it needs of the machine, in bytes a parameter."""

    work: Callable[[Job], Figures]
    settings: Mapping[str, Any]
    ram: float
    disk: float = 0.0


_TORCH_RAM = 16.5  # weights and gradients in bf16, masters and moments, a part's gradients in fp32
_STORE = 26.0  # two copies of 12, and some room


def _of_ours(resident: float, commit_every: int) -> Contender:
    return Contender(
        ours, {"resident": resident, "commit_every": commit_every}, ram=12 * resident + 1.2, disk=_STORE
    )


FIO = "fio"
TORCH, CHECKPOINTED, COMPUTE = "torch", "torch, activation checkpointing", "torch, compute alone"
DEEPSPEED = "DeepSpeed ZeRO-3 + NVMe"
ON_NVME, HALF, RESIDENT = (
    f"megatrain-io, {place}" for place in ("all on NVMe", "half resident", "all resident")
)
SELDOM = f", commit_every {COMMIT_SELDOM}"
CONTENDERS: dict[str, Contender] = {
    TORCH: Contender(torch_in_ram, {"checkpoints": False, "updates": True}, _TORCH_RAM),
    CHECKPOINTED: Contender(torch_in_ram, {"checkpoints": True, "updates": True}, _TORCH_RAM),
    # What the bound takes for computing, also where masters and moments do not fit.
    COMPUTE: Contender(torch_in_ram, {"checkpoints": True, "updates": False}, 6.0),
    DEEPSPEED: Contender(deepspeed, {}, 10.0, 20.0),
    ON_NVME: _of_ours(0.0, 1),
    HALF: _of_ours(0.5, 1),
    HALF + SELDOM: _of_ours(0.5, COMMIT_SELDOM),
    RESIDENT: _of_ours(1.0, 1),
    RESIDENT + SELDOM: _of_ours(1.0, COMMIT_SELDOM),
}
OURS = [name for name, contender in CONTENDERS.items() if contender.work is ours]


@contextmanager
def _quiet() -> Iterator[None]:
    """What libraries print goes to standard error: standard output is for the answer."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def run(job: Job, contenders: Mapping[str, Contender]) -> Figures:
    """In the child: a contender, or the store for it."""
    with _quiet():
        if job["makes_store"]:
            return make_store(job)
        contender = contenders[job["contender"]]
        return contender.work({**job, **contender.settings})


if __name__ == "__main__":
    answer(lambda: run(json.loads(sys.argv[2]), CONTENDERS))
