# SPDX-License-Identifier: Apache-2.0
"""Part ``agent``: what a buffer map costs the guest, by size of the buffer pool.

A real MariaDB on a loop device, whose pool is filled by scans; this machine plays the guest.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.lab import databases, processes

POOLS_GIB = (1, 2, 4, 8)
_GIB = 1 << 30
#: A table fills a pool of 1 GiB, with room for the load's: two rows on each page of 16 KiB.
_ROWS = 112_000
_ROW_BYTES = 7800
_LOAD_TABLES, _LOAD_ROWS = 2, 100_000
#: Enough to keep all processors busy: one alone gets quicker when somebody else keeps them awake.
_LOAD_THREADS = 2 * (os.cpu_count() or 1)
_OPTIONS = (
    "innodb-log-file-size=512M",
    # The load is bound by the processor, as it has to be to feel the agent at all
    "innodb-flush-log-at-trx-commit=0",
    "innodb-flush-method=O_DIRECT",
)
_MAPS = 5
#: Pairs of turns with and without a map, and seconds in which the load gets going before.
_PAIRS, _SETTLE = 12, 5.0


def pools() -> tuple[int, ...]:
    """The sizes, in GiB, for which there are disk and memory."""
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    # What the kernel keeps in caches is free as well
    memory = _available_memory()
    return tuple(size for size in POOLS_GIB if (size + 3) * _GIB < min(disk, memory))


def _available_memory() -> int:
    """Bytes that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/meminfo does not tell the available memory")


class Worker:
    """The agent's part, in a process (`tests.bench.mapping`). A context manager."""

    def __init__(self, pid: int, device: str, directory: Path) -> None:
        self._process = processes.spawn(
            [sys.executable, "-m", "tests.bench.mapping", str(pid), device, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        processes.end(self._process)

    def map(self) -> dict[str, Any]:
        """Make a map; what it took.

        :raises RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("map\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the mapping process has ended")
        result: dict[str, Any] = json.loads(line)
        return result


class Bench:
    """A volume with data for the largest pool; servers with pools of any size on it."""

    def __init__(self, directory: Path, volume: databases.LoopVolume) -> None:
        self._directory = directory
        self._volume = volume
        self._tables = 0

    def _fill(self, server: databases.MariaDB, tables: int) -> None:
        server.sql("CREATE DATABASE bench")
        for number in range(tables):
            # Into an empty table, without checks: InnoDB builds it in bulk, without undo
            server.sql(
                "SET unique_checks=0, foreign_key_checks=0;"
                f"CREATE TABLE fill{number} (id INT PRIMARY KEY, body VARCHAR({_ROW_BYTES})"
                " NOT NULL) CHARACTER SET latin1;"
                f"INSERT INTO fill{number} SELECT seq, RPAD(MD5(seq), {_ROW_BYTES}, MD5(-seq))"
                f" FROM seq_1_to_{_ROWS}",
                "bench",
            )
        server.fill(_LOAD_TABLES, _LOAD_ROWS)
        server.flush(timeout=120)
        self._tables = tables

    @contextmanager
    def _server(self, gib: int) -> Iterator[databases.MariaDB]:
        server = databases.MariaDB(self._directory, self._volume, _OPTIONS, f"{gib}G")
        if not self._tables:
            server.install()
        server.start()
        try:
            if not self._tables:
                self._fill(server, gib)
            yield server
        finally:
            server.stop()

    def row(self, gib: int) -> dict[str, Any]:
        """One row ``agent`` of bench.json; the largest first, which makes the data for all."""
        with self._server(gib) as server:
            for number in range(gib):
                server.sql(f"SELECT SUM(LENGTH(body)) FROM fill{number}", "bench")
            with Worker(server.pid, self._volume.name, self._directory) as worker:
                made = [worker.map() for _ in range(_MAPS)]
                last = made[-1]
                tps, change = compare(server, worker)
            map_s = statistics.median(each["map_s"] for each in made)
            filled = last["pool_frames"] * 16384 / _GIB
            return {
                "pool_gib": gib,
                "map_s": round(map_s, 3),
                "map_s_per_gib": round(map_s / filled, 3),
                "cpu_s_per_gib": round(
                    statistics.median(each["cpu_s"] for each in made) / filled, 3
                ),
                "ready_s": round(statistics.median(each["ready_s"] for each in made), 3),
                "peak_rss_mb": round(last["peak_rss_mb"], 1),
                "mapped_pages": last["mapped_pages"],
                "wire_bytes_per_page": round(last["wire_bytes"] / last["mapped_pages"], 2),
                "tps": round(tps, 1),
                "tps_change": round(change, 4),
            }


def compare(server: databases.MariaDB, worker: Worker) -> tuple[float, float]:
    """Transactions a second of a running load without maps, and by what share they change while a
    map is made.

    A turn is one map, or as long without one; each turn is compared with its neighbour, because
    what else happens on the machine is in both of them. Medians.
    """
    rates: tuple[list[float], list[float]] = ([], [])
    options = (
        f"--tables={_LOAD_TABLES}",
        f"--table-size={_LOAD_ROWS}",
        f"--threads={_LOAD_THREADS}",
    )
    with server.load(*options):
        time.sleep(_SETTLE)
        seconds = _SETTLE
        for turn in range(2 * _PAIRS):
            mapping = bool((turn + turn // 2) % 2)  # no, yes, yes, no, ...: drifts cancel out
            before, began = _commits(server), time.monotonic()
            if mapping:
                worker.map()
                seconds = time.monotonic() - began
            else:
                time.sleep(seconds)
            after, ended = _commits(server), time.monotonic()
            rates[mapping].append((after - before) / (ended - began))
    changes = [with_maps / without - 1 for without, with_maps in zip(*rates, strict=True)]
    return statistics.median(rates[0]), statistics.median(changes)


def _commits(server: databases.MariaDB) -> int:
    return int(server.sql("SHOW GLOBAL STATUS LIKE 'Com_commit'").split()[1])


def measure(directory: Path) -> list[dict[str, Any]]:
    """Rows ``agent``, one for each size of the pool for which there is room.

    :raises RuntimeError: the machine cannot run the database at all.
    """
    reason = databases.available()
    sizes = pools()
    if reason is not None or not sizes:
        raise RuntimeError(f"part agent: {reason or 'too little disk or memory'}")
    os.chmod(directory, 0o755)  # the server's user has to get in
    rows = []
    with databases.LoopVolume(directory, (sizes[-1] + 2) << 10) as volume:
        bench = Bench(directory, volume)
        for size in reversed(sizes):
            rows.append(bench.row(size))
            print(f"pool of {size} GiB: {rows[-1]['map_s']} s", file=sys.stderr, flush=True)
    return rows[::-1]
