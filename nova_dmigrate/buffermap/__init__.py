# SPDX-License-Identifier: Apache-2.0
"""The buffer map: which guest pages are copies of which volume blocks.

It is the one structure that the agent in the guest, the source relay and the destination relay
share. ``volume`` holds the arrays of one volume, ``codec`` their form on the wire and on disk,
``join`` makes one map of parts, ``map`` puts them together. None of them knows of Nova, QEMU or a
database.
"""

from nova_dmigrate.buffermap.codec import MapLimits
from nova_dmigrate.buffermap.map import (
    BufferMap,
    framed_size,
    parts_to_chunks,
    put_chunk,
    save_parts,
)
from nova_dmigrate.buffermap.volume import MAX_PAGES, PAGE_SIZE, VolumeExtents, VolumeMap

__all__ = [
    "MAX_PAGES",
    "PAGE_SIZE",
    "BufferMap",
    "MapLimits",
    "VolumeExtents",
    "VolumeMap",
    "framed_size",
    "parts_to_chunks",
    "put_chunk",
    "save_parts",
]
