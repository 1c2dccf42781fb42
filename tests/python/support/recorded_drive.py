"""A drive that records what is written to it and when it is flushed, so that a test can cut its power at any moment.

The drive is an image file behind a file system in user space of one file, and a loop device on top of that. Run as a
script this is the server of that file system; it speaks the kernel's own protocol (<linux/fuse.h>), version 7.31, and
does one request after the other. Marks that are written to a second file stand in the record at their place.
"""

import ctypes
import errno
import os
import random
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from filesystems import Volume, is_mounted, told

SECTOR = 512
_HEADER = struct.Struct("<cQI")
_WRITE, _FLUSH, _MARK = b"w", b"f", b"m"


@dataclass(frozen=True)
class Record:
    """A write with its place, a flush, or a mark."""

    kind: bytes
    offset: int
    data: bytes


@contextmanager
def recorded_volume(kind: str, folder: Path, nbytes: int) -> Iterator[tuple[Volume, "Recording"]]:
    """An empty file system on a drive that records from its mounting on."""
    if os.geteuid() != 0:
        pytest.skip(
            "only root may mount: run this file as root to see power cuts of whole file systems tried"
        )
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not Path(device).exists():
            pytest.skip(f"the kernel has no {device} here")
    plain = Volume(kind, folder / "drive", folder / "mounted")
    plain.make(nbytes)
    plain.folder.mkdir()
    recording = Recording(folder / "before", folder / "record", folder / "marks")
    told("cp", "--sparse=always", plain.image, recording.before)
    with _served(plain.image, recording.path, folder / "served") as served:
        recording.marks = served / "marks"
        volume = Volume(kind, served / "drive", plain.folder)
        try:
            volume.mount()
            yield volume, recording
            volume.unmount()
        finally:
            volume.tear_down()


@contextmanager
def _served(image: Path, record: Path, folder: Path) -> Iterator[Path]:
    """The folder in which the image is served, by a process of its own."""
    folder.mkdir()
    command = [sys.executable, __file__, str(image), str(record), str(folder)]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ.get("PATH", "")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        said = server.stdout.readline().strip()
        if said != "ready":
            pytest.skip(f"a file system in user space is refused here, as in many containers: {said}")
        try:
            yield folder
        finally:
            if is_mounted(folder):
                subprocess.run(["umount", "--lazy", folder], check=True)  # noqa: S607
            server.wait()


@dataclass
class Recording:
    """What a drive was told, and images of it as a power cut may leave them.

    Attributes:
        before: the image before the first write.
        path: the record.
        marks: file to which marks are written.
    """

    before: Path
    path: Path
    marks: Path

    def mark(self, text: str) -> None:
        """Put a mark into the record, behind all that was written before."""
        descriptor = os.open(self.marks, os.O_WRONLY)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def records(self) -> list[Record]:
        """All that was recorded, in order."""
        content, found, at = self.path.read_bytes(), [], 0
        while at < len(content):
            kind, offset, nbytes = _HEADER.unpack_from(content, at)
            at += _HEADER.size
            found.append(Record(kind, offset, content[at : at + nbytes]))
            at += nbytes
        return found

    def cuts(self, count: int, seed: int, folder: Path) -> Iterator[tuple[Path, list[str], str]]:
        """Images after power cuts at random moments, the marks that stood before each, and what was kept.

        A write that a flush covers is there. Of the later ones all are there, or none, or any sectors of any of them.
        """
        records, chance = self.records(), random.Random(seed)
        # Half of them where something has just become durable, and what belongs to it perhaps not: a sweep over these.
        flushes = [number for number, record in enumerate(records, 1) if record.kind == _FLUSH]
        first, step = chance.random(), len(flushes) / max(1, count // 2)
        moments = [flushes[int((first + number) * step)] for number in range(count // 2)]
        moments = sorted(
            [*moments, *(chance.randrange(1, len(records) + 1) for _ in range(count - len(moments)))]
        )
        durable, done, pending, marks = folder / "durable", 0, [], []
        told("cp", "--sparse=always", self.before, durable)
        for number, moment in enumerate(moments):
            for record in records[done:moment]:
                if record.kind == _WRITE:
                    pending.append(record)
                elif record.kind == _FLUSH:
                    _apply(durable, pending)
                    pending = []
                else:
                    marks.append(record.data.decode())
            done = moment
            share = chance.choice([1.0, 0.0, chance.random()])
            image = folder / f"cut{number}"
            told("cp", "--sparse=always", durable, image)
            _apply(image, [part for record in pending for part in _kept(record, share, chance)])
            yield (
                image,
                list(marks),
                f"cut {number} of seed {seed}: request {moment} of {len(records)}, {share:.2f}",
            )
            image.unlink()


def _kept(record: Record, share: float, chance: random.Random) -> Iterator[Record]:
    """The sectors of a write that got to the drive."""
    if share in {0.0, 1.0}:
        yield from [record] * int(share)
        return
    is_torn = chance.random() < 0.2
    if not is_torn and chance.random() < share:
        yield record
    for start in range(0, len(record.data), SECTOR) if is_torn else ():
        if chance.random() < share:
            yield Record(_WRITE, record.offset + start, record.data[start : start + SECTOR])


def _apply(image: Path, records: list[Record]) -> None:
    with image.open("r+b") as file:
        for record in records:
            os.pwrite(file.fileno(), record.data, record.offset)


# ---------------------------------------------------------------------------------------------- the server

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_FORGET, _GETATTR, _SETATTR, _LOOKUP = 2, 3, 4, 1
_OPEN, _READ, _WRITE_CALL, _STATFS, _RELEASE, _FSYNC, _FLUSH_CALL = 14, 15, 16, 17, 18, 20, 25
_INIT, _OPENDIR, _RELEASEDIR, _FSYNCDIR, _INTERRUPT, _DESTROY, _BATCH_FORGET = 26, 27, 29, 30, 36, 38, 42
_ROOT, _DRIVE, _MARKS = 1, 2, 3
_MAX_WRITE = 1 << 20
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
_FOREVER = 1 << 30


class _Server:
    """Answers the kernel's requests for a folder of two files: the drive, and marks."""

    def __init__(self, device: int, image: int, record: int) -> None:
        self._device, self._image, self._record = device, image, record

    def run(self) -> None:
        """Answer until the folder is unmounted."""
        while True:
            try:
                request = os.read(self._device, _MAX_WRITE + (1 << 16))
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                raise
            _, call, unique, node, *_ = _IN.unpack_from(request)
            if call in {_FORGET, _BATCH_FORGET, _INTERRUPT}:
                continue
            answer = self._answer(call, node, request[_IN.size :])
            failed = answer if isinstance(answer, int) else 0
            body = b"" if isinstance(answer, int) else answer
            os.write(self._device, _OUT.pack(_OUT.size + len(body), -failed, unique) + body)

    def _answer(self, call: int, node: int, body: bytes) -> bytes | int:
        """The body of an answer, or the number of an error."""
        done = {_RELEASE, _FLUSH_CALL, _RELEASEDIR, _FSYNCDIR, _DESTROY}
        answers = {
            _INIT: self._start,
            _LOOKUP: lambda: self._child(body),
            _GETATTR: lambda: struct.pack("<QII", _FOREVER, 0, 0) + self._attributes(node),
            _SETATTR: lambda: struct.pack("<QII", _FOREVER, 0, 0) + self._attributes(node),
            _OPEN: lambda: struct.pack("<QIi", 0, int(node == _MARKS), 0),  # marks are not cached
            _OPENDIR: lambda: struct.pack("<QIi", 0, 0, 0),
            _READ: lambda: self._read(node, body),
            _WRITE_CALL: lambda: self._written(node, body),
            _FSYNC: lambda: self._log(_FLUSH, 0, b""),
            _STATFS: lambda: struct.pack("<QQQQQIIII", 0, 0, 0, 2, 0, 4096, 255, 4096, 0).ljust(80, b"\0"),
            **dict.fromkeys(done, lambda: b""),
        }
        return answers.get(call, lambda: errno.ENOSYS)()

    def _start(self) -> bytes:
        flags = _BIG_WRITES | _MAX_PAGES
        return struct.pack("<IIIIHHIIHHI", 7, 31, 1 << 17, flags, 16, 12, _MAX_WRITE, 1, 256, 0, 0).ljust(
            64, b"\0"
        )

    def _child(self, name: bytes) -> bytes | int:
        child = {b"drive": _DRIVE, b"marks": _MARKS}.get(name.rstrip(b"\0"))
        if child is None:
            return errno.ENOENT
        return struct.pack("<QQQQII", child, 0, _FOREVER, _FOREVER, 0, 0) + self._attributes(child)

    def _read(self, node: int, body: bytes) -> bytes:
        _, offset, nbytes = struct.unpack_from("<QQI", body)
        return os.pread(self._image, nbytes, offset) if node == _DRIVE else b""

    def _written(self, node: int, body: bytes) -> bytes:
        _, offset, nbytes = struct.unpack_from("<QQI", body)
        data = body[40 : 40 + nbytes]
        if node == _DRIVE:
            self._log(_WRITE, offset, data)
            os.pwrite(self._image, data, offset)
        else:
            self._log(_MARK, 0, data)
        return struct.pack("<II", nbytes, 0)

    def _attributes(self, node: int) -> bytes:
        size = os.fstat(self._image).st_size if node == _DRIVE else 0
        kind = stat.S_IFDIR | 0o700 if node == _ROOT else stat.S_IFREG | 0o600
        return _ATTRIBUTES.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, kind, 1, 0, 0, 0, 4096, 0)

    def _log(self, kind: bytes, offset: int, data: bytes) -> bytes:
        os.writev(self._record, [_HEADER.pack(kind, offset, len(data)), data])
        return b""


def serve(image: str, record: str, folder: str) -> None:
    """Mount the folder, say that it is ready, and answer until it is unmounted."""
    device = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    if libc.mount(b"recorded", folder.encode(), b"fuse", 0, options.encode()) != 0:
        print(os.strerror(ctypes.get_errno()), flush=True)  # noqa: T201 - read by who started this
        return
    print("ready", flush=True)  # noqa: T201
    log = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    _Server(device, os.open(image, os.O_RDWR), log).run()


if __name__ == "__main__":
    serve(*sys.argv[1:])
