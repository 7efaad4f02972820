# SPDX-License-Identifier: Apache-2.0
"""What can be chosen about making a buffer map."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class MapOptions:
    """How to make a buffer map.

    ``volume_names``: kernel name of a disk ("vdb") -> volume id, for disks without a usable
    serial. A device that is not a disk of its own accord (a loop device) counts as one only when
    it is named here.

    ``include_dirty``: also map frames that are known to differ from the volume. They are misses
    unless the server flushes them before the destination reads them.

    ``sync_buffered``: write back the page cache of tablespaces that the server does not open with
    O_DIRECT before their extents are looked up.

    ``chunk_frames``: frames that are worked on at a time; bounds memory.

    ``cpu_share``: of all of the guest's processors, that the search through memory takes at least
    while others leave less, as long as it does not last more than ``time_limit`` seconds.

    ``min_mapping_bytes``: smaller anonymous mappings of the server are not searched.
    """

    volume_names: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: types.MappingProxyType({})
    )
    include_dirty: bool = False
    sync_buffered: bool = True
    chunk_frames: int = 4096
    cpu_share: float = 0.02
    time_limit: float = 5.0
    min_mapping_bytes: int = 1 << 20
