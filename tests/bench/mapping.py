# SPDX-License-Identifier: Apache-2.0
"""The agent's work on one map in a process of its own, so that its memory can be measured.

``python -m tests.bench.mapping PID DEVICE DIRECTORY``: maps server PID, whose data lie on DEVICE,
once for each line that it reads, and answers each with a line of JSON. DIRECTORY is for the map's
file. It builds, serialises and keeps maps as the agent does, and is as modest about the processor
(the unit file's ``Nice``).
"""

import dataclasses
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from nova_dmigrate.agent import mapper, maps, options, processes
from nova_dmigrate.buffermap import BufferMap
from nova_dmigrate.rpc import lines, messages

_NICE = 5
_CHUNK = messages.MapArguments().max_chunk_bytes


class Mapper:
    """Makes maps of one server, and remembers what the last took."""

    def __init__(self, pid: int, device: str, directory: Path) -> None:
        (self._server,) = processes.find_servers(processes.Selector(pid=pid))
        self._settings = options.MapOptions(volume_names={device: "bench-volume"})
        self._store = maps.MapStore(self._build, directory)
        self._summary: mapper.MapSummary | None = None
        self._cpu_s = 0.0

    def _build(self) -> tuple[BufferMap, tuple[Any, ...]]:
        began = time.process_time()
        built, self._summary = mapper.build_map(self._server, self._settings)
        self._cpu_s = time.process_time() - began
        return built, self._summary.findings

    def run(self) -> dict[str, Any]:
        """One map: ``map_s`` to build it (``cpu_s`` of that on a processor), ``ready_s`` with
        serialising it into chunks."""
        state = self._store.begin(_CHUNK)
        while state.state == "building":
            time.sleep(0.005)
            state = self._store.state(state.map_id)
        if state.state != "ready" or self._summary is None:
            raise RuntimeError(f"no map: {state.message}")
        return {
            "map_id": state.map_id,
            "chunks": state.chunks,
            "map_s": self._summary.seconds,
            "cpu_s": self._cpu_s,
            "ready_s": state.seconds,
            "pool_frames": self._summary.pool_frames,
            "mapped_pages": state.pages,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    def wire_bytes(self, map_id: str, chunks: int) -> int:
        """Bytes of all answers that carry the map, as lines of JSON with base64 in it."""
        return sum(
            len(lines.encode(dataclasses.asdict(self._store.chunk(map_id, index))))
            for index in range(chunks)
        )


def main() -> None:
    pid, device, directory = sys.argv[1:]
    os.nice(_NICE)
    work = Mapper(int(pid), device, Path(directory))
    for _ in sys.stdin:
        result = work.run()
        peak = result["peak_rss_mb"]  # of the map, not of what this process asks about it
        result["wire_bytes"] = work.wire_bytes(result["map_id"], result["chunks"])
        print(json.dumps(result | {"peak_rss_mb": peak}), flush=True)


if __name__ == "__main__":
    main()
