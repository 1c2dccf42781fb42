"""What may change the bits of a step besides settings and data: versions, the processor, the device."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from megatrain_io.machine.extension import adamw_kernels
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.device.base import Device

__all__ = ["differences", "fingerprint_of"]


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
