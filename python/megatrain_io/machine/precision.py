"""Which precision computes fastest on this machine: what ``auto`` stands for where nothing else decides."""

import platform
import time
from typing import Literal

from megatrain_io.machine.cpu import parse_cpuinfo
from megatrain_io.machine.drive import read_text

__all__ = ["fastest_here", "fastest_of", "fastest_on_cpu"]

Precision = Literal["bf16", "fp32"]

# Of a product that is timed: rows as in a small micro-batch, and a matrix as in a small model.
_ROWS, _SIZE = 256, 512
_ROUNDS = 5
# bf16 moves fewer bytes: it is kept where products take about as long.
_CLEARLY_FASTER = 1.25


def fastest_here() -> Precision:
    """bf16 or fp32: what computes fastest on the GPU that torch finds here, else on the processor."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return fastest_on_cpu()


def fastest_on_cpu() -> Precision:
    """bf16 or fp32: what training computes fastest on this processor, with the torch that is installed.

    A processor with instructions for products in bf16 takes bf16; an x86 one whose torch has none at all takes fp32,
    which is up to 80 times as fast there. On others the products of a small layer are timed, some 20 ms.
    """
    import torch

    _, features = parse_cpuinfo(read_text("/proc/cpuinfo") or "")
    asked = getattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None
    )  # also where the environment masks it
    has_kernels = None if asked is None else bool(asked())
    is_x86 = platform.machine() in {"x86_64", "AMD64"}
    return fastest_of(features, has_kernels=has_kernels, is_x86=is_x86) or _timed()


def fastest_of(features: list[str], *, has_kernels: bool | None, is_x86: bool) -> Precision | None:
    """What the processor's features say of its precision; None where only timing tells.

    Args:
        features: as ``parse_cpuinfo`` has them.
        has_kernels: whether torch has products in bf16 for this processor; None where it does not say.
        is_x86: whether it is one of x86-64; others have fast products in bf16 by other libraries.
    """
    if has_kernels and {"avx512_bf16", "amx_bf16"} & {*features}:
        return "bf16"
    return "fp32" if is_x86 and has_kernels is False else None


def _timed() -> Precision:
    """Time the three products of a layer's step in both precisions, in turn; the fastest round of each counts."""
    import torch

    best: dict[torch.dtype, float] = {}
    for _ in range(_ROUNDS):
        for dtype in (torch.bfloat16, torch.float32):
            rows, gradient = (torch.ones(_ROWS, _SIZE, dtype=dtype) for _ in range(2))
            weight = torch.ones(_SIZE, _SIZE, dtype=dtype)
            began = time.perf_counter()
            _ = rows @ weight.T, gradient @ weight, gradient.T @ rows
            seconds = time.perf_counter() - began
            best[dtype] = min(best.get(dtype, seconds), seconds)
    return "fp32" if best[torch.bfloat16] > _CLEARLY_FASTER * best[torch.float32] else "bf16"
