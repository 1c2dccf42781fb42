"""Activations on the drive: a file without a name that lives as long as its process, and the RAM that it fills.

It is a store of tensors with durability scratch (``docs/tensor_store.md``): direct I/O behind the caller's back, a
checksum on every transfer. ``TensorStore`` itself does not fit: its tensors have one size for ever, and it keeps
memory to copy through. Here a step moves only the front of each tensor, as long as its micro-batches are, and
everything lies in the store's own memory.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from megatrain_io.errors import MegatrainIoError, NoSpaceError, StorageError
from megatrain_io.store.inspect import held, waiting_line
from megatrain_io.store.paged_store import Engine, Ledger, OpenStore, RecordTensors, StoreCreator, Transfer
from megatrain_io.store.tensor_manifest import TensorSpec, manifest_of

__all__ = ["ACCOUNT", "ActivationFile", "remove_abandoned"]

ACCOUNT = "activations"
"""Account of the ledger for all activation checkpoints in RAM."""


class ActivationFile:
    """Room on the drive for one input of each of the first blocks, and slots in RAM to move them from and to."""

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        blocks: int,
        nbytes: int,
        transfer_nbytes: int,
        memory_nbytes: int,
        engine: Engine,
        ledger: Ledger,
    ) -> None:
        """Reserve the room and the RAM.

        Args:
            paths: of the file, one for each drive; what lies there is removed. They have no name afterwards.
            blocks: number of blocks whose inputs go to the drive.
            nbytes: bytes of the largest input, a multiple of ``transfer_nbytes``.
            transfer_nbytes: unit of transfers and checksums, a multiple of 4096.
            memory_nbytes: bytes of RAM for slots.
            engine: I/O engine.
            ledger: of memory; the account of the slots is "activations".

        Raises:
            NoSpaceError: the drive has not enough room.
            StorageError, UnsupportedError: the file cannot be made. Nothing is left behind.
        """
        self.blocks, self.nbytes, self.transfer_nbytes = blocks, nbytes, transfer_nbytes
        specs = {f"input of block {block}": TensorSpec((nbytes,), torch.uint8) for block in range(blocks)}
        manifest = json.dumps(manifest_of(specs, "scratch", chunk_nbytes=transfer_nbytes)).encode()
        remove_abandoned(paths)
        try:
            StoreCreator(list(paths), manifest, engine, ledger).finish(b"")
            self._store = OpenStore(list(paths), engine, ledger, waiting_line(paths[0]))
        except NoSpaceError as error:
            raise NoSpaceError(
                f"{paths[0]}: the inputs of {blocks} blocks, {nbytes} bytes each, do not fit on the drive: {error}. "
                "Nothing of the step was begun. Free some space, put the store on a larger drive, allow the saved "
                "inputs more RAM, or use shorter or fewer micro-batches"
            ) from error
        finally:
            # The file lives until it is closed, and a process that is killed leaves nothing behind.
            for path in paths:
                path.unlink(missing_ok=True)
                _hint(path).unlink(missing_ok=True)
        try:
            self._tensors = RecordTensors(self._store, memory_nbytes, ACCOUNT)
        except BaseException:
            self._store.close()
            raise

    def slots(self, count: int, nbytes: int) -> list[Tensor]:
        """Cut the RAM into ``count`` slots, uint8 [nbytes] each; those cut before must not be used any more.

        Raises:
            MegatrainIoError: a tensor over an earlier slot is still alive.
        """
        slots: list[Tensor] = []
        for _ in range(count):
            buffer = self._tensors.allocate(nbytes)
            if buffer is None:
                free, _longest = self._tensors.free_nbytes()
                raise MegatrainIoError(
                    f"{count} slots of {nbytes} bytes for activations do not fit what is free, {free} bytes: a "
                    "tensor of an earlier step is still alive, in a kept traceback for example. Let go of it"
                )
            slots.append(from_dlpack(buffer))
        return slots

    def write(self, block: int, slot: Tensor) -> Transfer:
        """Begin to write a slot as the input of a block; it must not change until the transfer has ended."""
        return self._tensors.put_front(block, slot.numpy())

    def read(self, block: int, slot: Tensor) -> Transfer:
        """Begin to read a block's input into a slot, as long as it was written."""
        return self._tensors.fill_front(block, slot.numpy())

    def io_bytes(self) -> tuple[int, int]:
        """Bytes read and written so far."""
        return self._store.io_bytes()

    def close(self) -> None:
        """Wait for what is under way, and give room and RAM back; slots stay valid until they are dropped."""
        self._tensors.close()
        # Nobody reads it again, so that its end could not be written down is no news.
        with suppress(MegatrainIoError):
            self._store.close()


def remove_abandoned(paths: Sequence[Path]) -> None:
    """Remove the file of a process that was killed before it could take the name away.

    Raises:
        StoreInUseError: another process has it.
        StorageError: the system refused.
    """
    for path in (*paths, *(path.with_name(path.name + ".partial") for path in paths)):
        if path.is_file() and not path.is_symlink():
            with held(path) as file:
                file.remove()
        try:
            _hint(path).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{_hint(path)} could not be removed ({error.strerror})") from error


def _hint(path: Path) -> Path:
    return path.with_name(path.name + ".owner")
