# SPDX-License-Identifier: Apache-2.0
"""A second, independent reading of a migration stream, record by record, slow and simple.

It shares nothing with the parser, not even constants, and it is more lenient: it believes what
QEMU's own loader would believe. It says what the parser must have found.
"""

import io
import struct
from dataclasses import dataclass, field
from typing import NamedTuple


class Record(NamedTuple):
    """One RAM record."""

    kind: str  # "page", "zero", "delta"
    block: str
    offset: int
    payload: bytes


@dataclass
class Walk:
    """What was found, and where it ended."""

    records: list[Record] = field(default_factory=list)
    blocks: dict[str, int] = field(default_factory=dict)
    section_ends: list[int] = field(default_factory=list)
    complete: bool = False  # RAM's END was seen
    position: int = 0  # behind the last whole record or section that was understood


class _StopError(Exception):
    pass


class _Walker:
    def __init__(self, raw: bytes) -> None:
        self.stream = io.BytesIO(raw)
        self.walk = Walk()
        self.footers = False
        self.current: str | None = None

    def take(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) != size:
            raise _StopError
        return data

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def require(self, condition: bool) -> None:
        if not condition:
            raise _StopError

    def peek(self) -> int:
        where = self.stream.tell()
        value = self.number(1)
        self.stream.seek(where)
        return value

    def understood(self) -> None:
        self.walk.position = self.stream.tell()

    def run(self) -> Walk:
        try:
            self.require(self.take(8) == b"QEVM\0\0\0\3")
            self.understood()
            while not self.walk.complete:
                self.section()
                self.understood()
        except (_StopError, struct.error):
            pass
        return self.walk

    def section(self) -> None:
        kind = self.number(1)
        if kind == 7:
            self.take(self.number(4))
            while self.peek() == 5:
                self.take(1)
                name = self.take(self.number(1))
                self.take(4)
                self.require(name == b"configuration/uuid")
                self.take(16)
        elif kind == 8:
            self.take(2)
            self.take(self.number(2))
        elif kind == 1:
            self.setup()
        elif kind in (2, 3):
            section_id = self.number(4)
            self.require(bool(self.walk.blocks))
            self.understood()
            while self.record():
                self.understood()
            if self.footers:
                self.require(self.take(5) == b"\x7e" + section_id.to_bytes(4, "big"))
            self.walk.section_ends.append(self.stream.tell())
            self.walk.complete = kind == 3
        else:
            raise _StopError

    def setup(self) -> None:
        section_id = self.number(4)
        self.require(self.take(self.number(1)) == b"ram")
        self.take(8)
        remaining = self.number(8) - 4
        while remaining > 0:
            name = self.take(self.number(1)).decode("latin-1")
            self.walk.blocks[name] = self.number(8)
            remaining -= self.walk.blocks[name]
        self.require(remaining == 0 and self.number(8) == 0x10)
        self.footers = self.peek() == 0x7E
        if self.footers:
            self.require(self.take(5) == b"\x7e" + section_id.to_bytes(4, "big"))

    def record(self) -> bool:
        header = self.number(8)
        flags = header % 4096
        if flags == 0x10:
            return False
        if not flags & 0x20:
            self.current = self.take(self.number(1)).decode("latin-1")
        self.require(self.current in self.walk.blocks)
        assert self.current is not None
        offset = header - flags
        self.require(offset < self.walk.blocks[self.current])
        kind = flags & ~0x20
        if kind == 8:
            record = Record("page", self.current, offset, self.take(4096))
        elif kind == 2:
            record = Record("zero", self.current, offset, self.take(1))
        elif kind == 0x40:
            self.require(self.number(1) == 1)
            record = Record("delta", self.current, offset, self.take(self.number(2)))
        else:
            raise _StopError
        self.walk.records.append(record)
        return True


def walk(raw: bytes) -> Walk:
    """Walk a stream as far as it is understood."""
    return _Walker(raw).run()
