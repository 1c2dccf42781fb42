"""Buffers lent to torch: the memory stays until the last tensor over it is gone, and nobody takes it before."""

import ctypes
import gc
import threading

import pytest
import torch
from torch.utils.dlpack import from_dlpack

from megatrain_io import _lib
from megatrain_io.errors import BufferInUseError
from megatrain_io.store.paged_store import Ledger, allocate

NBYTES = 1 << 20


def test_a_tensor_keeps_its_memory_and_the_ledger_knows():
    ledger = Ledger()
    tensor = allocate(NBYTES, ledger, "test")
    assert not tensor.any()
    view = tensor[512:1024].view(torch.float32)
    del tensor
    view.fill_(7.0)
    assert bool((view == 7.0).all())
    assert ledger.balances()["test"][0] >= NBYTES
    del view
    assert ledger.balances()["test"] == (0, NBYTES)


def test_a_buffer_is_not_given_back_while_a_tensor_is_alive():
    buffer = _lib.allocate(NBYTES, Ledger(), "test")
    tensor = from_dlpack(buffer)
    view = tensor[:16]
    assert buffer.exports == 1
    del tensor
    with pytest.raises(BufferInUseError):
        buffer.release()
    del view
    buffer.release()
    with pytest.raises(BufferError, match="given back"):
        from_dlpack(buffer)


def test_a_capsule_that_nobody_took_ends_its_export():
    buffer = _lib.allocate(NBYTES, Ledger(), "test")
    capsule = buffer.__dlpack__()
    assert buffer.exports == 1
    del capsule
    gc.collect()
    assert buffer.exports == 0
    buffer.release()


def test_a_tensor_may_die_in_another_thread():
    buffer = _lib.allocate(NBYTES, Ledger(), "test")
    tensors = [from_dlpack(buffer) for _ in range(64)]
    assert buffer.exports == len(tensors)
    threads = [threading.Thread(target=tensors.pop) for _ in range(len(tensors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert buffer.exports == 0


def test_the_deleter_needs_no_interpreter():
    """A call by ctypes runs without the interpreter lock: torch may delete so, in threads of its own."""
    buffer = _lib.allocate(NBYTES, Ledger(), "test")
    capsule = buffer.__dlpack__()
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    rename = ctypes.pythonapi.PyCapsule_SetName
    rename.argtypes = [ctypes.py_object, ctypes.c_char_p]
    managed = pointer_of(capsule, b"dltensor")
    used = b"used_dltensor"
    rename(capsule, used)
    # DLTensor (48 bytes), context, deleter.
    deleter = ctypes.cast(managed + 56, ctypes.POINTER(ctypes.c_void_p))[0]
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(deleter)(managed)
    assert buffer.exports == 0
    del capsule
    assert buffer.exports == 0


def test_a_copy_or_another_device_is_refused():
    buffer = _lib.allocate(NBYTES, Ledger(), "test")
    for asked in ({"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError, match="without a copy"):
            buffer.__dlpack__(**asked)
    assert buffer.exports == 0
