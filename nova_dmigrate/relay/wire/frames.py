# SPDX-License-Identifier: Apache-2.0
"""What travels between two relays once they know each other: frames.

A frame is a header of 16 bytes and a payload of at most :data:`MAX_PAYLOAD` bytes. All integers are
little-endian. The layout of each payload is described in doc/source/contributor/wire.rst; here are
the record types and the limits that a receiver enforces before it allocates anything.
"""

import enum
import struct
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception

#: Anything whose bytes can be sent: it must be C-contiguous, its item type does not matter.
Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[Any]

#: type, flags, block, payload length in bytes, sequence number
HEADER = struct.Struct("<BBHIQ")
HEADER_SIZE = HEADER.size

MAX_PAYLOAD = 8 << 20
#: Frames that carry a few fields or a short text, never data of the guest.
MAX_CONTROL = 64 << 10

PAGE_SIZE = 4096

#: A mapped page that was not sent: where the destination finds it (``entry`` of the page map), the
#: source's name for its kept copy (``slot``), and BLAKE3-128 of the bytes that QEMU sent.
REFERENCE = np.dtype([("entry", "<u4"), ("slot", "<u4"), ("digest", "u1", (16,))])
#: The kept copy of a page whose reference was a miss.
COPY = np.dtype([("entry", "<u4"), ("slot", "<u4"), ("page", "u1", (PAGE_SIZE,))])
#: A reference that did resolve, or is not wanted any more.
SLOT = np.dtype("<u4")
#: A reference that did not resolve, and why.
MISS = np.dtype([("slot", "<u4"), ("reason", "u1")])

#: Stream records as QEMU writes them: a 64-bit header and a page, or a header and a fill byte.
PAGE_RECORD_SIZE = 8 + PAGE_SIZE
ZERO_RECORD_SIZE = 8 + 1


class Role(enum.IntEnum):
    """What a connection is for. After the handshake it carries frames in one direction only."""

    #: source to destination
    DATA = 1
    #: destination to source
    ACKS = 2


class FrameType(enum.IntEnum):
    """What a frame means. Numbers below 32 travel forward (DATA), from 32 on backward (ACKS)."""

    MAP = 1
    VERBATIM = 2
    SETUP = 3
    PAGES = 4
    ZEROS = 5
    REFERENCES = 6
    COPIES = 7
    DELTA = 8
    SECTION = 9
    LATCH = 10
    END = 11
    #: Travels in both directions, only to show that the sender is alive.
    KEEPALIVE = 12
    #: Another frame, smaller.
    COMPRESSED = 13

    SETTLED = 32
    MISSED = 33
    PROGRESS = 34
    RETURN_PATH = 35
    RETURN_END = 36
    FAILED = 37
    DONE = 38
    MAP_TAKEN = 39


class Header(NamedTuple):
    """The fields of a frame's header. A tuple, because one is made for every frame."""

    type: FrameType
    flags: int = 0
    block: int = 0
    length: int = 0
    seq: int = 0


class Frame(NamedTuple):
    """A frame that was received. ``payload`` is the memory that the receiver allocated for it."""

    header: Header
    payload: memoryview


class Rule(NamedTuple):
    """What a receiver accepts as payload length of one type of frame, in bytes."""

    type: FrameType
    minimum: int
    maximum: int
    #: The length is a multiple of this.
    unit: int


def _data(frame_type: FrameType) -> Rule:
    return Rule(frame_type, 0, MAX_PAYLOAD, 1)


def _control(frame_type: FrameType) -> Rule:
    return Rule(frame_type, 0, MAX_CONTROL, 1)


def _records(frame_type: FrameType, size: int) -> Rule:
    return Rule(frame_type, size, MAX_PAYLOAD, size)


def _by_number(*rules: Rule) -> dict[int, Rule]:
    return {int(rule.type): rule for rule in rules}


_KEEPALIVE = Rule(FrameType.KEEPALIVE, 0, 0, 1)

#: The frames that a connection of each role may carry, by their number.
RULES: dict[Role, dict[int, Rule]] = {
    Role.DATA: _by_number(
        _data(FrameType.MAP),
        _data(FrameType.VERBATIM),
        _data(FrameType.SETUP),
        _records(FrameType.PAGES, PAGE_RECORD_SIZE),
        _records(FrameType.ZEROS, ZERO_RECORD_SIZE),
        _records(FrameType.REFERENCES, REFERENCE.itemsize),
        _records(FrameType.COPIES, COPY.itemsize),
        _data(FrameType.DELTA),
        _control(FrameType.SECTION),
        _control(FrameType.LATCH),
        _control(FrameType.END),
        _KEEPALIVE,
        Rule(FrameType.COMPRESSED, 1, MAX_PAYLOAD, 1),
    ),
    Role.ACKS: _by_number(
        Rule(FrameType.SETTLED, 0, MAX_PAYLOAD, SLOT.itemsize),
        Rule(FrameType.MISSED, 0, MAX_PAYLOAD, MISS.itemsize),
        _control(FrameType.PROGRESS),
        _data(FrameType.RETURN_PATH),
        _control(FrameType.RETURN_END),
        _control(FrameType.FAILED),
        _data(FrameType.DONE),
        _control(FrameType.MAP_TAKEN),
        _KEEPALIVE,
    ),
}


def parse_header(data: bytes | bytearray | memoryview, rules: dict[int, Rule], peer: str) -> Header:
    """Return the header in ``data`` (16 bytes).

    :param rules: the frames that may come, one value of :data:`RULES`
    :param peer: whom to name in an error
    :raises FrameError: the type is unknown or not for this direction, or the length is not allowed
    """
    number, flags, block, length, seq = HEADER.unpack(data)
    rule = rules.get(number)
    if rule is None:
        raise exception.FrameError(
            peer=peer, reason=f"frame type {number} is unknown or not for this direction"
        )
    if not rule.minimum <= length <= rule.maximum or length % rule.unit:
        raise exception.FrameError(peer=peer, reason=describe_length(rule, length))
    return Header(rule.type, flags, block, length, seq)


def describe_length(rule: Rule, length: int) -> str:
    """Say what is wrong with the payload ``length`` of a frame."""
    allowed = f"{rule.minimum} to {rule.maximum} bytes"
    if rule.unit > 1:
        allowed += f" in multiples of {rule.unit}"
    return f"a {rule.type.name} frame of {length} bytes, allowed are {allowed}"
