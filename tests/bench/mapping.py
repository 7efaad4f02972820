# SPDX-License-Identifier: Apache-2.0
"""The agent's work on one map in a process of its own, so that its memory can be measured.

``python -m tests.bench.mapping PID DEVICE DIRECTORY``: maps server PID, whose data lie on DEVICE,
once for each line that it reads, and answers each with a line of JSON. DIRECTORY is for the map's
file. It builds, serialises and keeps maps as the agent does.
"""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nova_dmigrate.agent import mapper, maps, options, processes
from nova_dmigrate.buffermap import BufferMap
from nova_dmigrate.rpc import lines, messages

_CHUNK = messages.MapArguments().max_chunk_bytes


class TimedMap(mapper.ServerMap):
    """A map that notes what it takes to make its parts, without what becomes of them: ``seconds``,
    and ``cpu_s`` of that on a processor."""

    def __iter__(self) -> Iterator[BufferMap]:
        self.seconds = self.cpu_s = 0.0
        parts = super().__iter__()
        while True:
            began, cpu_began = time.monotonic(), time.process_time()
            part = next(parts, None)
            self.seconds += time.monotonic() - began
            self.cpu_s += time.process_time() - cpu_began
            if part is None:
                return
            yield part
            del part  # before the next one is made


class Mapper:
    """Makes maps of one server, and remembers what the last took."""

    def __init__(self, pid: int, device: str, directory: Path) -> None:
        (self._server,) = processes.find_servers(processes.Selector(pid=pid))
        self._settings = options.MapOptions(volume_names={device: "bench-volume"})
        self._store = maps.MapStore(self._build, directory)

    def _build(self) -> maps.GuestMap:
        self._made = TimedMap(self._server, self._settings)
        return maps.GuestMap([self._made])

    def run(self) -> dict[str, Any]:
        """One map: ``map_s`` to build it (``cpu_s`` of that on a processor), ``ready_s`` with
        serialising it into chunks."""
        state = self._store.begin(_CHUNK)
        while state.state == "building":
            time.sleep(0.005)
            state = self._store.state(state.map_id)
        if state.state != "ready":
            raise RuntimeError(f"no map: {state.message}")
        return {
            "map_id": state.map_id,
            "chunks": state.chunks,
            "map_s": self._made.seconds,
            "cpu_s": self._made.cpu_s,
            "ready_s": state.seconds,
            "pool_frames": self._made.summary.pool_frames,
            "mapped_pages": state.pages,
            "peak_rss_mb": _peak_kib() / 1024,
        }

    def wire_bytes(self, map_id: str, chunks: int) -> int:
        """Bytes of all answers that carry the map, as lines of JSON with base64 in it."""
        return sum(
            len(lines.encode(dataclasses.asdict(self._store.chunk(map_id, index))))
            for index in range(chunks)
        )


def _peak_kib() -> int:
    """Peak of resident memory. What getrusage() says is no less than the parent's was."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def main() -> None:
    pid, device, directory = sys.argv[1:]
    work = Mapper(int(pid), device, Path(directory))
    for _ in sys.stdin:
        result = work.run()
        peak = result["peak_rss_mb"]  # of the map, not of what this process asks about it
        result["wire_bytes"] = work.wire_bytes(result["map_id"], result["chunks"])
        print(json.dumps(result | {"peak_rss_mb": peak}), flush=True)


if __name__ == "__main__":
    main()
