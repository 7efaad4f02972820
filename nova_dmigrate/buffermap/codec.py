# SPDX-License-Identifier: Apache-2.0
"""The buffer map as a sequence of chunks: compact to send, and safe to receive from a guest.

Every chunk is a header and a zlib-compressed body (integers little-endian)::

    magic "NDBM", u8 version, u8 kind, u16 flags (1 = last), u32 index, u32 length of the body
    before compression, 16 bytes BLAKE3 of the header up to here and the compressed body

A map has one part or several. The first chunk of a part (kind VOLUMES) lists its volumes: u32
count, then for each u8 length of its name, the name, u64 size in bytes, u64 entries, u64 pages,
u8 form (0 single pages, 1 runs). The others (kind ENTRIES) carry the entries of the volumes in
that order: u32 volume, u32 entries, then

- the gap between the end of the previous entry and this one in guest pages (u32 each),
- the distance from the block that would continue the previous entry to this entry's (u32 each,
  modulo 2**32, zigzag so that small steps back are small numbers),
- for runs the length less one (u32 each),

each as four planes of bytes, because the high bytes are nearly all zero and compress to nothing.
Gaps cannot be negative, so the form itself cannot express entries of one part that overlap or are
unsorted. Whoever makes a map needs no memory but for one part; `join` makes one map of all.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import blake3
import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception
from nova_dmigrate.buffermap import volume

DEFAULT_CHUNK_BYTES = 1 << 20
MIN_CHUNK_BYTES = 4096

_MAGIC = b"NDBM"
_VERSION = 1
_LAST = 1
_HEADER = struct.Struct("<4sBBHII")
_DIGEST_BYTES = 16
_PREFIX_BYTES = _HEADER.size + _DIGEST_BYTES
_COUNT = struct.Struct("<I")
_VOLUME = struct.Struct("<QQQB")
_ENTRIES = struct.Struct("<II")
_COMPRESSION_LEVEL = 1
# Bytes of a page in a map, and of all that is no page, where nothing compresses
_PAGE_BYTES = volume.FLAT_ENTRY_BYTES + 1
_FRAME_BYTES = 1 << 20

_U32 = np.dtype("<u4")


class _Kind(enum.IntEnum):
    VOLUMES = 1
    ENTRIES = 2


@dataclasses.dataclass(frozen=True)
class MapLimits:
    """What the receiver of a map puts up with.

    ``max_pages``: mapped guest pages, all volumes and parts together. ``max_volumes``: volumes.
    ``max_parts``: parts. ``max_chunk_bytes``: size of a chunk, and of its body after
    decompression, in bytes. ``max_guest_page``: highest number of a mapped guest page.
    """

    max_pages: int = 1 << 28  # 1 TiB of guest memory
    max_volumes: int = 256
    max_parts: int = 1 << 12
    max_chunk_bytes: int = DEFAULT_CHUNK_BYTES
    max_guest_page: int = volume.MAX_PAGES - 1

    @property
    def max_bytes(self) -> int:
        """Bytes that all chunks of such a map can have together."""
        return self.max_pages * _PAGE_BYTES + _FRAME_BYTES


def encode(parts: Iterable[tuple[volume.VolumeMap, ...]], max_chunk_bytes: int) -> Iterator[bytes]:
    """The chunks of a map, each of at most ``max_chunk_bytes``.

    No part is held any more when the next one is asked for. No parts are an empty map.

    :raises BufferMapError: if such chunks are too small for the list of volumes.
    """
    return _seal(_bodies(parts, max_chunk_bytes))


def decode(chunks: Iterable[bytes], limits: MapLimits) -> Sequence[tuple[volume.VolumeMap, ...]]:
    """The parts in ``chunks``; overlaps between them are left to the caller.

    :raises BufferMapError: for anything that ``encode`` would not have made, or beyond ``limits``.
    """
    parts: list[tuple[volume.VolumeMap, ...]] = []
    totals = _Totals(limits)
    current: _PartReceiver | None = None
    for kind, body in _unseal(chunks, limits):
        if kind is _Kind.VOLUMES:
            if current is not None:
                parts.append(totals.keep(current.finish()))
            listed = _decode_volumes(body)
            totals.admit(listed)
            current = _PartReceiver(listed, limits)
        elif current is None:
            raise _error("the first chunk does not list the volumes")
        else:
            current.add(body)
    if current is not None:
        parts.append(totals.keep(current.finish()))
    return parts


def _seal(bodies: Iterator[tuple[_Kind, bytes]]) -> Iterator[bytes]:
    """Chunks of bodies: header, checksum, compressed body. The last one is marked."""
    following = next(bodies, None)
    index = 0
    while following is not None:
        (kind, body), following = following, next(bodies, None)
        flags = _LAST if following is None else 0
        header = _HEADER.pack(_MAGIC, _VERSION, kind, flags, index, len(body))
        packed = zlib.compress(body, _COMPRESSION_LEVEL)
        yield header + _digest(header, packed) + packed
        index += 1


def _unseal(chunks: Iterable[bytes], limits: MapLimits) -> Iterator[tuple[_Kind, bytes]]:
    """The bodies of chunks, at least one, each checked to be the next one, whole and in limits."""
    last = False
    index = -1
    for index, chunk in enumerate(chunks):
        if last:
            raise _error("chunks follow the last one")
        if not _PREFIX_BYTES < len(chunk) <= limits.max_chunk_bytes:
            raise _error(f"chunk {index} has {len(chunk)} bytes")
        header, packed = chunk[: _HEADER.size], chunk[_PREFIX_BYTES:]
        magic, version, kind, flags, number, length = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise _error(f"chunk {index} is not a chunk of a buffer map")
        if version != _VERSION:
            raise _error(f"chunk {index} has version {version}, known is {_VERSION}")
        if _digest(header, packed) != chunk[_HEADER.size : _PREFIX_BYTES]:
            raise _error(f"chunk {index} is damaged")
        if number != index:
            raise _error(f"chunk {number} came where chunk {index} was expected")
        if kind not in _Kind.__members__.values() or flags & ~_LAST:
            raise _error(f"chunk {index} has kind {kind} and flags {flags:#x}")
        last = bool(flags & _LAST)
        yield _Kind(kind), _decompress(packed, length, index, limits)
    if not last:
        raise _error(f"it breaks off after {index + 1} chunks")


def _decompress(packed: bytes, length: int, index: int, limits: MapLimits) -> bytes:
    """Decompress into exactly ``length`` bytes; never produces more than one byte beyond it."""
    if length > limits.max_chunk_bytes:
        raise _error(f"chunk {index} announces {length} bytes")
    unpacker = zlib.decompressobj()
    try:
        body = unpacker.decompress(packed, length + 1)
    except zlib.error as error:
        raise _error(f"chunk {index} cannot be decompressed: {error}") from error
    if len(body) != length or not unpacker.eof or unpacker.unused_data:
        raise _error(f"chunk {index} does not hold the {length} bytes that it announces")
    return body


def _digest(header: bytes, packed: bytes) -> bytes:
    hasher = blake3.blake3(header)
    hasher.update(packed)
    return hasher.digest(length=_DIGEST_BYTES)


def _bodies(
    parts: Iterable[tuple[volume.VolumeMap, ...]], max_chunk_bytes: int
) -> Iterator[tuple[_Kind, bytes]]:
    # What does not compress grows by a few bytes per 16 KiB (zlib's compressBound).
    capacity = max_chunk_bytes - _PREFIX_BYTES - (max_chunk_bytes >> 10) - 64
    if max_chunk_bytes < MIN_CHUNK_BYTES:
        raise _error(f"chunks of {max_chunk_bytes} bytes are too small")
    empty = True
    for part in parts:
        empty = False
        yield _Kind.VOLUMES, _encode_volumes(part, capacity)
        for number, each in enumerate(part):
            yield from _entries(number, each, capacity)
            del each
        del part  # it is large, and the next one is about to be made
    if empty:
        yield _Kind.VOLUMES, _encode_volumes((), capacity)


def _entries(number: int, each: volume.VolumeMap, capacity: int) -> Iterator[tuple[_Kind, bytes]]:
    entry_bytes = volume.FLAT_ENTRY_BYTES if each.lengths is None else volume.RUN_ENTRY_BYTES
    count = (capacity - _ENTRIES.size) // entry_bytes
    next_guest = next_block = 0
    for start in range(0, each.guest_pages.size, count):
        guest = each.guest_pages[start : start + count]
        block = each.volume_blocks[start : start + count]
        step: Any = 1 if each.lengths is None else each.lengths[start : start + count]
        behind_guest: volume.U32 = guest + step
        behind_block: volume.U32 = block + step
        planes = [
            _ENTRIES.pack(number, guest.size),
            _to_planes(guest - _shifted(behind_guest, next_guest)),
            _to_planes(_zigzag(block - _shifted(behind_block, next_block))),
        ]
        if each.lengths is not None:
            planes.append(_to_planes(step - np.uint32(1)))
        next_guest, next_block = int(behind_guest[-1]), int(behind_block[-1])
        yield _Kind.ENTRIES, b"".join(planes)


def _encode_volumes(volumes: tuple[volume.VolumeMap, ...], capacity: int) -> bytes:
    fields = [_COUNT.pack(len(volumes))]
    for each in volumes:
        name = each.volume_id.encode("ascii")
        form = 0 if each.lengths is None else 1
        fields.append(bytes([len(name)]) + name)
        fields.append(_VOLUME.pack(each.size, each.guest_pages.size, each.page_count, form))
    table = b"".join(fields)
    if len(table) > capacity:
        raise _error(f"chunks are too small for the list of {len(volumes)} volumes")
    return table


@dataclasses.dataclass(frozen=True)
class _Listed:
    """A volume as a part lists it."""

    name: str
    size: int
    entries: int
    pages: int
    form: int


def _decode_volumes(table: bytes) -> list[_Listed]:
    """The volumes of a part, none of them twice."""
    try:
        (count,) = _COUNT.unpack_from(table)
        position = _COUNT.size
        volumes = []
        for _ in range(count):
            length = table[position]
            name = table[position + 1 : position + 1 + length].decode("ascii")
            position += 1 + length
            each = _Listed(name, *_VOLUME.unpack_from(table, position))
            position += _VOLUME.size
            volume.check_volume(name, each.size)
            flat = each.form == 0
            if each.form > 1 or each.entries > each.pages or (flat and each.entries < each.pages):
                raise _error(f"volume {name}: {each.entries} entries cannot be {each.pages} pages")
            volumes.append(each)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise _error("the list of volumes is malformed") from error
    if position != len(table) or len({each.name for each in volumes}) != count:
        raise _error("the list of volumes is malformed or names a volume twice")
    return volumes


class _Totals:
    """What all parts have announced together, to which there are limits."""

    def __init__(self, limits: MapLimits) -> None:
        self._limits = limits
        self._parts = 0
        self._pages = 0
        self._sizes: dict[str, int] = {}
        self._kept: set[str] = set()

    def admit(self, volumes: list[_Listed]) -> None:
        """Check that one more part with these volumes is within the limits."""
        limits = self._limits
        self._parts += 1
        self._pages += sum(each.pages for each in volumes)
        for each in volumes:
            volume.note_size(self._sizes, each.name, each.size)
        if self._parts > limits.max_parts:
            raise _error(f"it has more than the {limits.max_parts} parts allowed")
        if len(self._sizes) > limits.max_volumes:
            raise _error(
                f"{len(self._sizes)} volumes are more than the {limits.max_volumes} allowed"
            )
        if self._pages > limits.max_pages:
            raise _error(f"it has more than the {limits.max_pages} pages allowed")

    def keep(self, part: tuple[volume.VolumeMap, ...]) -> tuple[volume.VolumeMap, ...]:
        """What has to be kept of a part: a volume without pages only once."""
        kept = tuple(each for each in part if each.page_count or each.volume_id not in self._kept)
        self._kept.update(each.volume_id for each in kept)
        return kept


class _PartReceiver:
    """Collects the entries of the volumes of one part, which come in order."""

    def __init__(self, volumes: list[_Listed], limits: MapLimits) -> None:
        self._receivers = [_Receiver(each, limits) for each in volumes]
        self._current = 0

    def add(self, body: bytes) -> None:
        receivers = self._receivers
        while self._current < len(receivers) and receivers[self._current].complete:
            self._current += 1
        if self._current == len(receivers):
            raise _error("it holds more than it announced")
        receivers[self._current].add(self._current, body)

    def finish(self) -> tuple[volume.VolumeMap, ...]:
        """The volume maps."""
        volumes = tuple(receiver.finish() for receiver in self._receivers)
        volume.check_overlaps(volumes)
        return volumes


class _Receiver:
    """Collects the entries of one volume and checks each of them as it comes."""

    def __init__(self, listed: _Listed, limits: MapLimits) -> None:
        self._name = listed.name
        self._size = listed.size
        self._entries_left = listed.entries
        self._pages_left = listed.pages
        self._columns = 2 + listed.form
        self._guest_limit = min(limits.max_guest_page + 1, volume.MAX_PAGES)
        self._next_guest = 0
        self._next_block = 0
        self._pieces: list[tuple[volume.U32, ...]] = []

    @property
    def complete(self) -> bool:
        return not self._entries_left

    def add(self, number: int, body: bytes) -> None:
        """Take the body of one chunk of entries."""
        if len(body) < _ENTRIES.size:
            raise self._error("a chunk of its entries is too short")
        owner, count = _ENTRIES.unpack_from(body)
        if owner != number or not 0 < count <= self._entries_left:
            raise self._error(f"{count} entries of volume {owner} came where they do not belong")
        if len(body) != _ENTRIES.size + count * 4 * self._columns:
            raise self._error(f"a chunk does not hold the {count} entries that it announces")
        columns = np.frombuffer(body, np.uint8, offset=_ENTRIES.size).reshape(-1, 4, count)
        # In 64 bits: the sums of a chunk stay far below 2**64, so nothing wraps unseen.
        step = np.ones(count, np.uint64)
        if self._columns == 3:
            step += _from_planes(columns[2])
        pages = int(step.sum())
        if pages > self._pages_left:
            raise self._error("it holds more pages than it announced")
        guest = self._guest_pages(_from_planes(columns[0]), step)
        block = self._volume_blocks(_from_planes(columns[1]), step)
        self._entries_left -= count
        self._pages_left -= pages
        self._pieces.append((guest, block, step.astype(np.uint32))[: self._columns])

    def finish(self) -> volume.VolumeMap:
        """The volume's map; the receiver is empty afterwards."""
        if self._entries_left or self._pages_left:
            raise self._error("entries are missing")
        nothing = (np.empty(0, np.uint32),) * self._columns
        pieces = self._pieces or [nothing]
        columns = [
            np.concatenate([piece[number] for piece in pieces]) for number in range(self._columns)
        ]
        self._pieces = []
        lengths = columns[2] if self._columns == 3 else None
        return volume.VolumeMap.from_runs(self._name, self._size, columns[0], columns[1], lengths)

    def _guest_pages(self, gaps: volume.U32, step: volume.U64) -> volume.U32:
        """Guest pages from gaps."""
        behind = np.cumsum(step + gaps) + np.uint64(self._next_guest)
        if int(behind[-1]) > self._guest_limit:
            raise self._error("a guest page is beyond the limit")
        self._next_guest = int(behind[-1])
        return (behind - step).astype(np.uint32)

    def _volume_blocks(self, distances: volume.U32, step: volume.U64) -> volume.U32:
        """Volume blocks from zigzag distances, modulo 2**32 as they were made."""
        behind = np.cumsum(step + _unzigzag(distances)) + np.uint64(self._next_block)
        block = (behind - step).astype(np.uint32)
        behind = step + block
        if int(behind.max()) > volume.block_count(self._size):
            raise self._error(f"an entry ends beyond its {self._size} bytes")
        self._next_block = int(behind[-1])
        return block

    def _error(self, what: str) -> exception.BufferMapError:
        return _error(f"volume {self._name}: {what}")


def _error(reason: str) -> exception.BufferMapError:
    return exception.BufferMapError(reason=reason)


def _shifted(behind: volume.U32, before_first: int) -> volume.U32:
    """``behind`` one entry later, with ``before_first`` in front."""
    shifted = np.empty_like(behind)
    shifted[0] = before_first
    shifted[1:] = behind[:-1]
    return shifted


def _zigzag(values: volume.U32) -> volume.U32:
    signed = values.view(np.int32)
    return ((signed << 1) ^ (signed >> 31)).view(np.uint32)


def _unzigzag(values: volume.U32) -> volume.U32:
    return (values >> np.uint32(1)) ^ (np.uint32(0) - (values & np.uint32(1)))


def _to_planes(values: volume.U32) -> bytes:
    return values.astype(_U32, copy=False).view(np.uint8).reshape(-1, 4).T.tobytes()


def _from_planes(planes: NDArray[np.uint8]) -> volume.U32:
    """u32 (n,) from four planes of n bytes, shape (4, n)."""
    return np.ascontiguousarray(planes.T).view(_U32).reshape(-1).astype(np.uint32, copy=False)
