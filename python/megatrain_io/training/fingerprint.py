"""What decides the bits of a step besides model and data: settings; and versions, the processor, the device."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from megatrain_io.config.schema import TrainConfig
from megatrain_io.machine.extension import adamw_kernels
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.device.base import Device

__all__ = ["differences", "fingerprint_of", "settings_digest"]


def fingerprint_of(device: Device, partition: PartitionedModel) -> dict[str, Any]:
    """What may change the bits of this process, by name, where ``device`` computes ``partition``: plain JSON types."""
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpu": platform.processor() or platform.machine(),
        "adamw_kernel": adamw_kernels()[-1],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "device": device.name,
        "liger-kernel": partition.liger_version,
    }


def differences(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """A sentence for each entry that is not as it was; none where a run begins (``before`` is None)."""
    if before is None:
        return []
    # What older versions did not write down was so.
    was = {"device": "cpu"} | dict(before)
    return [
        f"{name} was {was.get(name)} and is {value}: from here on the bits may differ from those of a run that was "
        "never stopped"
        for name, value in now.items()
        if was.get(name) != value
    ]


def settings_digest(config: TrainConfig, max_steps: int) -> str:
    """SHA-256 of all settings that decide the bits of a step, besides model and data.

    Args:
        config: with numbers in place of ``auto``.
        max_steps: last step of the run.
    """
    reporting = {"device", "eval_steps", "logging_steps", "num_train_epochs"}
    settings = config.model_dump(exclude=reporting)
    settings["max_steps"] = max_steps
    if settings["max_grad_norm"] is None:
        del settings["max_grad_norm"]  # as in runs of versions that did not know it
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
