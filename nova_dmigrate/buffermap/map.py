# SPDX-License-Identifier: Apache-2.0
"""The buffer map of one guest, which may come, and go into a file, in parts."""

from __future__ import annotations

import collections
import dataclasses
import operator
import os
import pathlib
import struct
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.buffermap import codec, join, volume

_LENGTH = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class BufferMap:
    """Which guest pages are copies of which blocks of the guest's volumes. Immutable.

    A guest page is in at most one volume map. Several guest pages may name the same block: the
    guest's page cache and its database may both hold it.
    """

    volumes: tuple[volume.VolumeMap, ...] = ()

    @classmethod
    def build(cls, extents: Iterable[volume.VolumeExtents]) -> BufferMap:
        """Build the map from extents in bytes, in any order.

        Extents of one volume may come in several pieces (one a file, say). The volumes keep the
        order in which they appear first.

        :raises BufferMapError: if an extent is empty, unaligned or out of bounds, or overlaps
            another in guest memory, or a volume has two sizes.
        """
        pieces: dict[str, list[volume.VolumeExtents]] = collections.defaultdict(list)
        for piece in extents:
            pieces[piece.volume_id].append(piece)
        volumes = tuple(volume.VolumeMap.from_extents(_joined(same)) for same in pieces.values())
        volume.check_overlaps(volumes)
        return cls(volumes)

    @property
    def page_count(self) -> int:
        """Number of mapped guest pages."""
        return sum(each.page_count for each in self.volumes)

    @property
    def nbytes(self) -> int:
        """Bytes that the map's arrays take in memory."""
        return sum(each.nbytes for each in self.volumes)

    def to_chunks(self, max_chunk_bytes: int = codec.DEFAULT_CHUNK_BYTES) -> Iterator[bytes]:
        """`parts_to_chunks` of a map in one part."""
        return parts_to_chunks([self], max_chunk_bytes)

    @classmethod
    def from_chunks(cls, chunks: Iterable[bytes], limits: codec.MapLimits) -> BufferMap:
        """Rebuild the map from the chunks of someone who is not trusted, all parts as one.

        Memory grows with what was received, never with what was announced. Guest pages that parts
        map differently are left out.

        :raises BufferMapError: for anything that is not, in order and in full, the chunks of a
            valid map within ``limits``.
        """
        return cls(join.join(codec.decode(chunks, limits)))

    @classmethod
    def join(cls, parts: Iterable[BufferMap]) -> BufferMap:
        """One map of parts. Guest pages that parts map differently are left out.

        :raises BufferMapError: if a volume has two sizes.
        """
        return cls(join.join([part.volumes for part in parts]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """`save_parts` of a map in one part."""
        save_parts([self], path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], limits: codec.MapLimits) -> BufferMap:
        """Read a map that `save` or `save_parts` wrote.

        :raises BufferMapError: if the file cannot be read or does not hold a map within
            ``limits``.
        """
        try:
            with open(path, "rb") as file:
                return cls.from_chunks(_read_chunks(file, limits), limits)
        except OSError as error:
            raise exception.BufferMapError(
                reason=f"{os.fspath(path)} cannot be read: {error.strerror}"
            ) from error


def parts_to_chunks(
    parts: Iterable[BufferMap], max_chunk_bytes: int = codec.DEFAULT_CHUNK_BYTES
) -> Iterator[bytes]:
    """Serialise into chunks of at most ``max_chunk_bytes``, which must stay in order.

    No part is held any more when the next one is asked for.

    :raises BufferMapError: if chunks of that size cannot hold the list of volumes.
    """
    return codec.encode(map(operator.attrgetter("volumes"), parts), max_chunk_bytes)


def save_parts(parts: Iterable[BufferMap], path: str | os.PathLike[str]) -> None:
    """Write a map to ``path``, which appears complete or not at all.

    :raises OSError: as the file system does.
    """
    path = pathlib.Path(path)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            for chunk in parts_to_chunks(parts):
                file.write(_framed(chunk))
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def put_chunk(descriptor: int, offset: int, chunk: bytes) -> int:
    """Put a chunk at ``offset`` bytes of an open file; where the next one goes.

    :raises OSError: as the file system does.
    """
    data = memoryview(_framed(chunk))
    while data:
        written = os.pwrite(descriptor, data, offset)
        offset, data = offset + written, data[written:]
    return offset


def framed_size(chunk: bytes) -> int:
    """Bytes that a chunk takes in a file."""
    return _LENGTH.size + len(chunk)


def _framed(chunk: bytes) -> bytes:
    return _LENGTH.pack(len(chunk)) + chunk


def _joined(pieces: list[volume.VolumeExtents]) -> volume.VolumeExtents:
    """All extents of one volume as one piece."""
    if len(pieces) == 1:
        return pieces[0]
    sizes: dict[str, int] = {}
    for piece in pieces:
        volume.note_size(sizes, piece.volume_id, piece.size)
    return volume.VolumeExtents(
        pieces[0].volume_id,
        pieces[0].size,
        np.concatenate([piece.guest for piece in pieces]),
        np.concatenate([piece.volume_offset for piece in pieces]),
        np.concatenate([piece.length for piece in pieces]),
    )


def _read_chunks(file: BinaryIO, limits: codec.MapLimits) -> Iterator[bytes]:
    while prefix := file.read(_LENGTH.size):
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else None
        if length is None or length > limits.max_chunk_bytes:
            raise exception.BufferMapError(reason="the file is damaged between two chunks")
        # A short read is a short chunk, which its checksum gives away.
        yield file.read(length)
