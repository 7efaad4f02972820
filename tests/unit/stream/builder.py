# SPDX-License-Identifier: Apache-2.0
"""Builds migration streams as QEMU sends them: by hand for tests, large ones for benchmarks."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from struct import pack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nova_dmigrate.stream import records
from nova_dmigrate.stream.elements import Buffer

PAGE = 4096
BLOCKS = (("pc.ram", 64 << 20), ("/rom@etc/acpi/tables", 128 << 10), ("pc.bios", 256 << 10))
DEVICES = (
    b"\x04" + pack(">I", 7) + b"\x05timer" + pack(">II", 0, 2) + b"\x02\x08\x7e" * 9
    + b"\x7e" + pack(">I", 7) + b"\x00\x06" + pack(">I", 2) + b"{}"
)  # fmt: skip

_POOL_PAGES = 256


@lru_cache(maxsize=4)
def _pool(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(1, 256, (_POOL_PAGES, PAGE), dtype=np.uint8)


def page_contents(numbers: ArrayLike, seed: int = 0) -> NDArray[np.uint8]:
    """Pages that do not compress, as a function of their numbers and the seed; no two are alike.

    :returns: (n, 4096) uint8
    """
    index = np.asarray(numbers, dtype=np.uint64)
    pages = np.take(_pool(seed), (index % _POOL_PAGES).astype(np.intp), axis=0)
    marks = pages[:, :16].view(np.uint64)
    marks[:, 0] = index
    marks[:, 1] = seed + 1
    return pages


class StreamBuilder:
    """Appends to a stream; it names blocks where QEMU would, or where it is told to."""

    def __init__(
        self,
        blocks: Sequence[tuple[str, int]] = BLOCKS,
        *,
        section_id: int = 2,
        footers: bool = True,
    ) -> None:
        self.blocks = tuple(blocks)
        self.section_id = section_id
        self.footers = footers
        self.last_block: int | None = None
        self._parts: list[Buffer] = []

    def raw(self, data: Buffer) -> "StreamBuilder":
        self._parts.append(data)
        return self

    def header(self) -> "StreamBuilder":
        return self.raw(b"QEVM" + pack(">I", 3))

    def configuration(
        self, machine: str = "pc-i440fx-7.2", subsections: bytes = b""
    ) -> "StreamBuilder":
        return self.raw(b"\x07" + pack(">I", len(machine)) + machine.encode() + subsections)

    @staticmethod
    def subsection(name: str, payload: bytes, version: int = 1) -> bytes:
        return b"\x05" + pack(">B", len(name)) + name.encode() + pack(">I", version) + payload

    def command(self, number: int, payload: bytes = b"") -> "StreamBuilder":
        return self.raw(b"\x08" + pack(">HH", number, len(payload)) + payload)

    def footer(self) -> "StreamBuilder":
        return self.raw(b"\x7e" + pack(">I", self.section_id)) if self.footers else self

    def setup(
        self,
        trailer: bytes = pack(">Q", 0x10),
        *,
        idstr: bytes = b"ram",
        instance: int = 0,
        version: int = 4,
        total: int | None = None,
    ) -> "StreamBuilder":
        """RAM's setup, with its footer."""
        if total is None:
            total = sum(length for _, length in self.blocks)
        self.raw(b"\x01" + pack(">IB", self.section_id, len(idstr)) + idstr)
        self.raw(pack(">IIQ", instance, version, total | 4))
        for name, length in self.blocks:
            self.raw(pack(">B", len(name)) + name.encode() + pack(">Q", length))
        return self.raw(trailer).footer()

    def begin(self, machine: str | None = "pc-i440fx-7.2") -> "StreamBuilder":
        """All up to and including RAM's setup."""
        self.header()
        if machine is not None:
            self.configuration(machine)
        return self.setup()

    def part(self) -> "StreamBuilder":
        return self.raw(b"\x02" + pack(">I", self.section_id))

    def end(self) -> "StreamBuilder":
        return self.raw(b"\x03" + pack(">I", self.section_id))

    def finish(self) -> "StreamBuilder":
        """The end of a PART or END: EOS and footer."""
        return self.raw(pack(">Q", 0x10)).footer()

    def record(
        self, block: int, offset: int, flags: int, payload: bytes, named: bool = False
    ) -> "StreamBuilder":
        """Any record."""
        if named or block != self.last_block:
            name = self.blocks[block][0].encode()
            self.raw(pack(">QB", offset | flags, len(name)) + name + payload)
        else:
            self.raw(pack(">Q", offset | flags | 0x20) + payload)
        self.last_block = block
        return self

    def pages(
        self, block: int, offsets: ArrayLike, pages: ArrayLike | None = None, named: bool = False
    ) -> "StreamBuilder":
        """Full pages; unless given, of the contents that ``page_contents`` has for them."""
        where = np.asarray(offsets, dtype=np.uint64)
        contents = np.asarray(page_contents(where // PAGE) if pages is None else pages, np.uint8)
        self.record(block, int(where[0]), 0x08, contents[0].tobytes(), named)
        return self.raw(records.page_records(where[1:], contents[1:]))

    def zeros(
        self, block: int, offsets: ArrayLike, fill: int = 0, named: bool = False
    ) -> "StreamBuilder":
        where = np.asarray(offsets, dtype=np.uint64)
        self.record(block, int(where[0]), 0x02, bytes([fill]), named)
        return self.raw(records.zero_records(where[1:], fill))

    def delta(self, block: int, offset: int, delta: bytes, named: bool = False) -> "StreamBuilder":
        return self.record(block, offset, 0x40, pack(">BH", 1, len(delta)) + delta, named)

    def data(self) -> bytes:
        """All of the stream, or what of it was appended since the last ``take``."""
        return b"".join(self._parts)

    def take(self) -> bytes:
        """What was appended since the last call."""
        data = self.data()
        self._parts.clear()
        return data


def synthetic_chunks(
    kind: str,
    pages: int,
    *,
    seed: int = 0,
    section_pages: int = 4096,
    name: str = "pc.ram",
    devices: bytes = DEVICES,
) -> Iterator[bytes]:
    """A whole stream of any size, in pieces: one PART each, and the END with the devices.

    :param kind: ``raw`` for pages that do not compress (``page_contents`` of number and seed),
        ``zero`` for zero pages, ``mixed`` for 16 of the one and then 16 of the other
    :param pages: how many; they are numbered from 0 in one block of that size
    """
    builder = StreamBuilder([(name, pages * PAGE)]).begin()
    for first in range(0, pages, section_pages):
        numbers = np.arange(first, min(first + section_pages, pages), dtype=np.uint64)
        builder.part()
        runs = np.split(numbers, range(16, len(numbers), 16)) if kind == "mixed" else [numbers]
        for position, run in enumerate(runs):
            if kind == "zero" or (kind == "mixed" and position % 2):
                builder.zeros(0, run * PAGE)
            else:
                builder.pages(0, run * PAGE, page_contents(run, seed))
        yield builder.finish().take()
    yield builder.end().finish().raw(devices).take()


def synthetic_stream(kind: str, pages: int, *, seed: int = 0, section_pages: int = 4096) -> bytes:
    """``synthetic_chunks`` in one piece."""
    return b"".join(synthetic_chunks(kind, pages, seed=seed, section_pages=section_pages))


def varied_stream(*, footers: bool = True, machine: str | None = "pc-i440fx-7.2") -> bytes:
    """A small whole stream (some 30 KB) with every element that is understood."""
    builder = StreamBuilder(footers=footers).header()
    if machine is not None:
        uuid = builder.subsection("configuration/uuid", bytes(range(16)))
        builder.configuration(machine, uuid)
    builder.command(1).command(2, pack(">I", 1)).command(3, pack(">QQ", PAGE, PAGE)).setup()
    builder.part().pages(0, [0, PAGE]).zeros(0, np.arange(2, 30) * PAGE)
    builder.zeros(1, [0], named=True).zeros(1, [PAGE], fill=0x5A).finish()
    builder.command(2, pack(">I", 2)).part().finish()
    builder.part().zeros(1, [2 * PAGE]).pages(1, [3 * PAGE], named=True).delta(0, 0, b"\x01\x02xy")
    builder.delta(0, PAGE, b"").pages(2, [5 * PAGE, 0]).zeros(2, [PAGE]).finish()
    builder.command(11).end().zeros(2, [2 * PAGE]).pages(0, [63 << 20]).finish()
    return builder.raw(DEVICES).data()
