"""File systems in image files: made, loop-mounted, failing and mended. Run as a script it trains, paced by its input.

A test that needs one is skipped with a sentence where root, loop devices or a tool are missing.
"""

import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

MIB = 1 << 20
KINDS = ("ext4", "xfs", "btrfs")
DRIVES = "MEGATRAIN_TEST_DRIVES"
# By these torch leaves instructions of the CPU alone: both sides of a comparison must.
MASKS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
# Where mkfs is to be found: the folders that root has and a virtual environment may have not.
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])
PACKAGES = {
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "btrfs": "btrfs-progs",
}
# Of <linux/fs.h>: the clone of a file, its flags, and the end of all I/O without a flush of the log.
FICLONE, FS_IOC_GETFLAGS, FS_NOCOW_FL = 0x40049409, 0x80086601, 0x00800000
FS_IOC_SHUTDOWN, WITHOUT_FLUSHING_THE_LOG = 0x8004587D, 2


def tool(name: str) -> str:
    """The path of a program; without it the test is skipped."""
    path = shutil.which(name, path=SEARCH)
    if path is None:
        pytest.skip(f"{name} is not installed: it comes with the package {PACKAGES.get(name, 'util-linux')}")
    return path


def told(*command: str | Path) -> str:
    """What a system's tool prints; its own words where it fails."""
    done = subprocess.run([tool(str(command[0])), *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr.strip()}"
    return done.stdout


def or_skip(what: str, *command: str | Path) -> str:
    """The same for what a container may refuse."""
    try:
        return told(*command)
    except AssertionError as error:
        pytest.skip(f"{what} refused here, as in many containers: {error}")


def is_mounted(folder: Path) -> bool:
    """By the kernel's own list: a folder on a failed drive cannot even be looked at."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(folder) for line in lines)


def shut_down(folder: Path) -> None:
    """Fail all I/O of a file system from now on; what it had not written and flushed is lost. Not on btrfs."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", WITHOUT_FLUSHING_THE_LOG))
    finally:
        os.close(descriptor)


@dataclass
class Volume:
    """A file system in an image file, and the folder where it is mounted."""

    kind: str
    image: Path
    folder: Path
    device: str | None = None

    def make(self, nbytes: int) -> None:
        """An empty file system in a sparse file."""
        program = tool(f"mkfs.{self.kind}")
        with self.image.open("xb") as file:
            file.truncate(nbytes)
        told(program, "-q", "-F" if self.kind == "ext4" else "-f", self.image)

    def mount(self, options: str = "rw") -> None:
        """Mount it; the journal is replayed if the last stop was not clean."""
        self.device = or_skip("a loop device is", "losetup", "--find", "--show", self.image).strip()
        or_skip("mounting is", "mount", "-t", self.kind, "-o", options, self.device, self.folder)

    def unmount(self) -> None:
        """Undo `mount`, as far as it came; a file that is still open there is an error."""
        if is_mounted(self.folder):
            told("umount", self.folder)
        self.detach()

    def detach(self) -> None:
        """Give the loop device back."""
        if self.device is not None:
            device, self.device = self.device, None
            if self.kind == "btrfs":
                # Else the next image with the same id is taken for a stale copy of this one.
                told("btrfs", "device", "scan", "--forget", device)
            told("losetup", "--detach", device)

    def tear_down(self) -> None:
        """Whatever a failed test left behind."""
        while is_mounted(self.folder):
            subprocess.run([tool("umount"), "--lazy", self.folder], check=True)
        if self.device is not None:
            subprocess.run([tool("losetup"), "--detach", self.device], check=False)

    def writes(self) -> int:
        """How many writes the device has completed since it was made."""
        assert self.device is not None
        return int(Path("/sys/block", Path(self.device).name, "stat").read_text().split()[4])


@contextmanager
def new_volume(kind: str, image: Path, nbytes: int, options: str = "rw") -> Iterator[Volume]:
    """An empty file system, mounted beside its image and gone in the end."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount: run this file as root to see the file systems tried")
    if not Path("/dev/loop-control").exists():
        pytest.skip("the kernel has no loop devices here (/dev/loop-control is missing)")
    volume = Volume(kind, image, image.with_suffix(".mounted"))
    volume.make(nbytes)
    volume.folder.mkdir()
    try:
        volume.mount(options)
        yield volume
        volume.unmount()
    finally:
        volume.tear_down()


@contextmanager
def new_tmpfs(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system without a drive."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount: run this file as root to see tmpfs tried")
    folder.mkdir()
    or_skip("mounting is", "mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", folder)
    try:
        yield folder
    finally:
        told("umount", folder)


class Drive:
    """A drive with a volatile write cache: an image file on an XFS of its own, beneath the file system to test.

    The loop device writes into the page cache of that XFS, and a flush by the file system above is an `fsync` of
    the image. So there are two kinds of power cut, and one failure:

    * `snapshot` clones the image. XFS holds the image's lock for that, against which every request of the loop
      device writes, and waits for direct ones: the clone is the image between two requests, whatever is going on.
      All requests completed before it are in it, none begun after it: a cut of a drive whose cache loses nothing.
    * `fail` shuts the XFS down, whereupon each read and write of the device above ends with EIO, and what was
      written and not flushed never gets to the XFS's own image.
    * `power_on` after it is the other cut: only what was flushed is there (and what XFS wrote back by itself).
    """

    def __init__(self, below: Volume) -> None:
        self.below = below

    @property
    def folder(self) -> Path:
        """Where images go."""
        return self.below.folder

    def snapshot(self, image: Path, name: str) -> Path:
        """A clone of an image, durable."""
        copy = self.folder / name
        with image.open("rb") as source, copy.open("xb") as target:
            fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
            os.fsync(target.fileno())
        return copy

    def fail(self) -> None:
        """Every I/O of the devices above fails with EIO from now on."""
        shut_down(self.folder)

    def power_on(self) -> None:
        """Come back with what was flushed; nothing above may be mounted any more."""
        self.below.unmount()
        self.below.mount()


@contextmanager
def new_drive(folder: Path) -> Iterator[Drive]:
    """A drive with room for an image of each kind and clones of it; sparse, most of it is never written."""
    with new_volume("xfs", folder / "drive.img", 2048 * MIB) as below:
        yield Drive(below)


def fill(folder: Path, leave: int = 0) -> None:
    """Take all the room there is but for `leave` bytes, to the last block."""
    stat = os.statvfs(folder)
    piece = max(0, stat.f_bavail * stat.f_frsize - leave)
    with (folder / "filler").open("xb") as file:
        end = 0
        while piece >= stat.f_bsize:
            try:
                os.posix_fallocate(file.fileno(), end, piece)
                end += piece
            except OSError:
                piece //= 2
                continue
            if leave:
                break


def is_nocow(path: Path) -> bool:
    """Whether btrfs overwrites the file in place."""
    with path.open("rb") as file:
        flags = fcntl.ioctl(file.fileno(), FS_IOC_GETFLAGS, bytes(8))
    return bool(int.from_bytes(flags[:4], "little") & FS_NOCOW_FL)


def train_as_told(steps: int) -> None:
    """For each line of input a store; a step of it for each byte that follows, and a byte out when it is durable."""
    import torch

    from megatrain_io.errors import MegatrainIoError
    from paged import Case, opened, train

    torch.set_num_threads(1)
    case = paced_case(Case, steps)
    # Steps that the last store failed to take come before the next line.
    while store := sys.stdin.buffer.raw.readline().decode().strip(".\n"):
        with suppress(MegatrainIoError), opened(Path(store), case) as model:
            for step in range(1, steps + 1):
                os.read(0, 1)
                train(model, case, stop=step)
                os.write(1, b".")
        os.write(1, b"!")


def paced_case(case_type, steps: int):
    """What both sides of a paced training train."""
    import torch

    layers = {"num_hidden_layers": 2}
    return case_type(tied=True, dtype=torch.bfloat16, counts=(1,) * steps, overrides=layers)


class PacedTraining:
    """A process that trains one store after the other, each as many steps as it is given."""

    def __init__(self, steps: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: os.environ[name] for name in MASKS if name in os.environ}
            | {
                "PYTHONPATH": os.pathsep.join(sys.path),
                "PATH": "",
                "OMP_NUM_THREADS": "1",
                DRIVES: os.environ.get(DRIVES, "1"),
            },
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._durable = 0
        self._is_over = True

    def begin(self, store: Path) -> None:
        """Open a store; no step yet."""
        assert self._is_over
        self._durable, self._is_over = 0, False
        os.write(self._stdin, f"{store}\n".encode())

    def give(self, steps: int) -> None:
        """Let it take so many steps more."""
        os.write(self._stdin, b"." * steps)

    def durable(self) -> int:
        """The last step that it has said to be durable."""
        os.set_blocking(self._stdout, False)
        with suppress(BlockingIOError):
            self._take()
        return self._durable

    def wait_for(self, step: int) -> None:
        """Wait until it has said so of `step`."""
        os.set_blocking(self._stdout, True)
        while self._durable < step and not self._is_over:
            self._take()
        assert self._durable >= step, f"the training ended after step {self._durable}"

    def end(self) -> int:
        """Wait until it has met the failure of its drive; the last step that it said to be durable."""
        self.give(1)  # in case that it waits for leave
        os.set_blocking(self._stdout, True)
        while not self._is_over:
            self._take()
        return self._durable

    def _take(self) -> None:
        said = os.read(self._stdout, 64)
        self._durable += said.count(b".")
        self._is_over = not said or b"!" in said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()


if __name__ == "__main__":
    train_as_told(int(sys.argv[1]))
