# SPDX-License-Identifier: Apache-2.0
"""Part ``evacuation``: how soon a database is itself again when its guest has died.

A real MariaDB on a loop device whose reads are limited is killed under load and started again, with
the same load from the first moment on: cold, with its own load at startup, and warmed up by the
agent. Of these runs only ratios mean anything.
"""

import contextlib
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nova_dmigrate.agent import hot_pages, hotlist_keeper, processes, service
from nova_dmigrate.agent.database import Login
from tests.lab import databases
from tests.lab import processes as lab

MODES = ("cold", "own", "agent")
POOL_MB = 512
#: One table that nearly fills the pool: 230 bytes a row, with its index.
_ROWS = 1_500_000
#: What the volume reads in a second.
READS, READ_BYTES = 1000, 100 << 20
#: Less than the machine can do, so that what it did before is the same in each run.
_THREADS, _RATE = 4, 100
_SETTLE, _FORMER = 5, 10
_SHARE = 0.9
#: Seconds over which the throughput is judged, and after which a run ends at the latest.
_WINDOW, _LONGEST = 3, 100
_CGROUP = Path("/sys/fs/cgroup/blkio/dmigrate-bench")
_ON = "innodb-buffer-pool-load-at-startup="


class LimitedMariaDB(databases.MariaDB):
    """Its reads of the volume are limited from its first moment on."""

    load_at_startup = False

    def _command(self) -> list[str]:
        enter = f'echo $$ >{_CGROUP}/cgroup.procs; exec "$@"'
        own = f"--{_ON}{'ON' if self.load_at_startup else 'OFF'}"
        return ["sh", "-c", enter, "sh", *super()._command(), own]


@contextlib.contextmanager
def _cgroup() -> Iterator[None]:
    _CGROUP.mkdir(exist_ok=True)
    try:
        yield
    finally:
        # Until the last process is gone
        for _ in range(50):
            with contextlib.suppress(OSError):
                _CGROUP.rmdir()
                break
            time.sleep(0.1)


def _limit(device: Path, limited: bool) -> None:
    number = (Path("/sys/class/block") / device.name / "dev").read_text().strip()
    for name, value in (("iops", READS), ("bps", READ_BYTES)):
        path = _CGROUP / f"blkio.throttle.read_{name}_device"
        path.write_text(f"{number} {value if limited else 0}\n")


class Load:
    """sysbench; ``rates``: transactions of each second so far."""

    def __init__(self, server: databases.Server) -> None:
        argv = server.sysbench(
            "run",
            "--time=0",
            f"--threads={_THREADS}",
            f"--rate={_RATE}",
            "--report-interval=1",
            f"--table-size={_ROWS}",
            "--rand-type=uniform",
            "--mysql-ignore-errors=all",
            test="oltp_read_write",
        )
        self._process = lab.spawn(argv, stdout=subprocess.PIPE, text=True)
        self.rates: list[float] = []

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        lab.end(self._process)

    def second(self) -> float:
        """Wait for the next second; its transactions."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            match = re.search(r"tps: ([0-9.]+)", line)
            if match:
                self.rates.append(float(match[1]))
                return self.rates[-1]
        raise databases.DatabaseError("sysbench has ended early")


def measure() -> list[dict[str, Any]]:
    """One row for each mode."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_cgroup())
        options = (
            "innodb-log-file-size=128M",
            "innodb-flush-method=O_DIRECT",
            # The disk beneath is not what is measured
            "innodb-flush-log-at-trx-commit=0",
        )
        server, volume = stack.enter_context(
            databases.running(
                lambda directory, volume: LimitedMariaDB(directory, volume, options, f"{POOL_MB}M"),
                megabytes=3 * POOL_MB,
            )
        )
        server.fill(tables=1, rows=_ROWS)
        state = stack.enter_context(lab.workspace())
        rows = [_run(server, volume.device, state, mode) for mode in MODES]
    for row in rows:
        row["throughput_of_cold"] = round(row["seconds"] / rows[0]["seconds"], 2)
        row["pool_of_cold"] = round(row["pool_seconds"] / rows[0]["pool_seconds"], 2)
    return rows


def _run(server: LimitedMariaDB, device: Path, state: Path, mode: str) -> dict[str, Any]:
    _limit(device, False)
    server.sql("SELECT COUNT(DISTINCT pad) FROM sbtest1", "sbtest")
    with Load(server) as load:
        for _ in range(_SETTLE + _FORMER):
            load.second()
        former = statistics.mean(load.rates[_SETTLE:])
    pages = _make_list(server, state)
    # What recovery has to do fills the pool, too: let it be little
    server.flush()
    with Load(server) as load:
        load.second()
        server.kill()
    server.load_at_startup = mode != "cold"
    _limit(device, True)
    server.start()
    began = time.monotonic()
    made = _hot_pages(server, state, 0.0)
    try:
        if mode == "agent":
            made.start()
            made.warm_up()
        with Load(server) as load:
            filled = None
            while not _recovered(load.rates, former) and len(load.rates) < _LONGEST:
                load.second()
                if filled is None and _in_pool(server) >= _SHARE * pages:
                    filled = time.monotonic() - began
            seconds = len(load.rates) - _WINDOW + 1
            while (filled is None or len(load.rates) < 30) and len(load.rates) < _LONGEST:
                load.second()
                if filled is None and _in_pool(server) >= _SHARE * pages:
                    filled = time.monotonic() - began
    finally:
        made.stop()
    return {
        "mode": mode,
        "former_tps": round(former),
        "pages": pages,
        "seconds": seconds,
        "first_10_s": round(statistics.mean(load.rates[:10]) / former, 2),
        "first_30_s": round(statistics.mean(load.rates[:30]) / former, 2),
        # At least so long, if it was never filled
        "pool_seconds": round(filled or time.monotonic() - began, 1),
    }


def _recovered(rates: list[float], former: float) -> bool:
    return len(rates) >= _WINDOW and statistics.mean(rates[-_WINDOW:]) >= _SHARE * former


def _in_pool(server: databases.Server) -> int:
    name = "Innodb_buffer_pool_pages_data"
    return int(server.sql(f"SHOW GLOBAL STATUS LIKE '{name}'").split()[1])


def _hot_pages(server: databases.Server, state: Path, interval: float) -> hot_pages.HotPages:
    settings = service.AgentSettings(
        state_directory=state,
        selector=processes.Selector(socket=str(server.socket)),
        login=Login("", "root"),
        hot_pages=hot_pages.HotPagesSettings(
            hotlist_keeper.ListSettings(interval=interval, share=1.0), READ_BYTES
        ),
    )
    return service.make_hot_pages(settings)


def _make_list(server: databases.Server, state: Path) -> int:
    """Have the agent make a list; how many pages are on it."""
    (process,) = processes.find_servers(processes.Selector(socket=str(server.socket)))
    path = Path(process.path("ib_buffer_pool"))
    path.unlink(missing_ok=True)
    made = _hot_pages(server, state, 3600.0)
    made.start()
    try:
        while not path.exists():
            time.sleep(0.1)
    finally:
        made.stop()
    return path.read_bytes().count(b"\n")


if __name__ == "__main__":
    for row in measure():
        print(row, flush=True)
