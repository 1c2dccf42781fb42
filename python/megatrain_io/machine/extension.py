"""What the extension says of this machine and of itself: kernels, io_uring, direct I/O."""

from megatrain_io import _lib

__all__ = ["adamw_kernels", "build_info", "dio_alignment", "probe_uring"]

adamw_kernels = _lib.adamw_kernels
build_info = _lib.build_info
probe_uring = _lib.probe_uring
dio_alignment = _lib.dio_alignment
