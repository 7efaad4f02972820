# SPDX-License-Identifier: Apache-2.0
"""Each side of a map in a process of its own, so that its peak of memory is its own.

``python -m tests.scale.sides ROLE ORDER``: ORDER is a JSON object, the answer a line of JSON. What
is done is the product's own; only the server in the guest is made up (`synthetic`), and QEMU's
virtio-serial port is a pair of sockets.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nova_dmigrate.agent import (
    assembly,
    cancellation,
    location,
    maps,
    options,
    pacing,
    scan,
)
from nova_dmigrate.buffermap import PAGE_SIZE, BufferMap, MapLimits
from nova_dmigrate.memory_layout import MemoryLayout
from nova_dmigrate.relay.digest import DIGEST_SIZE
from nova_dmigrate.relay.entries import EntryTable
from nova_dmigrate.relay.pagemap import PageMap
from nova_dmigrate.relay.readplan import ReadPlanner
from nova_dmigrate.rpc import lines, messages
from nova_dmigrate.rpc.channel import ChannelServer, ChannelTransport
from nova_dmigrate.rpc.client import AgentClient, ClientSettings
from nova_dmigrate.rpc.dispatcher import Dispatcher
from nova_dmigrate.stream.elements import RamBlock
from tests.scale import synthetic

Report = dict[str, Any]

#: As ``[buffer_map]/max_pages`` can be set at most.
LIMITS = MapLimits(max_pages=1 << 32, max_chunk_bytes=messages.MAX_CHUNK_BYTES)
_PATIENCE = 7200.0
#: Pages that are looked up at once: 1 MiB of the stream.
_BATCH = 256
_MOST_LOOKUPS = 1 << 22
#: As the options have it: gaps that are read through, and one read, in blocks.
_MERGE_GAP, _READ_BLOCKS = 16, 256


class ServerMap:
    """As `agent.mapper.ServerMap` makes a map, of a server that is made up.

    :ivar report: what each step took, of a processor; ``made_up_s`` is no work of the agent's.
    """

    def __init__(self, shape: synthetic.Shape) -> None:
        self._shape = shape
        self._cancellation = cancellation.Cancellation()
        self.report: Report = {}
        self.summary = _Summary()

    def cancel(self) -> None:
        self._cancellation.cancel()

    def __iter__(self) -> Iterator[BufferMap]:
        table = location.PlaceTable(synthetic.files(self._shape))
        process = synthetic.Memory(self._shape, table)
        pace = pacing.Pace(1, 0, self._cancellation)
        began = time.process_time()
        search = scan.Scan(table, synthetic.FRAME, options.MapOptions(), pace, self._cancellation)
        found = search.run(process)
        self.report = {
            "search_cpu_s": time.process_time() - began - process.seconds,
            "made_up_s": process.seconds,
            "frames": len(found),
            "search_peak_mb": peak_mb(),
        }
        blocks = location.BlockTable(table, synthetic.FRAME)
        seconds, began = 0.0, time.monotonic()
        for part in assembly.assemble(found, blocks, search.excluded):
            seconds += time.monotonic() - began
            yield part
            del part  # it is large, and the next one is about to be made
            began = time.monotonic()
        self.report["assemble_s"] = seconds + time.monotonic() - began


@dataclasses.dataclass(frozen=True)
class _Summary:
    findings: tuple[Any, ...] = ()


class _Service:
    """The methods of the agent that concern the map; counts what goes over the wire."""

    def __init__(self, store: maps.MapStore) -> None:
        self._store = store
        self.wire_bytes = 0
        empty = {"id": "0" * 32, "result": dataclasses.asdict(messages.Chunk(0, ""))}
        self._envelope = len(lines.encode(empty))

    def map_begin(self, arguments: messages.MapArguments) -> messages.MapState:
        return self._store.begin(arguments.max_chunk_bytes)

    def map_state(self, arguments: messages.MapReference) -> messages.MapState:
        return self._store.state(arguments.map_id)

    def map_chunk(self, arguments: messages.ChunkArguments) -> messages.Chunk:
        chunk = self._store.chunk(arguments.map_id, arguments.index)
        self.wire_bytes += len(chunk.data) + self._envelope
        return chunk

    def map_end(self, arguments: messages.MapReference) -> messages.Done:
        return self._store.end(arguments.map_id)


def agent(shape: synthetic.Shape, descriptor: int, directory: Path) -> Report:
    """Make a map when it is asked for, and hand out its chunks, until standard input ends."""
    made = ServerMap(shape)
    store = maps.MapStore(lambda: maps.GuestMap([made]), directory)  # type: ignore[list-item]
    service = _Service(store)
    server = ChannelServer(Dispatcher(service, messages.AGENT), lambda: os.dup(descriptor))
    server.start()
    sys.stdin.read()
    server.stop()
    return {**made.report, "wire_bytes": service.wire_bytes, "peak_mb": peak_mb()}


class _TimedTransport(ChannelTransport):
    """Remembers when the first chunk was asked for."""

    began: float | None = None

    def call(self, method: str, request_id: str, arguments: dict[str, Any], timeout: float) -> Any:
        if method == "map_chunk" and self.began is None:
            self.began = time.monotonic()
        answer = super().call(method, request_id, arguments, timeout)
        if method == "map_chunk":
            self.fetched = time.monotonic()
        return answer


def host(descriptor: int, path: Path) -> Report:
    """Fetch the map from the agent as the orchestration does, and write it for the source relay."""
    program = peak_mb()
    settings = ClientSettings(timeout=_PATIENCE, map_timeout=_PATIENCE)
    transport = _TimedTransport("scale", lambda: os.dup(descriptor))
    with AgentClient("scale", transport, settings) as client:
        state = client.save_map(path, LIMITS)
    assert transport.began is not None
    return {
        "pages": state.pages,
        "chunks": state.chunks,
        "chunk_bytes": state.size,
        "build_s": state.seconds,
        "fetch_s": transport.fetched - transport.began,
        "program_mb": program,
        "peak_mb": peak_mb(),
    }


def source(path: Path, layout: Path, guest_bytes: int) -> Report:
    """Load, serialise and place the map as the source relay does, and look pages up in it as they
    come in the stream."""
    program, began = peak_mb(), time.monotonic()
    loaded = BufferMap.load(path, LIMITS)
    read, load_peak = time.monotonic(), peak_mb()
    chunks = tuple(loaded.to_chunks())
    serialised = time.monotonic()
    placed = _placed(loaded, layout, guest_bytes)
    ready = time.monotonic()
    held = loaded.nbytes
    del loaded, chunks
    looked, hits, seconds = _look_up(placed)
    return {
        "load_s": read - began,
        "serialise_s": serialised - read,
        "place_s": ready - serialised,
        "entries": len(placed),
        "map_bytes": held,
        "held_bytes": placed.position.nbytes + placed.volume_position.nbytes,
        "lookups_per_s": looked / seconds,
        "hit_share": hits / looked,
        "program_mb": program,
        "load_peak_mb": load_peak,
        "peak_mb": peak_mb(),
    }


def destination(path: Path, layout: Path, guest_bytes: int) -> Report:
    """Load and place the map, and see every page of it through to its end as the destination relay
    does: read first, referred to later, with the right digest."""
    program, began = peak_mb(), time.monotonic()
    placed = _placed(BufferMap.load(path, LIMITS), layout, guest_bytes)
    table = EntryTable(len(placed))
    planner = ReadPlanner(placed, table, merge_gap=_MERGE_GAP, read_size=_READ_BLOCKS)
    ready = time.monotonic()
    digests = np.zeros((_READ_BLOCKS, DIGEST_SIZE), np.uint8)
    plans = 0
    while (plan := planner.next()) is not None:
        plans += 1
        entries = plan.entries
        table.blocks(entries, digests[: len(entries)])
        table.references(entries, entries.astype(np.uint32), digests[: len(entries)])
    seconds = time.monotonic() - ready
    return {
        "ready_s": ready - began,
        "entries": len(placed),
        "hits": table.hits,
        "pages_per_read": len(placed) / max(1, plans),
        "resolved_per_s": len(placed) / seconds,
        "program_mb": program,
        "peak_mb": peak_mb(),
    }


def _placed(loaded: BufferMap, layout: Path, guest_bytes: int) -> PageMap:
    memory = MemoryLayout.from_mtree(layout.read_text())
    return PageMap.build([RamBlock("pc.ram", guest_bytes)], loaded, memory)


def _look_up(placed: PageMap) -> tuple[int, int, float]:
    """Look batches up all over memory: how many pages, how many of them are mapped, seconds."""
    step = max(1, placed.total_pages // _MOST_LOOKUPS)
    hits, looked, began = 0, 0, time.monotonic()
    for first in range(0, placed.total_pages - _BATCH, _BATCH * step):
        offsets = np.arange(first, first + _BATCH, dtype=np.uint64) * np.uint64(PAGE_SIZE)
        hits += int(np.count_nonzero(placed.entries(placed.positions(0, offsets)) >= 0))
        looked += _BATCH
    return looked, hits, time.monotonic() - began


def peak_mb() -> float:
    """Peak of resident memory of this process, in MB. What getrusage() says is no less than the
    parent's was."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def main() -> None:
    role, text = sys.argv[1:]
    order = json.loads(text)
    # Whoever else uses this machine is spared if there is not enough
    Path("/proc/self/oom_score_adj").write_text("1000")
    if role == "agent":
        shape = synthetic.Shape(**order["shape"])
        report = agent(shape, order["descriptor"], Path(order["directory"]))
    elif role == "host":
        report = host(order["descriptor"], Path(order["path"]))
    else:
        relay = source if role == "source" else destination
        report = relay(Path(order["path"]), Path(order["layout"]), order["guest_bytes"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
