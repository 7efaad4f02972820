# SPDX-License-Identifier: Apache-2.0
"""Synthetic streams, whole in memory before anything is measured, and the volume they match."""

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nova_dmigrate.buffermap import BufferMap, VolumeExtents
from tests.lab.relays import VOLUME
from tests.unit.stream.builder import page_contents, synthetic_chunks

PAGE = 4096
#: RAM's first MiB is never mapped.
FIRST = 256
MTREE = """FlatView #0
 AS "memory", root: system
 Root memory region: system
  0000000000000000-{end:016x} (prio 0, ram): pc.ram
"""


@dataclass(frozen=True)
class Stream:
    """A stream in memory and the bytes of guest memory that it tells of."""

    kind: str
    data: memoryview
    guest_bytes: int


def make_stream(kind: str, pages: int) -> Stream:
    """``raw`` or ``zero`` pages, each once, as QEMU's bulk."""
    # What is sent from is mapped in large steps: a list of chunks would be one more copy.
    stride = 4104 if kind == "raw" else 9
    memory = mmap.mmap(-1, pages * stride + (64 << 20))
    size = 0
    for chunk in synthetic_chunks(kind, pages):
        memory[size : size + len(chunk)] = chunk
        size += len(chunk)
    return Stream(kind, memoryview(memory)[:size], pages * PAGE)


def write_volume(path: Path, pages: int) -> Path:
    """A raw volume whose block i holds what ``make_stream("raw")`` sends as page i."""
    with path.open("wb") as volume:
        for first in range(0, pages, 4096):
            volume.write(page_contents(np.arange(first, min(first + 4096, pages))))
    return path


def write_map(path: Path, layout: Path, pages: int) -> None:
    """The buffer map in which guest page i is block i, and the layout that places it.

    The order of the volume is the order of the stream; a buffer pool's is not. For the source it
    makes no difference, for the destination the reads are as large in either case, because it
    reads in the order of the volume.
    """
    extent = np.array([FIRST], np.uint64) * np.uint64(PAGE)
    length = np.array([(pages - FIRST) * PAGE], np.uint64)
    BufferMap.build([VolumeExtents(VOLUME, pages * PAGE, extent, extent, length)]).save(path)
    layout.write_text(MTREE.format(end=pages * PAGE - 1))
