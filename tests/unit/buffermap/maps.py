# SPDX-License-Identifier: Apache-2.0
"""Maps for the tests, a plain model of what a map means, and the chunk format written anew."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

import blake3
import hypothesis
import numpy as np
from hypothesis import strategies as st

from nova_dmigrate import buffermap

PAGE = buffermap.PAGE_SIZE
LIMITS = buffermap.MapLimits(max_pages=1 << 16)

# Deterministic, so that a run in CI fails only for what was changed.
PROPERTY = hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=150)

Extent = tuple[int, int, int]  # guest page, volume block, pages


def extents(
    volume_id: str, blocks: int, triples: Sequence[Extent], guest_unit: int = PAGE
) -> buffermap.VolumeExtents:
    """Extents in bytes from triples in pages, for a volume of ``blocks`` blocks."""
    columns = np.array(triples, np.uint64).reshape(-1, 3).T
    return buffermap.VolumeExtents(
        volume_id,
        blocks * PAGE,
        columns[0] * np.uint64(guest_unit),
        columns[1] * np.uint64(PAGE),
        columns[2] * np.uint64(PAGE),
    )


def build(*volumes: tuple[str, int, Sequence[Extent]]) -> buffermap.BufferMap:
    return buffermap.BufferMap.build(extents(*volume) for volume in volumes)


def model(
    volumes: Iterable[tuple[str, int, Sequence[Extent]]],
) -> dict[int, tuple[str, int]] | None:
    """Guest page -> (volume, block), one page at a time; None if a guest page comes twice."""
    pages: dict[int, tuple[str, int]] = {}
    for volume_id, _, triples in volumes:
        for guest, block, length in triples:
            for number in range(length):
                if guest + number in pages:
                    return None
                pages[guest + number] = (volume_id, block + number)
    return pages


def as_dict(buffer_map: buffermap.BufferMap) -> dict[int, tuple[str, int]]:
    """The same of a real map."""
    return {
        guest: (volume.volume_id, block)
        for volume in buffer_map.volumes
        for guest, block in zip(*(column.tolist() for column in volume.pages()))
    }


BLOCKS = 400
_TRIPLE = st.tuples(st.integers(0, 600), st.integers(0, BLOCKS - 12), st.integers(1, 12))
# Mostly overlapping: what must be refused.
ANY_VOLUMES = st.lists(st.lists(_TRIPLE, max_size=6), max_size=3).map(
    lambda lists: [(f"vol-{number}", BLOCKS, triples) for number, triples in enumerate(lists)]
)


@st.composite
def disjoint_volumes(draw: st.DrawFn) -> list[tuple[str, int, list[Extent]]]:
    """Volumes whose extents do not overlap, in any order; neighbours often continue each other."""
    volumes: list[tuple[str, int, list[Extent]]] = [
        (f"vol-{number}", BLOCKS, []) for number in range(draw(st.integers(0, 3)))
    ]
    if not volumes:
        return volumes
    guest = block = 0
    for _ in range(draw(st.integers(0, 60))):
        guest += draw(st.sampled_from([0, 0, 0, 1, 5, 70000]))
        length = draw(st.integers(1, 12))
        if draw(st.booleans()) or block + length > BLOCKS:
            block = draw(st.integers(0, BLOCKS - 12))
        volumes[draw(st.integers(0, len(volumes) - 1))][2].append((guest, block, length))
        guest += length
        block += length
    return [(name, blocks, draw(st.permutations(triples))) for name, blocks, triples in volumes]


# The chunk format, written from its description rather than with the code under test

HEADER = struct.Struct("<4sBBHII")
VOLUMES, ENTRIES = 1, 2
LAST = 1


def chunk(
    kind: int,
    body: bytes,
    *,
    index: int,
    last: bool = False,
    magic: bytes = b"NDBM",
    version: int = 1,
    length: int | None = None,
    flags: int = 0,
    packed: bytes | None = None,
) -> bytes:
    header = HEADER.pack(
        magic,
        version,
        kind,
        flags | (LAST if last else 0),
        index,
        len(body) if length is None else length,
    )
    if packed is None:
        packed = zlib.compress(body)
    return header + blake3.blake3(header + packed).digest(length=16) + packed


def volume_table(*volumes: tuple[bytes, int, int, int, int]) -> bytes:
    """Of (name, size in bytes, entries, pages, form)."""
    return struct.pack("<I", len(volumes)) + b"".join(
        bytes([len(name)]) + name + struct.pack("<QQQB", *numbers) for name, *numbers in volumes
    )


def entries(number: int, *columns: Sequence[int], count: int | None = None) -> bytes:
    """Of columns of u32: gaps, zigzag distances, and lengths less one for runs."""
    planes = [
        np.array(column, np.uint64).astype("<u4").view(np.uint8).reshape(-1, 4).T.tobytes()
        for column in columns
    ]
    count = len(columns[0]) if count is None else count
    return struct.pack("<II", number, count) + b"".join(planes)


def unpack(sealed: bytes) -> tuple[int, bytes]:
    """Kind and body of a chunk."""
    return sealed[5], zlib.decompress(sealed[HEADER.size + 16 :])


def reseal(bodies: Sequence[tuple[int, bytes]]) -> list[bytes]:
    """Chunks with right checksums around bodies that may be anything."""
    last = len(bodies) - 1
    return [
        chunk(kind, body, index=index, last=index == last)
        for index, (kind, body) in enumerate(bodies)
    ]
