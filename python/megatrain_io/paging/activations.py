"""Activation checkpoints: the input of every block, kept from the forward to the backward pass.

What does not fit the RAM that they may take is written to the drive behind the forward pass, and read ahead of the
backward pass. The first blocks' inputs go there: they are needed last. All RAM is one ring of slots, block b in slot
b modulo their number, so each write has as many blocks' time as there are slots before its place is needed, and each
read one less before its input is: traffic is as smooth as the compute, and the last blocks' inputs never move.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatrain_io.errors import ConfigError, CorruptionError, MegatrainIoError
from megatrain_io.paging.activation_file import ACCOUNT, ActivationFile, remove_abandoned
from megatrain_io.store.paged_store import Engine, Ledger, Transfer, allocate

__all__ = [
    "ActivationBudget",
    "ActivationPlan",
    "SavedActivations",
    "activation_nbytes",
    "activation_plan",
    "least_activations",
]

# As tensors in a block buffer: matrix kernels choose their path by alignment.
_ALIGNMENT = 256
_PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2 << 20
_TRANSFER_BYTES = 1 << 20
# One in use, one on its way.
_SLOTS_MIN = 2


@dataclass(frozen=True)
class ActivationBudget:
    """Where the activation checkpoints may be.

    Attributes:
        ram_bytes: the most RAM that they take; None = all of them lie in RAM.
        scratch: the file for the others, one path for each drive; made when it is needed, and never seen.
        transfer_nbytes: what moves at once, with a checksum of its own; a multiple of 4096.
    """

    ram_bytes: int | None = None
    scratch: Sequence[Path] = ()
    transfer_nbytes: int = _TRANSFER_BYTES

    def __post_init__(self) -> None:
        """Check the bounds against each other.

        Raises:
            ConfigError: RAM is bounded and there is no place for the rest, or transfers are not whole pages.
        """
        if self.ram_bytes is not None and not self.scratch:
            raise ConfigError(
                "activation checkpoints have a bound on RAM and no file for what is beyond it: give one"
            )
        if self.transfer_nbytes < _PAGE_BYTES or self.transfer_nbytes % _PAGE_BYTES:
            raise ConfigError(f"transfers of {self.transfer_nbytes} bytes: give a multiple of {_PAGE_BYTES}")


@dataclass(frozen=True)
class ActivationPlan:
    """How the inputs of one step's blocks are divided between RAM and drive.

    Attributes:
        in_ram: number of blocks whose inputs stay in RAM: the last ones.
        on_drive: number of blocks whose inputs go to the drive: the first ones.
        slot_nbytes: bytes of RAM for the inputs of one block.
        ram_nbytes: bytes of RAM for all: as many slots as blocks stay, through which the others pass.
        moved_nbytes: bytes written in the forward pass, and as many read in the backward pass.
    """

    in_ram: int
    on_drive: int
    slot_nbytes: int
    ram_nbytes: int
    moved_nbytes: int


def activation_nbytes(hidden_nbytes: Sequence[int]) -> int:
    """Bytes of a block's inputs, one hidden state [B, T, H] for each micro-batch, each aligned."""
    return sum(_up(nbytes, _ALIGNMENT) for nbytes in hidden_nbytes)


def least_activations(blocks: int, nbytes_per_block: int, transfer_nbytes: int = _TRANSFER_BYTES) -> int:
    """Bytes of RAM without which the inputs cannot pass: one block's in use, one's on their way."""
    return min(blocks, _SLOTS_MIN) * _slot_nbytes(nbytes_per_block, transfer_nbytes)


def _slot_nbytes(nbytes_per_block: int, transfer_nbytes: int) -> int:
    moved = _up(nbytes_per_block, transfer_nbytes)
    return moved if moved < _HUGE_PAGE_BYTES else _up(moved, _HUGE_PAGE_BYTES)


def activation_plan(
    blocks: int, nbytes_per_block: int, ram_bytes: int | None, transfer_nbytes: int = _TRANSFER_BYTES
) -> ActivationPlan:
    """Divide the inputs of a step's blocks between RAM and drive.

    Args:
        blocks: number of blocks of the model.
        nbytes_per_block: bytes of a block's inputs, by ``activation_nbytes``.
        ram_bytes: the most RAM that the inputs take; None = all stay.
        transfer_nbytes: unit of transfers, in bytes.

    Raises:
        ConfigError: fewer than two blocks' inputs fit; the message has the least that is enough.
    """
    moved, slot = _up(nbytes_per_block, transfer_nbytes), _slot_nbytes(nbytes_per_block, transfer_nbytes)
    if ram_bytes is None:
        return ActivationPlan(blocks, 0, nbytes_per_block, blocks * nbytes_per_block, 0)
    in_ram = min(blocks, ram_bytes // slot) if slot else blocks
    if in_ram < min(blocks, _SLOTS_MIN):
        least = least_activations(blocks, nbytes_per_block, transfer_nbytes)
        raise ConfigError(
            f"activations may take {ram_bytes} bytes of RAM, and those of one block of this step take {slot} "
            f"(all {blocks} blocks: {blocks * slot}): {least} is the least, for one block in use and one on its way "
            "to or from the drive. Allow more, or use shorter or fewer micro-batches"
        )
    on_drive = blocks - in_ram
    return ActivationPlan(in_ram, on_drive, slot, in_ram * slot, on_drive * moved)


class SavedActivations:
    """Hidden states by block and micro-batch, in one piece of RAM that is kept from step to step, and on the drive.

    Tensors that live through the whole step among short-lived ones would leave holes in the heap.

    In the forward pass a block's inputs are ``put``, then ``finish`` says that these are all. In the backward pass,
    last block first, they are taken by ``get``, then ``release`` says that they are not needed any more.
    """

    def __init__(
        self, ledger: Ledger, budget: ActivationBudget | None = None, engine: Engine = "auto"
    ) -> None:
        """Take note of the budget; RAM and file are made by ``reserve``.

        Args:
            ledger: of memory; the account is "activations".
            budget: how much RAM, and where the rest goes; None = all in RAM.
            engine: I/O engine for the drive.

        Raises:
            StorageError: the scratch file of a killed process cannot be removed.
        """
        self._ledger = ledger
        self._budget = budget or ActivationBudget()
        self._engine = engine
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._scratch: ActivationFile | None = None
        self._failed = False
        self._slots: list[Tensor] = []
        self._transfers: dict[int, Transfer] = {}
        self._offsets: list[int] = []
        self._nbytes: list[int] = []
        self._moved_before = [0, 0]
        self.plan = ActivationPlan(0, 0, 0, 0, 0)
        """How the inputs of the step are divided for which ``reserve`` was called last."""
        self.before_release: Callable[[], None] = lambda: None
        """Called before the RAM of inputs is given back, in whole."""
        self.stalled_seconds = 0.0
        """Seconds that compute waited for inputs from the drive, so far."""
        if self._budget.scratch:
            remove_abandoned(self._budget.scratch)

    def reserve(self, blocks: int, hidden_nbytes: Sequence[int]) -> None:
        """Make room for the inputs of ``blocks`` blocks, each of ``hidden_nbytes`` at most (one a micro-batch).

        What an earlier step left, also one that failed, is void. Room on the drive only grows.

        Raises:
            ConfigError: the bound on RAM is too small for this step.
            NoSpaceError: the drive has not enough room for it.
        """
        budget, per_block = self._budget, activation_nbytes(hidden_nbytes)
        plan = activation_plan(blocks, per_block, budget.ram_bytes, budget.transfer_nbytes)
        self._let_end()
        self._nbytes = list(hidden_nbytes)
        self._offsets = [activation_nbytes(hidden_nbytes[:index]) for index in range(len(hidden_nbytes))]
        scratch = self._scratch
        if scratch is not None and (
            self._failed or (plan.on_drive and (scratch.nbytes * plan.on_drive < plan.moved_nbytes))
        ):
            self.close()
            scratch = None
        if scratch is None and plan.on_drive == 0:
            self._reserve_arena(blocks, per_block)
        elif scratch is None or plan != self.plan or not self._slots:
            self._reserve_slots(plan)
        self.plan = plan

    def put(self, block: int, micro_batch: int, hidden: Tensor) -> None:
        """Keep a copy of the input [B, T, H] of ``block``; waits until its slot was written.

        Raises:
            CorruptionError, StorageError: what lay there before could not be written.
        """
        self.room(block, micro_batch, hidden).copy_(hidden)

    def room(self, block: int, micro_batch: int, like: Tensor) -> Tensor:
        """Memory for the input of ``block``, with the shape and dtype of ``like``; waits as ``put`` does."""
        if like.nbytes > self._nbytes[micro_batch]:
            raise MegatrainIoError(
                f"the input of block {block} has {like.nbytes} bytes, and room was made for "
                f"{self._nbytes[micro_batch]}: blocks must keep the size of the hidden state"
            )
        self._wait(block % len(self._slots))
        return self._place(block, micro_batch, like)

    def finish(self, block: int) -> None:
        """All inputs of ``block`` were put: those that go to the drive begin to be written."""
        if self._scratch is not None and block < self.plan.on_drive:
            slot = block % len(self._slots)
            self._transfers[slot] = self._scratch.write(block, self._slots[slot])

    def get(self, block: int, micro_batch: int, like: Tensor) -> Tensor:
        """The input that was kept, without a copy; ``like`` has its shape and dtype. Valid until ``release``.

        Raises:
            CorruptionError: the bytes on the drive are not those that were written.
            StorageError: they cannot be read.
        """
        self._wait(block % len(self._slots))
        return self._place(block, micro_batch, like)

    def is_here(self, block: int) -> bool:
        """Whether the inputs of ``block`` can be had without waiting."""
        transfer = self._transfers.get(block % len(self._slots))
        return transfer is None or transfer.done

    def release(self, block: int) -> None:
        """The inputs of ``block`` are not needed any more: those that take their slot begin to be read."""
        before = block - len(self._slots)
        if self._scratch is not None and before >= 0:
            slot = block % len(self._slots)
            self._transfers[slot] = self._scratch.read(before, self._slots[slot])

    def memory(self) -> list[Tensor]:
        """The RAM that inputs lie in now, as one tensor for each piece of it."""
        return self._slots if self._scratch is not None else [self._arena] if self._arena.nbytes else []

    def io_bytes(self) -> tuple[int, int]:
        """Bytes read from and written to the drive so far."""
        read, written = self._scratch.io_bytes() if self._scratch else (0, 0)
        return self._moved_before[0] + read, self._moved_before[1] + written

    def close(self) -> None:
        """Give room and RAM back; ``reserve`` makes them anew."""
        self._let_end()
        self._moved_before = list(self.io_bytes())
        self.before_release()
        self._slots, self._arena = [], torch.empty(0, dtype=torch.uint8)
        scratch, self._scratch, self._failed = self._scratch, None, False
        if scratch is not None:
            scratch.close()

    def _reserve_arena(self, blocks: int, per_block: int) -> None:
        """Make room for all inputs in RAM; mappings begin at a page, which is more than the alignment."""
        nbytes = blocks * per_block
        self._slots = []
        if nbytes > self._arena.nbytes:
            self.before_release()
            self._arena = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._arena = allocate(nbytes, self._ledger, ACCOUNT)
        self._slots = [self._arena[block * per_block : (block + 1) * per_block] for block in range(blocks)]

    def _reserve_slots(self, plan: ActivationPlan) -> None:
        """Make a ring of slots in the RAM that the scratch file is moved through, and the file if there is none."""
        self.before_release()
        self._slots, self._arena = [], torch.empty(0, dtype=torch.uint8)
        budget = self._budget
        if self._scratch is None:
            self._scratch = ActivationFile(
                budget.scratch,
                blocks=plan.on_drive,
                nbytes=plan.moved_nbytes // plan.on_drive,
                transfer_nbytes=budget.transfer_nbytes,
                memory_nbytes=budget.ram_bytes or plan.ram_nbytes,
                engine=self._engine,
                ledger=self._ledger,
            )
        moved = _up(activation_nbytes(self._nbytes), budget.transfer_nbytes)
        self._slots = self._scratch.slots(plan.in_ram, moved)

    def _wait(self, slot: int) -> None:
        transfer = self._transfers.get(slot)
        if transfer is None:
            return
        began = time.monotonic()
        try:
            transfer.wait()
        except CorruptionError as error:
            self._failed = True
            raise CorruptionError(
                "an input of this step came back from the drive with other bytes than were written. They were not "
                "used: the step is dropped, and the training state is not touched. The next step gets a new file; if "
                f"this comes again, check the drive. In full: {error}"
            ) from error
        except MegatrainIoError:
            self._failed = True
            raise
        finally:
            self.stalled_seconds += time.monotonic() - began
        del self._transfers[slot]

    def _let_end(self) -> None:
        """Wait for the transfers of a step that failed, before their slots are used again."""
        for slot in list(self._transfers):
            with suppress(MegatrainIoError):
                self._wait(slot)
            self._transfers.pop(slot, None)

    def _place(self, block: int, micro_batch: int, like: Tensor) -> Tensor:
        start = self._offsets[micro_batch]
        slot = self._slots[block % len(self._slots)]
        return slot[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
