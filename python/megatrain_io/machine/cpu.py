"""The processor: its name, and which of the instructions that matter here it has."""

import re

from megatrain_io.machine.drive import read_text

__all__ = ["cpu_model", "parse_cpuinfo"]

_CPU_FEATURES = (
    "sse4_2",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
)


def parse_cpuinfo(text: str) -> tuple[str | None, list[str]]:
    """Model name, or None, and the features that matter here, from the text of ``/proc/cpuinfo``."""
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    words = set(flags[1].split()) if flags else set()
    return (model[1].strip() if model else None), [name for name in _CPU_FEATURES if name in words]


def cpu_model() -> str | None:
    """Name of the processor as ``/proc/cpuinfo`` has it; None where it has none."""
    return parse_cpuinfo(read_text("/proc/cpuinfo") or "")[0]
