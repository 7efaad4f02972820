# SPDX-License-Identifier: Apache-2.0
"""One map of any size: made, fetched, written, loaded, handed over and looked up; what each side
needs for it.

Two processes stand for agent and orchestration (`sides`). The relays are the real programs, with a
volume that is a sparse file, and a stream that ends before there is anything in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nova_dmigrate.buffermap import PAGE_SIZE
from tests.lab.processes import end, spawn
from tests.lab.relays import RelayPair, SavedMap, wait_until
from tests.scale import synthetic
from tests.scale.options import product_limits
from tests.unit.stream.builder import StreamBuilder

Report = dict[str, Any]

_PATIENCE = 7200.0
#: The longest that relays can be told to wait for each other.
_STALL = 600
#: Pages that are sent before the map is used.
_FIRST = 256
#: Of the memory that is there so much may be asked for.
_MOST = 0.9
#: Bytes that the agent takes for each frame, at most, as was measured. Who fetches a map holds a
#: chunk of it, whatever its size.
_FRAME_NEEDS = 40
#: And the relays for each page, the destination's as its host reckons.
_SOURCE_NEEDS = {synthetic.HUGE: 21, synthetic.SCATTERED: 23}
_DESTINATION_NEEDS = product_limits().page_memory
#: Bytes of the map itself for each page, at most, as the design has it.
_MAP_BOUND = 8
#: MB that a process may take besides, whatever the map.
_BESIDES = 64


def measure(directory: Path, shape: synthetic.Shape) -> Report:
    """All that one pool gives; what there is no room for here says so in ``refused``."""
    need = shape.frames * _FRAME_NEEDS
    return {
        "pool_gib": shape.bytes / (1 << 30),
        "guest_gib": shape.guest_bytes / (1 << 30),
        "layout": shape.layout,
        **_if_room(need, lambda: _measured(directory, shape)),
    }


def excesses(row: Report) -> list[str]:
    """What of a row has taken more memory than is reckoned with, in sentences."""
    if "refused" in row:
        return []
    pages, program, layout = row["host"]["pages"], row["host"]["program_mb"], row["layout"]
    took = {
        "agent": (row["agent"]["peak_mb"] - program, _FRAME_NEEDS // synthetic.PER_FRAME),
        "fetching": (row["host"]["peak_mb"] - program, 0),
    }
    for role, need in {"source": _SOURCE_NEEDS[layout], "destination": _DESTINATION_NEEDS}.items():
        if "refused" not in row[role]:
            took[role] = row[role]["peak_mb"] - row[role]["program_mb"], need
        if "refused" not in row["relays"]:
            took[f"{role} relay"] = row["relays"][f"{role}_peak_mb"] - program, need
    found = [
        f"{who}: {megabytes:.0f} MB, {need} bytes a page are reckoned with"
        for who, (megabytes, need) in took.items()
        if megabytes > pages * need / 1e6 + _BESIDES
    ]
    if "refused" not in row["source"] and row["source"]["map_bytes"] > pages * _MAP_BOUND:
        found.append(f"the map: {row['source']['map_bytes']} bytes, {_MAP_BOUND} a page at most")
    return [f"{row['pool_gib']:g} GiB, {layout}: {each}" for each in found]


def _measured(directory: Path, shape: synthetic.Shape) -> Report:
    path, layout = directory / "map", directory / "mtree"
    layout.write_text(synthetic.mtree(shape))
    result = {**_fetched(directory, shape, path), "file_bytes": path.stat().st_size}
    pages = result["host"]["pages"]
    order = {"path": str(path), "layout": str(layout), "guest_bytes": shape.guest_bytes}
    needs = {"source": _SOURCE_NEEDS[shape.layout], "destination": _DESTINATION_NEEDS}
    for role, need in needs.items():
        result[role] = _if_room(pages * need, lambda role=role: _alone(role, order))
    result["relays"] = _if_room(
        pages * sum(needs.values()), lambda: relays(directory, shape, path, layout)
    )
    path.unlink()
    return result


def _fetched(directory: Path, shape: synthetic.Shape, path: Path) -> Report:
    """What the agent takes to make the map, and the orchestration to fetch it and write it."""
    made = {"shape": dataclasses.asdict(shape), "directory": str(directory)}
    with contextlib.ExitStack() as stack:
        ours, theirs = (stack.enter_context(each) for each in socket.socketpair())
        agent = stack.enter_context(_side("agent", {**made, "descriptor": ours.fileno()}, ours))
        asked = {"descriptor": theirs.fileno(), "path": str(path)}
        host = stack.enter_context(_side("host", asked, theirs))
        fetched = _answer(host)
        return {"agent": _answer(agent), "host": fetched}


def relays(directory: Path, shape: synthetic.Shape, path: Path, layout: Path) -> Report:
    """What source and destination relay take when the map is handed over."""
    volume, incoming = directory / "volume", directory / "incoming"
    with open(volume, "wb") as file:
        file.truncate(shape.volume_bytes)
    sink = threading.Thread(target=_sink, args=(incoming,), daemon=True)
    sink.start()
    options = {
        "buffer_map__max_pages": 1 << 32,
        "relay__stall_timeout": _STALL,
        # What is read does not matter here
        "volume__bandwidth": 1,
    }
    pair_directory = directory / "relays"
    try:
        with RelayPair(
            pair_directory, incoming, volumes={synthetic.VOLUME: volume}, **options
        ) as pair:
            began = time.monotonic()
            pair.source.use_map(SavedMap(path, layout))
            _until_map(pair, "offered")
            offered = time.monotonic()
            with socket.socket(socket.AF_UNIX) as qemu:
                qemu.connect(str(pair.outgoing))
                stream = StreamBuilder([("pc.ram", shape.guest_bytes)]).begin().part()
                zeros = np.arange(_FIRST, dtype=np.uint64) * np.uint64(PAGE_SIZE)
                qemu.sendall(stream.zeros(0, zeros).finish().data())
                _until_map(pair, "taken")
                taken = time.monotonic()
                told = pair.source.progress() or {}
                memory = {
                    f"{relay.role}_{name}": value
                    for relay in (pair.source, pair.destination)
                    for name, value in _memory(relay.pid).items()
                }
    finally:
        volume.unlink()
    return {
        "load_s": offered - began,
        "hand_over_s": taken - offered,
        "mapped_pages": told.get("mapped_pages"),
        **memory,
    }


def _until_map(pair: RelayPair, state: str) -> None:
    """Wait for what becomes of the map.

    :raises RuntimeError: something else does.
    """

    def there() -> str | None:
        told = (pair.source.progress() or {}).get("map")
        return told if told in (state, "refused", "late") else None

    found = wait_until(there, f"the map is {state}", _PATIENCE)
    if found != state:
        raise RuntimeError(f"the map is {found}\n{pair.last_words()}")


def _sink(path: Path) -> None:
    """The destination's QEMU: takes everything."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        peer, _ = listener.accept()
        with peer:
            while peer.recv(1 << 20):
                pass


def _memory(pid: int) -> Report:
    """Peak and present resident memory of a process, MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"(VmHWM|VmRSS):\s+(\d+) kB", status))
    return {"peak_mb": int(found["VmHWM"]) / 976.5625, "held_mb": int(found["VmRSS"]) / 976.5625}


def _alone(role: str, order: Report) -> Report:
    """What one relay does with the map, without all the rest."""
    with _side(role, order) as process:
        return _answer(process)


def _if_room(need: int, run: Callable[[], Report]) -> Report:
    """What ``run`` finds, unless the machine has not ``need`` bytes of memory."""
    there = int(available_bytes() * _MOST)
    if need > there:
        return {"refused": f"{need >> 20} MiB are needed, there are {there >> 20}"}
    return run()


def available_bytes() -> int:
    """Memory that a process could have."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) << 10


@contextlib.contextmanager
def _side(
    role: str, order: Report, passed: socket.socket | None = None
) -> Iterator[subprocess.Popen[str]]:
    process = spawn(
        [sys.executable, "-m", "tests.scale.sides", role, json.dumps(order)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=() if passed is None else (passed.fileno(),),
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        yield process
    finally:
        end(process)


def _answer(process: subprocess.Popen[str]) -> Report:
    """What a side says at its end, for which its standard input ends."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args}: exit status {process.returncode}")
    report: Report = json.loads(output)
    return report
