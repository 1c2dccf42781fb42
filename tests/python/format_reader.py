"""A reader of stores, written from docs/format.md alone: it shares no code with the package.

Slow and whole in RAM, for small stores. Whatever the document leaves out, this cannot read.
"""

import json
import math
import struct
from dataclasses import dataclass
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
    offsets: tuple[int, int]

    def stored(self, group: int, planes: int) -> int:
        return _up(self.parameters * sum(width for _, width in PLANES[self.format][group][:planes]), PAGE)

    def extent(self, group: int) -> int:
        return self.stored(group, 3)


class StoreReader:
    """The state of a store that counts; every checksum on the way is compared."""

    def __init__(self, path: Path) -> None:
        self.bytes = path.read_bytes()
        header = self._sealed(0, b"MTIOSTOR")
        assert header == self._sealed(512 << 10, b"MTIOSTOR")
        assert struct.unpack_from("<III", header, 8) == (0x01020304, 0, 3)
        self.uuid = header[44:60]
        manifest_at, manifest_bytes, manifest_crc = struct.unpack_from("<QQQ", header, 104)
        self.tables = struct.unpack_from("<QQ", header, 128)
        self.blobs = struct.unpack_from("<QQ", header, 152)
        self.table_bytes, self.data = header_u64(header, 144), header_u64(header, 168)
        assert header_u64(header, 176) == len(self.bytes)
        text = self.bytes[manifest_at : manifest_at + manifest_bytes]
        assert crc64_nvme(text) == manifest_crc
        self.manifest = json.loads(text)
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

    def _at(self, offset: int, count: int) -> bytes:
        assert offset + count <= len(self.bytes)
        return self.bytes[offset : offset + count]

    def _sealed(self, offset: int, magic: bytes) -> bytes | None:
        page = self._at(offset, PAGE)
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

    def _lay_out(self) -> tuple[list[Chunk], int]:
        chunks, areas = [], {True: 0, False: 0}
        for index, record in enumerate(self.manifest["records"]):
            size = self.manifest["chunk_parameters"]
            starts = range(0, record["parameters"], size)
            cut = [
                Chunk(index, s, min(size, record["parameters"] - s), record["format"], (0, 0)) for s in starts
            ]
            trained = self._is_rewritable(record["format"])
            places: list[list[int]] = [[], []]
            for group in (0, 1):
                for chunk in cut:
                    places[group].append(areas[trained])
                    areas[trained] += chunk.extent(group)
            chunks += [
                Chunk(c.record, c.start, c.parameters, c.format, offsets)
                for c, offsets in zip(cut, zip(*places, strict=True), strict=True)
            ]
        return chunks, _up(areas[True], 2 * MIB)

    def _is_rewritable(self, state_format: str) -> bool:
        return bool(PLANES[state_format][1]) or self.manifest.get("content") == "tensors"

    def _sum_places(self) -> list[int]:
        at, places = 16 * 2 * len(self.chunks), []
        for chunk in self.chunks:
            for group in (0, 1):
                places.append(at)
                at += 4 * -(-chunk.extent(group) // MIB)
        return places

    def group(self, chunk_index: int, group: int) -> bytes:
        """The whole extent of a chunk's plane group, verified; what was never written is zero."""
        chunk = self.chunks[chunk_index]
        entry = 2 * chunk_index + group
        generation, copy, planes = struct.unpack_from("<QBB", self._table, 16 * entry)
        assert generation <= self.generation
        copies = 1 if self.manifest.get("durability") == "scratch" else 2
        area = copy * self.copy_bytes if self._is_rewritable(chunk.format) else copies * self.copy_bytes
        content = self._at(self.data + area + chunk.offsets[group], chunk.stored(group, planes))
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
