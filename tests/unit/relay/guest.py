# SPDX-License-Identifier: Apache-2.0
"""A make-believe guest: its memory, its volume, and the stream that QEMU would send of it."""

from dataclasses import dataclass, field
from pathlib import Path
from struct import pack

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.stream.elements import Delta, Element, Opaque, PageRun, RamSetup, ZeroRun
from nova_dmigrate.stream.format import Command
from nova_dmigrate.stream.reader import StreamParser
from tests.unit.stream.builder import DEVICES, StreamBuilder, page_contents

PAGE = 4096
#: The first MiB is never mapped.
FIRST = 256
OTHER = ("/rom@etc/acpi/tables", 128 << 10)


@dataclass
class FakeGuest:
    """RAM of ``ram_pages`` pages of which ``mapped`` (a share) lie on the volume.

    :ivar memory: what the destination must have at the end, uint8 (ram_pages, 4096).
    :ivar pages, blocks: the buffer map.
    """

    seed: int
    ram_pages: int = 4096
    mapped: float = 0.5
    #: Share of the mapped pages whose volume block holds something else.
    stale: float = 0.0
    #: Share of all pages of which the source never speaks; they are zero at the destination.
    silent: float = 0.0
    zero: float = 0.2
    passes: int = 3
    dirty: float = 0.1
    pages: NDArray[np.int64] = field(init=False)
    blocks: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.random = random = np.random.default_rng(self.seed)
        count = self.ram_pages
        self.memory = page_contents(np.arange(count), self.seed)
        self.memory[random.random(count) < self.zero] = 0
        candidates = FIRST + random.permutation(count - FIRST)
        self.pages = np.sort(candidates[: int(self.mapped * (count - FIRST))])
        self.volume_blocks = count + 64
        self.blocks = random.permutation(self.volume_blocks)[: len(self.pages)]
        self.volume = page_contents(np.arange(self.volume_blocks), self.seed + 1000)
        # A page that is zero may be mapped as well, to a block of zeros.
        self.volume[self.blocks] = self.memory[self.pages]
        stale = random.random(len(self.pages)) < self.stale
        self.volume[self.blocks[stale]] ^= 0x55
        self.said = random.random(count) >= self.silent

    def write_volume(self, path: Path) -> Path:
        """Write the volume as a raw file."""
        path.write_bytes(self.volume.tobytes())
        return path

    def stream(self) -> bytes:
        """What QEMU would send; ``memory`` is what the destination must have afterwards."""
        random = self.random
        builder = StreamBuilder([("pc.ram", self.ram_pages * PAGE), OTHER]).begin()
        self._say(builder, np.flatnonzero(self.said))
        builder.part().zeros(1, np.arange(32) * PAGE).finish()
        for _ in range(self.passes - 1):
            self._say(builder, self._dirty())
            builder.command(2, b"\0\0\0\7")
        builder.end()
        last = self._dirty()
        if len(last):
            builder.pages(0, last * PAGE, self.memory[last])
        builder.finish().raw(DEVICES)
        self.memory[~self.said] = 0
        self.volume = random.permutation(self.volume)
        return builder.data()

    def _dirty(self) -> NDArray[np.int64]:
        chosen = np.flatnonzero(self.random.random(self.ram_pages) < self.dirty)
        self.said[chosen] = True
        kind = self.random.random(len(chosen))
        self.memory[chosen] = page_contents(chosen, int(self.random.integers(1, 1 << 30)))
        self.memory[chosen[kind < 0.2]] = 0
        return chosen

    def _say(self, builder: StreamBuilder, numbers: NDArray[np.int64]) -> None:
        """Send these pages in sections of a random number of pages, in runs of either kind."""
        cuts = np.sort(self.random.integers(0, len(numbers) + 1, 6))
        for section in np.split(numbers, cuts):
            builder.part()
            is_zero = ~self.memory[section].any(axis=1)
            edges = np.flatnonzero(np.diff(is_zero)) + 1
            for run in np.split(section, edges):
                if not len(run):
                    continue
                if self.memory[run[0]].any():
                    builder.pages(0, run * PAGE, self.memory[run])
                else:
                    builder.zeros(0, run * PAGE)
            builder.finish()


def advised(stream: bytes) -> bytes:
    """A stream whose QEMU has said that it may begin post-copy."""
    begin = len(StreamBuilder().header().configuration().data())
    command = StreamBuilder().command(Command.POSTCOPY_ADVISE, pack(">QQ", PAGE, PAGE)).data()
    return stream[:begin] + command + stream[begin:]


def received_memory(stream: bytes, ram_pages: int) -> tuple[NDArray[np.uint8], bytes]:
    """What a QEMU that loads ``stream`` has in its first RAMBlock, and what follows RAM."""
    loaded = Loaded(stream)
    assert len(loaded.memory[0]) == ram_pages
    return loaded.memory[0], loaded.rest


class Loaded:
    """What a QEMU has that loads a stream, up to where the parser understands it.

    :ivar memory: of each RAMBlock, uint8 (pages, 4096).
    :ivar rest: the bytes behind.
    :ivar parser: the parser at that point; its CONTINUE state is QEMU's.
    """

    def __init__(self, stream: bytes) -> None:
        self.parser = StreamParser()
        self.memory: list[NDArray[np.uint8]] = []
        self.rest = b""
        elements, consumed = self.parser.parse(memoryview(stream))
        assert consumed == len(stream), "the stream does not end where it should"
        for element in elements:
            self._load(element)

    def _load(self, element: Element) -> None:
        if isinstance(element, RamSetup):
            sizes = [block.used_length // PAGE for block in element.blocks]
            self.memory = [np.zeros((size, PAGE), np.uint8) for size in sizes]
        elif isinstance(element, PageRun):
            # Not one assignment: a page may come twice in one run.
            for offset, page in zip(element.offsets, element.pages, strict=True):
                self.memory[element.block][int(offset) // PAGE] = page
        elif isinstance(element, ZeroRun):
            for offset, fill in zip(element.offsets, element.fill, strict=True):
                self.memory[element.block][int(offset) // PAGE] = fill
        elif isinstance(element, Delta):
            page = self.memory[element.block][element.offset // PAGE]
            apply_delta(page, bytes(element.data[element.head + 3 :]))
        elif isinstance(element, Opaque):
            self.rest += bytes(element.data)


def encode_delta(begin: int, data: bytes) -> bytes:
    """The XBZRLE encoding of a page in which ``data`` changed, from byte ``begin`` on."""
    return _uleb128(begin) + _uleb128(len(data)) + data


def apply_delta(page: NDArray[np.uint8], delta: bytes) -> None:
    """Change a page, uint8 (4096,), as QEMU's loader does."""
    position = at = 0
    while position < len(delta):
        for kind in ("same", "changed"):
            length = shift = 0
            while True:
                byte = delta[position]
                position += 1
                length |= (byte & 0x7F) << shift
                shift += 7
                if not byte & 0x80:
                    break
            if kind == "changed":
                page[at : at + length] = np.frombuffer(delta[position : position + length], "u1")
                position += length
            at += length


def _uleb128(value: int) -> bytes:
    encoded = b""
    while value >= 0x80:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])
