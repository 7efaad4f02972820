# SPDX-License-Identifier: Apache-2.0
"""Frames that are compressed on their way, where that is faster than to send them as they are.

The payload of a COMPRESSED frame is the number of the frame's own type, one byte, and a zstd frame
(RFC 8878) that tells the size of its content.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import zstandard

from nova_dmigrate.relay.outbox import Parcel
from nova_dmigrate.relay.wire.frames import (
    MAX_PAYLOAD,
    RULES,
    Buffer,
    Frame,
    FrameType,
    Header,
    Role,
    describe_length,
)

#: Those that carry the guest's memory or devices; all others are small, or do not compress.
COMPRESSIBLE = frozenset(
    {FrameType.PAGES, FrameType.ZEROS, FrameType.COPIES, FrameType.VERBATIM, FrameType.DELTA}
)

#: A page of InnoDB compresses by a half; higher levels bring a tenth more for twice the time.
_LEVEL = 1
#: Bytes below which a frame is not worth the trouble.
_SMALL = 2048
#: One frame of so many is compressed although it did not pay before: the guest's memory is not the
#: same everywhere.
_PROBE_EACH = 32
#: Where even the best compression would not pay, because the network is fast: the processor may
#: just have been busy with other things when that was measured.
_PROBE_SELDOM = 256
#: What is left, at the next one, of the weight of what was measured: the last ten or so count.
_DECAY = 0.9


class _Ratio:
    """What one quantity was for another over the last moments."""

    def __init__(self) -> None:
        self._above = self._below = 0.0

    def note(self, above: float, below: float) -> None:
        self._above = self._above * _DECAY + above
        self._below = self._below * _DECAY + below

    @property
    def known(self) -> bool:
        return self._below > 0

    @property
    def value(self) -> float:
        return self._above / self._below


class Packed(NamedTuple):
    """A frame as it crosses the network; ``size`` in bytes of payload."""

    type: FrameType
    payload: Sequence[Buffer]
    size: int


class Compressor:
    """Packs the frames of one connection, by one thread at a time.

    A byte is worth compressing where the time for that is less than what the network would need for
    the bytes saved. All three are measured as the connection goes: on a fast network, with data
    that does not compress, or when the processor has no time, frames go as they are.

    :ivar saved_bytes: how much less the network has had to carry.
    """

    def __init__(self, enabled: bool = True) -> None:
        """:param enabled: false to pack nothing."""
        self._enabled = enabled
        self._zstd = zstandard.ZstdCompressor(level=_LEVEL)
        self._seconds_to_compress = _Ratio()
        self._seconds_to_send = _Ratio()
        self._compressed_size = _Ratio()
        self._since_probe = 0
        self.saved_bytes = 0

    def pack(self, parcel: Parcel) -> Packed:
        """The frame, smaller if that pays."""
        if parcel.type in COMPRESSIBLE and parcel.size >= _SMALL and self._worthwhile():
            return self._compress(parcel)
        return Packed(parcel.type, parcel.payload, parcel.size)

    def note_sent(self, size: int, seconds: float) -> None:
        """Learn from a frame how fast the network is.

        :param seconds: that it kept the frame; waiting for a cap counts, waiting for a peer that
            takes nothing does not.
        """
        if size >= _SMALL:
            self._seconds_to_send.note(seconds, size)

    def _worthwhile(self) -> bool:
        if not self._enabled:
            return False
        if not (self._seconds_to_send.known and self._seconds_to_compress.known):
            return self._seconds_to_send.known
        effort, price = self._seconds_to_compress.value, self._seconds_to_send.value
        if effort < price * (1 - self._compressed_size.value):
            return True
        self._since_probe += 1
        return self._since_probe >= (_PROBE_EACH if effort < price else _PROBE_SELDOM)

    def _compress(self, parcel: Parcel) -> Packed:
        self._since_probe = 0
        begin = time.monotonic()
        whole = parcel.payload[0] if len(parcel.payload) == 1 else b"".join(parcel.payload)
        data = self._zstd.compress(whole)
        self._seconds_to_compress.note(time.monotonic() - begin, parcel.size)
        size = 1 + len(data)
        self._compressed_size.note(min(size, parcel.size), parcel.size)
        if size >= parcel.size:
            return Packed(parcel.type, parcel.payload, parcel.size)
        self.saved_bytes += parcel.size - size
        return Packed(FrameType.COMPRESSED, [bytes([parcel.type]), data], size)


def plain_header(header: Header, payload: memoryview) -> Header:
    """That of the frame which a COMPRESSED one carries.

    :raises ValueError: it is not one that may be compressed, or of a length that is not allowed.
    """
    rule = RULES[Role.DATA].get(payload[0])
    if rule is None or rule.type not in COMPRESSIBLE:
        raise ValueError(f"carries type {payload[0]}")
    try:
        length = zstandard.frame_content_size(payload[1:])
    except zstandard.ZstdError as error:
        raise ValueError(f"is not compressed: {error}") from error
    if not max(rule.minimum, 1) <= length <= min(rule.maximum, MAX_PAYLOAD) or length % rule.unit:
        raise ValueError(f"carries {describe_length(rule, length)}")
    return header._replace(type=rule.type, length=length)


def decompress(header: Header, payload: memoryview, memory: memoryview) -> Frame:
    """The frame of that (plain) header, whose payload is placed at the beginning of ``memory``.

    :raises ValueError: the payload is damaged, or not of the length that it says.
    """
    target = memory[: header.length]
    # One byte more than there should be shows that there is too much.
    with zstandard.ZstdDecompressor().stream_reader(payload[1:]) as reader:
        filled = 0
        try:
            while filled < header.length:
                count = reader.readinto(target[filled:])
                if not count:
                    break
                filled += count
            rest = reader.read(1)
        except zstandard.ZstdError as error:
            raise ValueError(f"does not decompress: {error}") from error
    if filled != header.length or rest:
        raise ValueError(f"decompresses to {filled} bytes, or more, not {header.length}")
    return Frame(header, target)
