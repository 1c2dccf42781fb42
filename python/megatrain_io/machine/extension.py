"""What the extension says of this machine and of itself: kernels, io_uring, direct I/O, formats of state."""

from megatrain_io import _lib

__all__ = ["adamw_kernels", "build_info", "dio_alignment", "probe_uring", "state_formats"]

adamw_kernels = _lib.adamw_kernels
build_info = _lib.build_info
probe_uring = _lib.probe_uring
dio_alignment = _lib.dio_alignment
state_formats = _lib.state_formats
