# SPDX-License-Identifier: Apache-2.0
"""Reads of volumes, some of which fail."""

from collections.abc import Iterable

from nova_dmigrate import exception
from nova_dmigrate.volumes import VolumeReader, aligned_buffer


def try_reads(
    reader: VolumeReader, ranges: Iterable[tuple[int, memoryview]]
) -> list[exception.VolumeError | None]:
    """Fill buffers, each from its offset; for each None or the error."""
    results: list[exception.VolumeError | None] = []
    for offset, buffer in ranges:
        try:
            reader.read_into(offset, buffer)
        except exception.VolumeError as error:
            results.append(error)
        else:
            results.append(None)
    return results


def try_blocks(reader: VolumeReader, count: int) -> list[exception.VolumeError | None]:
    """Read the first blocks of a volume, each by itself; for each None or the error."""
    buffer = aligned_buffer(count * 4096)
    return try_reads(reader, [(at, buffer[at : at + 4096]) for at in range(0, len(buffer), 4096)])
