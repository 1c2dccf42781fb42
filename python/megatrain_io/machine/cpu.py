"""The processor: its name and the instructions that matter here."""

import re

from megatrain_io.machine.drive import read_text

__all__ = ["cpu_model"]


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
    """Model name and those features that matter here."""
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    words = set(flags[1].split()) if flags else set()
    return (model[1].strip() if model else None), [name for name in _CPU_FEATURES if name in words]


def cpu_model() -> str | None:
    """The processor's name."""
    return parse_cpuinfo(read_text("/proc/cpuinfo") or "")[0]
