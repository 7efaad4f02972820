# SPDX-License-Identifier: Apache-2.0
"""What the frames between the two relays say: flags, small payloads, capabilities.

The layout of every frame is told in doc/source/contributor/wire.rst.
"""

import enum
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception
from nova_dmigrate.memory_layout import MemoryLayout, MemoryRange
from nova_dmigrate.relay.outbox import Parcel
from nova_dmigrate.relay.wire.frames import FrameType
from nova_dmigrate.stream.elements import RamBlock, RamSetup

# What relays can do beyond the version of the wire; negotiated in the handshake
#: COMPRESSED frames are understood.
ZSTD = "zstd"
#: What both relays must be able to do.
NEEDED = frozenset({"references"})
CAPABILITIES = NEEDED | {ZSTD}

#: Seconds after which a connection that has nothing to send shows that it is alive.
KEEPALIVE_SECONDS = 1.0

# Flags of a SECTION frame
SECTION_BEGIN = 0
SECTION_FINISH = 1
SECTION_END = 2
SECTION_FOOTERS = 4

# Flags of a MAP frame: what its payload is
MAP_LAYOUT = 0
MAP_CHUNK = 1
MAP_COMPLETE = 2

# Flag of a SETUP frame
SETUP_POST_COPY = 1  # QEMU may begin post-copy

# Flags of a LATCH frame
LATCH_INSIDE = 1  # within a RAM section
LATCH_RECORD = 2  # the payload ends with the last RAM record
# Flag of an END frame
END_ABORTED = 1

_PROGRESS = struct.Struct("<QdQ")
_LENGTH = struct.Struct("<I")
_FIRST = struct.Struct("<Q")


class MissReason(enum.IntEnum):
    """Why a reference did not resolve."""

    CHANGED = 0
    READ_ERROR = 1
    NO_VOLUME = 2


def count_misses(reasons: NDArray[np.uint8]) -> dict[str, int]:
    """Misses by the name of their reason.

    :raises ValueError: a reason is unknown.
    """
    numbers, counts = np.unique(reasons, return_counts=True)
    return {
        MissReason(int(number)).name.lower(): int(count)
        for number, count in zip(numbers, counts, strict=True)
    }


@dataclass(frozen=True)
class Progress:
    """How far the destination is with the volumes: bytes read, their rate, bytes still wanted."""

    volume_bytes: int = 0
    volume_rate: float = 0.0
    volume_left: int = 0

    def volume_seconds_left(self) -> float:
        """Seconds that the volumes still need; 0 as long as their rate is not known."""
        return self.volume_left / self.volume_rate if self.volume_rate > 0 else 0.0

    def pack(self) -> bytes:
        """The payload of a PROGRESS frame."""
        return _PROGRESS.pack(self.volume_bytes, self.volume_rate, self.volume_left)

    @classmethod
    def parse(cls, payload: memoryview) -> "Progress":
        """:raises ValueError: the payload is not what :meth:`pack` makes."""
        if len(payload) != _PROGRESS.size:
            raise ValueError(f"progress of {len(payload)} bytes")
        return cls(*_PROGRESS.unpack(payload))


def parse_text(payload: memoryview) -> str:
    """A text from the peer, safe to be logged."""
    text = bytes(payload).decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def parse_report(payload: memoryview) -> dict[str, Any] | None:
    """The destination's summary, or None where it sent none that can be read."""
    try:
        report = json.loads(bytes(payload))
    except ValueError:
        return None
    return report if isinstance(report, dict) else None


def map_parcels(chunks: Sequence[bytes], layout: MemoryLayout, first: int) -> Iterator[Parcel]:
    """The frames that hand over a buffer map and its layout.

    :param chunks: of the serialised map.
    :param first: position of the first page that may be referenced.
    """
    text = json.dumps([[r.gpa, r.length, r.block, r.offset] for r in layout.ranges]).encode()
    yield Parcel(FrameType.MAP, [memoryview(text)], len(text), flags=MAP_LAYOUT)
    for chunk in chunks:
        yield Parcel(FrameType.MAP, [memoryview(chunk)], len(chunk), flags=MAP_CHUNK)
    end = _FIRST.pack(first)
    yield Parcel(FrameType.MAP, [memoryview(end)], len(end), flags=MAP_COMPLETE)


def parse_first(payload: memoryview) -> int:
    """The position in the last frame of a map.

    :raises ValueError: the payload is not what :func:`map_parcels` makes.
    """
    if len(payload) != _FIRST.size:
        raise ValueError(f"a map that ends with {len(payload)} bytes")
    first: int = _FIRST.unpack(payload)[0]
    return first


def parse_layout(payload: memoryview) -> MemoryLayout:
    """:raises ValueError: the payload is not what :func:`map_parcels` makes."""
    rows = json.loads(bytes(payload))
    try:
        return MemoryLayout(
            tuple(
                MemoryRange(int(gpa), int(length), str(block), int(offset))
                for gpa, length, block, offset in rows
            )
        )
    except (TypeError, exception.MemoryLayoutError) as error:
        raise ValueError(f"a memory layout that makes no sense: {error}") from error


def setup_parcel(setup: RamSetup, post_copy: bool) -> Parcel:
    """The frame that carries RAM's setup section: u32 length of a JSON text, the text, QEMU's
    bytes.

    :param post_copy: whether QEMU may begin that.
    """
    description = json.dumps(
        {
            "section_id": setup.section_id,
            "blocks": [[block.idstr, block.used_length, block.page_size] for block in setup.blocks],
        }
    ).encode()
    payload = _LENGTH.pack(len(description)) + description + bytes(setup.data)
    flags = SETUP_POST_COPY if post_copy else 0
    return Parcel(FrameType.SETUP, [memoryview(payload)], len(payload), flags=flags)


def parse_setup(payload: memoryview) -> RamSetup:
    """:raises ValueError: the payload is not what :func:`setup_parcel` makes."""
    if len(payload) < _LENGTH.size:
        raise ValueError("a setup frame that is too short")
    (length,) = _LENGTH.unpack(payload[: _LENGTH.size])
    begin = _LENGTH.size + length
    if begin > len(payload):
        raise ValueError("a setup frame whose description is cut off")
    description = json.loads(bytes(payload[_LENGTH.size : begin]))
    try:
        blocks = tuple(
            RamBlock(str(idstr), int(used), page_size)
            for idstr, used, page_size in description["blocks"]
        )
        section_id = int(description["section_id"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a setup frame that makes no sense: {error}") from error
    total = sum(block.used_length for block in blocks)
    return RamSetup(payload[begin:], section_id, total, blocks)


def latch_parcel(
    reason: str, inside: bool, last_record: tuple[FrameType, int, bytes] | None
) -> Parcel:
    """The frame after which everything is verbatim.

    :param inside: whether the stream stands within a RAM section.
    :param last_record: kind, RAMBlock and bytes (in CONTINUE form) of the last record before it.
        What follows may continue its RAMBlock, so the destination emits it once more, after
        whatever it emitted of its own.
    """
    text = reason.encode()[:1024]
    payload = _LENGTH.pack(len(text)) + text
    flags = LATCH_INSIDE if inside else 0
    block = 0
    if last_record is not None:
        kind, block, record = last_record
        flags |= LATCH_RECORD
        payload += bytes([kind]) + record
    return Parcel(FrameType.LATCH, [memoryview(payload)], len(payload), flags=flags, block=block)


def parse_latch(payload: memoryview, flags: int) -> tuple[str, FrameType | None, memoryview]:
    """Reason, kind of the last record (None without one) and its bytes.

    :raises ValueError: the payload is not what :func:`latch_parcel` makes.
    """
    if len(payload) < _LENGTH.size:
        raise ValueError("a latch frame that is too short")
    (length,) = _LENGTH.unpack(payload[: _LENGTH.size])
    end = _LENGTH.size + length
    reason = parse_text(payload[_LENGTH.size : end])
    if not flags & LATCH_RECORD:
        return reason, None, payload[:0]
    if len(payload) < end + 1 + 9:
        raise ValueError("a latch frame without its record")
    return reason, FrameType(payload[end]), payload[end + 1 :]


def abort_parcel(reason: str) -> Parcel:
    """The last frame of a migration that ends before its time."""
    text = reason.encode()[:1024]
    return Parcel(FrameType.END, [memoryview(text)], len(text), flags=END_ABORTED)
