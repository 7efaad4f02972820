# SPDX-License-Identifier: Apache-2.0
"""The buffer map of an agent, as whoever reads its file has it."""

import tempfile
from pathlib import Path

from nova_dmigrate.buffermap import BufferMap, MapLimits
from nova_dmigrate.rpc.client import AgentClient


def fetch_map(client: AgentClient, limits: MapLimits | None = None) -> BufferMap:
    """Have a map made, fetched, and read.

    :raises AgentUnreachable, AgentRefused, BufferMapError: as its client and its reader do.
    """
    limits = limits or MapLimits()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "map"
        client.save_map(path, limits)
        return BufferMap.load(path, limits)
