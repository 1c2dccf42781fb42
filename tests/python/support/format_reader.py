"""A reader of stores, written from docs/format.md alone: it shares no code with the package.

Slow and whole in RAM, for small stores. Whatever the document leaves out, this cannot read.
"""

import json
import math
import struct
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

PAGE, MIB = 4096, 1 << 20
PLANES = {
    "bf16": [[("weight", 2)], [("remainder", 2), ("exp_avg", 4), ("exp_avg_sq", 4)]],
    "f32": [[("weight", 4)], [("exp_avg", 4), ("exp_avg_sq", 4)]],
    "raw8": [[("weight", 1)], []],
    "raw16": [[("weight", 2)], []],
    "raw32": [[("weight", 4)], []],
}


@cache
def _crc_table(polynomial: int) -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (polynomial if value & 1 else 0)  # noqa: PLW2901
        table.append(value)
    return table


def _crc(content: bytes, polynomial: int, bits: int) -> int:
    table, total = _crc_table(polynomial), (1 << bits) - 1
    for byte in content:
        total = total >> 8 ^ table[(total ^ byte) & 0xFF]
    return total ^ ((1 << bits) - 1)


def crc32c(content: bytes) -> int:
    return _crc(content, 0x82F63B78, 32)


def crc64_nvme(content: bytes) -> int:
    return _crc(content, 0x9A6C9329AC4BC9B5, 64)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Chunk:
    record: int
    start: int
    parameters: int
    format: str
    drive: int = 0
    offsets: tuple[int, int] = (0, 0)

    def stored(self, group: int, planes: int) -> int:
        return _up(self.parameters * sum(width for _, width in PLANES[self.format][group][:planes]), PAGE)

    def extent(self, group: int) -> int:
        return self.stored(group, 3)


class StoreReader:
    """The state of a store that counts; every checksum on the way is compared."""

    def __init__(self, *paths: Path) -> None:
        self.files = [path.read_bytes() for path in paths]
        header = self._sealed(0, b"MTIOSTOR")
        self.uuid = header[44:60]
        self.minor = struct.unpack_from("<I", header, 16)[0]
        assert self.minor in {3, 4}
        for drive, content in enumerate(self.files):
            own = self._sealed(0, b"MTIOSTOR", drive)
            assert own == self._sealed(512 << 10, b"MTIOSTOR", drive)
            assert struct.unpack_from("<III", own, 8) == (0x01020304, 0, self.minor)
            assert struct.unpack_from("<II", own, 76) == (drive, len(paths))
            assert (own[44:76], own[84:176]) == (header[44:76], header[84:176])
            assert header_u64(own, 176) == len(content)
        manifest_at, manifest_bytes, manifest_crc = struct.unpack_from("<QQQ", header, 104)
        self.tables = struct.unpack_from("<QQ", header, 128)
        self.blobs = struct.unpack_from("<QQ", header, 152)
        self.table_bytes, self.data = header_u64(header, 144), header_u64(header, 168)
        text = self._at(manifest_at, manifest_bytes)
        assert crc64_nvme(text) == manifest_crc
        self.manifest = json.loads(text)
        assert self.manifest["drives"] == len(paths)
        self.chunks, self.copy_bytes = self._lay_out()
        found = [self._superblock(side, manifest_crc) for side in (0, 1)]
        superblocks = sorted((s for s in found if s is not None), key=lambda s: -header_u64(s, 24))
        superblock = next(s for s in superblocks if self._holds(s))
        self.generation = header_u64(superblock, 24)
        side = self.generation & 1
        self.blob = self._at(self.blobs[side], header_u64(superblock, 64))
        self._table = self._at(self.tables[side], self.table_bytes)
        marker = self._at(2 * MIB + (512 << 10), PAGE)
        self.is_clean = marker[8:40] == superblock[8:40] and marker[:8] == b"MTIOCLEN"
        self._sums_at = self._sum_places()

    def _at(self, offset: int, count: int, drive: int = 0) -> bytes:
        assert offset + count <= len(self.files[drive])
        return self.files[drive][offset : offset + count]

    def _sealed(self, offset: int, magic: bytes, drive: int = 0) -> bytes | None:
        page = self._at(offset, PAGE, drive)
        holds = page[:8] == magic and crc32c(page[:-4]) == int.from_bytes(page[-4:], "little")
        return page if holds else None

    def _superblock(self, side: int, manifest_crc: int) -> bytes | None:
        pages = [self._sealed((1 + side) * MIB + mirror, b"MTIOSUPR") for mirror in (0, 64 << 10)]
        held = [
            page
            for page in pages
            if page is not None
            and page[8:24] == self.uuid
            and header_u64(page, 80) == manifest_crc
            and header_u64(page, 24) & 1 == side
        ]
        return max(held, key=lambda page: header_u64(page, 24), default=None)

    def _holds(self, superblock: bytes) -> bool:
        side = header_u64(superblock, 24) & 1
        table = self._at(self.tables[side], self.table_bytes)
        blob = self._at(self.blobs[side], header_u64(superblock, 64))
        return (crc64_nvme(table), crc64_nvme(blob)) == (
            header_u64(superblock, 56),
            header_u64(superblock, 72),
        )

    def _lay_out(self) -> tuple[list[Chunk], list[int]]:
        drives = self.manifest["drives"]
        chunks, areas = [], {(drive, trained): 0 for drive in range(drives) for trained in (True, False)}
        for index, record in enumerate(self.manifest["records"]):
            size = self.manifest["chunk_parameters"]
            starts = range(0, record["parameters"], size)
            cut = [
                Chunk(
                    index,
                    s,
                    min(size, record["parameters"] - s),
                    record["format"],
                    (len(chunks) + n) % drives,
                )
                for n, s in enumerate(starts)
            ]
            trained = self._is_rewritable(record["format"])
            places: list[list[int]] = [[], []]
            for group in (0, 1):
                for chunk in cut:
                    places[group].append(areas[chunk.drive, trained])
                    areas[chunk.drive, trained] += chunk.extent(group)
            chunks += [
                replace(chunk, offsets=offsets)
                for chunk, offsets in zip(cut, zip(*places, strict=True), strict=True)
            ]
        return chunks, [_up(areas[drive, True], 2 * MIB) for drive in range(drives)]

    def _is_rewritable(self, state_format: str) -> bool:
        return bool(PLANES[state_format][1]) or self.manifest.get("content") == "tensors"

    def _sum_places(self) -> list[int]:
        at, places = 16 * 2 * len(self.chunks), []
        for chunk in self.chunks:
            for group in (0, 1):
                places.append(at)
                at += 4 * -(-chunk.extent(group) // MIB)
        return places

    @property
    def updates(self) -> list[int]:
        """How often each chunk was updated; 0 for all in a store of format 0.3."""
        entries = range(2 * len(self.chunks))
        counts = [struct.unpack_from("<HI", self._table, 16 * entry + 10) for entry in entries]
        assert all(reserved == 0 for reserved, _ in counts)
        assert not any(count for _, count in counts[::2])
        return [count for _, count in counts[1::2]]

    def group(self, chunk_index: int, group: int) -> bytes:
        """The whole extent of a chunk's plane group, verified; what was never written is zero."""
        chunk = self.chunks[chunk_index]
        entry = 2 * chunk_index + group
        generation, copy, planes = struct.unpack_from("<QBB", self._table, 16 * entry)
        assert generation <= self.generation
        copies = 1 if self.manifest.get("durability") == "scratch" else 2
        copy_bytes = self.copy_bytes[chunk.drive]
        area = copy * copy_bytes if self._is_rewritable(chunk.format) else copies * copy_bytes
        place = self.data + area + chunk.offsets[group]
        content = self._at(place, chunk.stored(group, planes), chunk.drive)
        for unit in range(-(-len(content) // MIB)):
            prefix = struct.pack("<16sIB3xQQ", self.uuid, chunk_index, group, generation, unit)
            found = crc32c(prefix + content[unit * MIB : (unit + 1) * MIB])
            assert found == struct.unpack_from("<I", self._table, self._sums_at[entry] + 4 * unit)[0]
        return content.ljust(chunk.extent(group), b"\0")

    def plane(self, tensor: str, plane: str) -> bytes:
        """All bytes of one plane of one tensor."""
        place = next(t for t in self.manifest["tensors"] if t["name"] == tensor)
        start, count = place["offset"], math.prod(place["shape"])
        out = b""
        for index, chunk in enumerate(self.chunks):
            if chunk.record != place["record"]:
                continue
            group = 0 if plane == "weight" else 1
            at = 0
            for name, width in PLANES[chunk.format][group]:
                if name == plane:
                    first, last = (
                        min(max(p - chunk.start, 0), chunk.parameters) for p in (start, start + count)
                    )
                    out += self.group(index, group)[at + first * width : at + last * width]
                at += chunk.parameters * width
        return out


def header_u64(page: bytes, offset: int) -> int:
    return struct.unpack_from("<Q", page, offset)[0]
