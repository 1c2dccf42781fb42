"""Paged training of the reference's tiny models, for the tests."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from megatrain_io.data.batch import MicroBatch
from megatrain_io.models.partition import PartitionedModel, model_parts
from megatrain_io.models.probe import PartitionSpec, probe
from megatrain_io.paging.activations import ActivationBudget
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.device.pool import VramPlan
from megatrain_io.paging.device.simulated import SimulatedDevice
from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.paging.ranks import Ranks
from megatrain_io.planning.residents import choose_gradients, choose_residents, resident_nbytes
from megatrain_io.runs.import_model import create_store
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import AdamWStep, PagedStore, TensorSettings
from megatrain_io.store.schedule import Residents
from megatrain_io.store.state_format import StateFormat
from reference.reference import Hyperparameters, Result, build, micro_batches, tiny_config
from reference.reference import train as train_in_memory

PROFILE = "MEGATRAIN_TEST_DRIVES"
DRIVES = int(os.environ.get(PROFILE, "1"))
"""Drives of the stores that tests make, where they do not say themselves."""

DEVICE_PROFILE = "MEGATRAIN_TEST_DEVICE"
DEVICE = os.environ.get(DEVICE_PROFILE, "cpu")
"""What computes where tests do not say: the CPU, or ``simulated``, an accelerator that is made up."""

PLANES = ("weight", "master", "exp_avg", "exp_avg_sq")
FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16"}
FROZEN = {torch.float32: "raw32", torch.bfloat16: "raw16"}


# Per-layer inputs of the embedding for every block, and keys and values of blocks for later ones.
_WITH_SIDE_INPUTS = {
    "vocab_size": 257, "vocab_size_per_layer_input": 257, "hidden_size": 32, "hidden_size_per_layer_input": 8,
    "intermediate_size": 48, "num_hidden_layers": 5, "num_kv_shared_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIDE_INPUTS = {
    "gemma4_text": _WITH_SIDE_INPUTS | {"global_head_dim": 16},
    "gemma3n_text": _WITH_SIDE_INPUTS
    | {"altup_num_inputs": 3, "laurel_rank": 4, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0, 0.0]},
}
"""Families whose blocks take more than the hidden state, small."""


def config_of(family: str, tied: bool, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a family of the reference, or of ``SIDE_INPUTS``."""
    if family in SIDE_INPUTS:
        values = {**SIDE_INPUTS[family], "tie_word_embeddings": tied, **overrides}
        return AutoConfig.for_model(family, **values)
    return tiny_config(family, tied, **overrides)


@dataclass(frozen=True)
class Case:
    """A tiny model and its training, in all that may change its bits."""

    family: str = "llama"
    tied: bool = False
    dtype: torch.dtype = torch.float32
    counts: tuple[int, ...] = (1,) * 20
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)
    rows: int = 1
    """How often the rows of each micro-batch are repeated in it."""
    is_frozen: bool = False
    """The store has weights alone, and nothing of it is trained."""
    format_of: Callable[[str], StateFormat] | None = None
    """State format of each tensor by its name, where not all have that of ``dtype``."""

    @property
    def config(self) -> PreTrainedConfig:
        return config_of(self.family, self.tied, **self.overrides)

    @property
    def model(self):
        return build(self.config, seed=1)

    @property
    def steps(self) -> list[list[dict[str, torch.Tensor]]]:
        made = micro_batches(self.config.vocab_size, self.counts, seed=3)
        return [[{n: t.repeat(self.rows, 1) for n, t in batch.items()} for batch in step] for step in made]

    @property
    def hyperparameters(self) -> Hyperparameters:
        return Hyperparameters(lr=[1e-3 * (1 + step % 3) for step in range(len(self.counts))])


@cache
def facts_of(family: str, tied: bool) -> PartitionSpec:
    return probe(config_of(family, tied))


@lru_cache(maxsize=64)
def in_memory(case: Case, clip_coefficients: tuple[float, ...] | None = None) -> Result:
    """What the reference makes of it, once for all tests of a process: nothing may change what it returns."""
    return train_in_memory(
        case.model, case.steps, case.hyperparameters, case.dtype, clip_coefficients=clip_coefficients
    )


def partitioned(case: Case) -> PartitionedModel:
    return PartitionedModel(case.config, case.dtype, facts_of(case.family, case.tied))


def files(path: Path, drives: int = DRIVES) -> list[Path]:
    """The files of the store that a test calls ``path``, one for each drive."""
    return [path, *(path.with_name(f"{path.name}.{drive}") for drive in range(1, drives))]


def make_store(
    path: Path,
    case: Case,
    chunk_parameters: int | None = None,
    engine: str = "auto",
    drives: int = DRIVES,
) -> None:
    partition = partitioned(case)
    state_format = case.format_of or (FROZEN if case.is_frozen else FORMATS)[case.dtype]
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), state_format, chunk_parameters)
    source = dict(case.model.named_parameters())
    create_store(
        files(path, drives),
        layout,
        lambda place, start, stop: source[place.name].detach().reshape(-1)[start:stop],
        model={},
        blob=blob(0, []),
        engine=engine,
    )


@contextmanager
def opened(
    path: Path,
    case: Case,
    *,
    engine: str = "auto",
    threads: int = 0,
    small_pool: bool = False,
    drives: int = DRIVES,
    resident_share: float = 0.0,
    activations: ActivationBudget | None = None,
    max_grad_norm: float | None = None,
    policy: str | None = None,
    kept_in_ram: float = 1.0,
    device: Device | None = None,
    vram: VramPlan | None = None,
    ranks: Ranks | None = None,
) -> Iterator[PagedPartition]:
    """A model that is ready to train; of gradients that wait for their norm, a share does so in RAM."""
    sizes = {"block_buffers": 2, "chunk_slots": 1, "block_gradients": 1} if small_pool else {}
    with closing(device or new_device()) as chosen, PagedStore(*files(path, drives), engine=engine) as state:
        how = {
            "max_grad_norm": max_grad_norm,
            "policy": policy,
            "device": chosen,
            "vram": vram,
            "ranks": ranks,
        }
        model = PagedPartition(partitioned(case), state, activations=activations, **how)
        hyperparameters = case.hyperparameters
        residents = resident_part(model, resident_share)
        spills = max_grad_norm is not None and kept_in_ram < 1
        if max_grad_norm is not None:
            residents = replace(residents, gradients=kept_part(model, kept_in_ram))
        state.start(
            model.pool_sizes(training=True, residents=residents, **sizes),
            residents=residents,
            gradient_files=[file.with_name(f"{file.name}.gradients") for file in files(path, drives)]
            if spills
            else (),
            settings=None
            if case.is_frozen
            else lambda place: TensorSettings(hyperparameters.weight_decay if len(place.shape) >= 2 else 0.0),
            threads=threads,
            unit=model.unit,
        )
        try:
            yield model
        finally:
            model.close()


def new_device() -> Device:
    """What computes in a test that does not say."""
    return SimulatedDevice() if DEVICE == "simulated" else Cpu()


def resident_part(model: PagedPartition, share: float) -> Residents:
    """What stays in RAM if that has room for ``share`` of the state."""
    layout = model.state.layout
    everything = choose_residents(layout, model.training_schedule, 1 << 60)
    room = int(share * resident_nbytes(everything, layout))
    return choose_residents(layout, model.training_schedule, room)


def kept_part(model: PagedPartition, share: float) -> frozenset[int]:
    """The records whose gradients wait in RAM if that has room for ``share`` of all."""
    layout = model.state.layout
    everything = sum(map(layout.record_gradient_bytes, range(len(layout.records))))
    return choose_gradients(layout, int(share * everything))


def to_micro_batch(batch: dict[str, torch.Tensor]) -> MicroBatch:
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return MicroBatch(input_ids=batch["input_ids"], shift_labels=shifted.contiguous())


def blob(step: int, losses: Sequence[float]) -> bytes:
    return json.dumps({"step": step, "losses": [loss.hex() for loss in losses]}).encode()


def progress_of(state: PagedStore) -> tuple[int, list[float]]:
    text = json.loads(state.blob)
    return text["step"], [float.fromhex(loss) for loss in text["losses"]]


def train(model: PagedPartition, case: Case, stop: int | None = None, commit_every: int = 1) -> list[float]:
    """Go on from the last committed step to ``stop`` (all steps), which is committed; the losses of all steps."""
    hyperparameters, steps = case.hyperparameters, case.steps
    done, losses = progress_of(model.state)
    end = len(steps) if stop is None else stop
    for number in range(done, end):
        adamw = AdamWStep(
            number + 1,
            hyperparameters.lr[number],
            hyperparameters.beta1,
            hyperparameters.beta2,
            hyperparameters.eps,
        )
        batches = [to_micro_batch(batch) for batch in steps[number]]
        # The blob of a step must hold its own loss, which is known before its last update.
        made = lambda loss: blob(number + 1, [*losses, loss])  # noqa: B023, E731
        commits = (number + 1) % commit_every == 0 or number + 1 == end
        losses.append(model.train_step(batches, adamw, made if commits else None).loss)
    model.wait_durable()
    return losses


def all_planes(state: PagedStore) -> dict[tuple[str, str], torch.Tensor]:
    """What a store has of each tensor; of a frozen one the weight alone."""
    return {
        (place.name, plane): state.read_tensor(place, plane)
        for place in state.layout.tensors()
        for plane in (PLANES if state.layout.records[place.record].is_trained else PLANES[:1])
    }


def expected_planes(result) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, plane): getattr(result, plane)[name] for plane in PLANES for name in result.master}


def differing(got: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> list[Any]:
    assert got.keys() == expected.keys()
    return [key for key, value in got.items() if not torch.equal(value, expected[key])]
