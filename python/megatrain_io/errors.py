"""Every error that megatrain-io raises on purpose.

The classes live here, in Python, and the Rust core raises them by name: so they have docstrings, pickle
like any exception and are caught without importing the extension. Each is made from one message, which says
what happened with the numbers, what is safe and what to do; ``str(error)`` is that message.

``exit_code`` is what the command line ends with when the error reaches it:

====  ==================================================================
code  meaning
====  ==================================================================
   0  done
   1  a bug in megatrain-io or in the code that calls it: please report it
   2  usage or configuration
   3  does not fit: RAM, VRAM or disk
   4  environment or storage: nothing is damaged
   5  data or model files
   6  the store is corrupt, or stopped after a failure
   7  training diverged
 130  interrupted; the run can be resumed
====  ==================================================================
"""

from typing import ClassVar

__all__ = [
    "BufferInUseError",
    "ConfigError",
    "CorruptionError",
    "DataError",
    "DoesNotFitError",
    "FormatError",
    "InterruptedRunError",
    "MegatrainIoError",
    "ModelFilesError",
    "NoSpaceError",
    "NotFiniteError",
    "PoolExhaustedError",
    "StorageError",
    "StoreFailedError",
    "StoreInUseError",
    "TrainingDivergedError",
    "UnsupportedError",
    "UnsupportedModelError",
    "UsedAfterForkError",
    "WearLimitError",
]


class MegatrainIoError(Exception):
    """The parent of all the others: catch it to catch whatever megatrain-io raises on purpose.

    Raised itself only for a call that contradicts the schedule or the store's layout, which is a bug.
    The store is as the last commit left it.
    """

    exit_code: ClassVar[int] = 1


class ConfigError(MegatrainIoError, ValueError):
    """An option is unknown, misspelt, of the wrong type, or contradicts another one.

    Raised before anything is read or written. Correct the option that the message names.
    """

    exit_code: ClassVar[int] = 2


class DoesNotFitError(ConfigError):
    """A run needs more RAM, VRAM or disk than there is.

    Raised before anything is read or written. The message has both numbers, and the settings nearest to these
    that fit, where there are any.

    Attributes:
        least: bytes of RAM that are enough, where RAM is what is too little and that is known.
    """

    exit_code: ClassVar[int] = 3
    least: int | None = None


class DataError(MegatrainIoError, ValueError):
    """The training data cannot be used: an unknown format, a broken line, nothing left to train on.

    The store is untouched. Correct the file and line that the message names.
    """

    exit_code: ClassVar[int] = 5


class ModelFilesError(MegatrainIoError, ValueError):
    """A model folder or file is incomplete, damaged, or in a format that is not read (such as pickle).

    The files are never changed, and an import that fails leaves no store behind. Fetch the file that the
    message names again.
    """

    exit_code: ClassVar[int] = 5


class UnsupportedModelError(MegatrainIoError, ValueError):
    """The model is sound, but it cannot be trained block by block, or its weights are quantised.

    Nothing was written. Name the list of blocks by hand if the message offers it, or choose another model.
    """

    exit_code: ClassVar[int] = 5


class StorageError(MegatrainIoError, OSError):
    """The operating system refused or failed an operation on the store.

    The last committed step is safe. Look at the drive and the system's log, then open the store again.
    """

    exit_code: ClassVar[int] = 4


class NoSpaceError(StorageError):
    """The disk has not enough room.

    Space for a store is reserved when it is made, so this comes before training and leaves nothing behind.
    Free as much as the message says, or choose another disk.
    """

    exit_code: ClassVar[int] = 3


class StoreInUseError(StorageError):
    """Another process holds the store.

    Nothing was read or written. Stop the process that the message names, or use another store.
    """


class FormatError(StorageError):
    """The file is not a store, or one that this version cannot read or must not write.

    Nothing was changed. Use the version that made it, or import the model again.
    """


class CorruptionError(StorageError):
    """Bytes read from the store are not the bytes that were written to it: their checksum differs.

    The bytes were not used and nothing was overwritten. Copy the store elsewhere, check the drive, then
    restore a copy or import an export again.
    """

    exit_code: ClassVar[int] = 6


class StoreFailedError(StorageError):
    """The store stopped after an earlier failure, which the message names, and takes no more calls.

    After a failed write nobody knows what is on the drive, so it is never tried again. The last committed
    step is safe: opening the store anew verifies it.
    """

    exit_code: ClassVar[int] = 6


class BufferInUseError(MegatrainIoError, BufferError):
    """A buffer was to be refilled or written back while tensors over it were alive.

    The buffer still holds its bytes and the tensors stay valid. Drop every tensor and view over it first.
    """


class PoolExhaustedError(MegatrainIoError, TimeoutError):
    """No slot of the pool came free in time, or a tensor does not fit what is free of a store's memory.

    Neither grows. The store is as the last commit left it. Give slots or tensors back sooner, or raise the RAM
    budget or the store's memory.
    """

    exit_code: ClassVar[int] = 3


class UsedAfterForkError(MegatrainIoError, RuntimeError):
    """A forked process used a store that its parent opened.

    The parent's store is unharmed. Start workers with ``spawn``, or open the store in the child.
    """


class UnsupportedError(MegatrainIoError, RuntimeError):
    """The machine, the kernel or an installed package lacks something that was asked for by name.

    Nothing was written. The message says what is missing and which option does without it.
    """

    exit_code: ClassVar[int] = 4


class TrainingDivergedError(MegatrainIoError):
    """The loss or a gradient became infinite or not a number.

    The step was dropped; the store holds the last commit. Lower the learning rate or look at the batch that
    the message names, then resume.
    """

    exit_code: ClassVar[int] = 7


class NotFiniteError(TrainingDivergedError):
    """A gradient has an element that is infinite or not a number.

    The step was dropped; the store holds the last commit. ``train`` skips such a step, as the usual rule is, and
    ends with a ``TrainingDivergedError`` when several follow one another.

    Attributes:
        loss: of the step, where it was known.
    """

    loss: float | None = None


class InterruptedRunError(MegatrainIoError):
    """The run was asked to stop (Ctrl-C, SIGTERM, SIGHUP or SIGUSR1) and did so at a commit.

    Everything up to the step that the message names is safe. Resume to go on from it, with the same bits.
    """

    exit_code: ClassVar[int] = 130


class WearLimitError(InterruptedRunError):
    """One more step would write more to the drive than ``memory.max_tbw`` allows.

    The run stands at a commit. Raise the limit and resume to go on from it, with the same bits.
    """
