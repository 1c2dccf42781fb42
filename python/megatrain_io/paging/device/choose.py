"""Which device computes where none was named."""

import torch

from megatrain_io.paging.device.base import Device
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.device.cuda import Cuda

__all__ = ["best_device"]


def best_device(precision: str) -> Device:
    """The GPU, if torch finds one that computes in ``precision`` (``auto``: in any); else the CPU."""
    if torch.cuda.is_available():
        gpu = Cuda()
        if precision != "bf16" or gpu.has_bf16:
            return gpu
    return Cpu()
