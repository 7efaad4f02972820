# SPDX-License-Identifier: Apache-2.0
"""A load on a database server, and its throughput and latency over time.

with Load(server, "oltp_read_write", rows, directory) as load:
    ...
    load.tps(begin, end)
"""

import contextlib
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.lab.demo.clients import Client, ClientError, Server
from tests.lab.processes import end

THREADS = 2
#: Of sysbench.
TABLES = 4
SYSBENCH_LOADS = ("oltp_read_only", "oltp_read_write", "oltp_write_only")
_READY_PATIENCE = 60.0
_RESTART = 0.5
_REPORT = re.compile(r"\[ \S+ \] .* tps: ([\d.]+) (?:.* )?lat \(ms,\d+%\): ([\d.]+) ")


def sysbench(server: Server, name: str, rows: int, rate: float = 0) -> list[str]:
    """The command line of one of sysbench's own loads, which does not end by itself.

    :param rate: transactions a second that are asked for; 0 for as many as there can be.
    """
    where = (
        [f"--mysql-socket={server.socket}"] if server.socket else [f"--mysql-host={server.host}"]
    )
    return [
        *("sysbench", name, "--db-driver=mysql", *where, f"--mysql-user={server.user}"),
        *(f"--mysql-password={server.password}", "--mysql-ignore-errors=all"),
        *(f"--tables={TABLES}", f"--table-size={rows}", f"--threads={THREADS}"),
        *("--time=0", "--report-interval=1", "--percentile=95", f"--rate={rate:g}", "run"),
    ]


class Load(Client):
    """A load at work. Its program tells every second what it has done, as sysbench does."""

    def __init__(self, server: Server, argv: Sequence[str], directory: Path) -> None:
        """:param argv: its command line, as that of `sysbench`.
        :raises ClientError: it does not begin to work.
        """
        self._server, self._argv = server, argv
        super().__init__(self._start(directory / "load.log"), directory / "load.log")
        self._stopped = threading.Event()
        # Seconds by time.monotonic() at the end of each interval, transactions, latency in ms
        self._reports: list[tuple[float, float, float]] = []
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, name="load", daemon=True)
        self._reader.start()
        deadline = time.monotonic() + _READY_PATIENCE
        while not any(tps for _, tps, _ in self._reports):
            if time.monotonic() > deadline:
                self.stop()
                raise ClientError(f"the load does not begin: {self.last_words()}")
            time.sleep(0.1)

    def reports(self) -> NDArray[np.float64]:
        """(n, 3): end of each second, its transactions, the 95th percentile of latency in ms."""
        return np.array(self._reports[:], np.float64).reshape(-1, 3)

    def tps(self, since: float, until: float) -> float:
        """Transactions a second in a span of time; whole seconds of which most is in it."""
        reports = self.reports()
        middle = reports[:, 0] - 0.5
        inside = reports[(middle >= since) & (middle <= until), 1]
        if not len(inside):  # shorter than a second
            return float(np.interp((since + until) / 2, middle, reports[:, 1]))
        return float(inside.mean())

    def recovered(self, since: float, wanted: float, window: float = 3.0) -> float | None:
        """Seconds from a moment until the mean of the following ``window`` is ``wanted`` at least.

        None: it has not been so far.
        """
        reports = self.reports()
        after = reports[reports[:, 0] > since]
        size = int(window)
        for first in range(len(after) - size + 1):
            if after[first : first + size, 1].mean() >= wanted:
                return max(float(after[first, 0]) - 1.0 - since, 0.0)
        return None

    def begin_anew(self) -> None:
        """End its program, which may wait for a server that is gone; another one follows."""
        self._process.kill()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It asks for nothing meanwhile, with transactions open; another one follows."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.begin_anew()

    def stop(self) -> None:
        self._stopped.set()
        while self._reader.is_alive():
            super().stop()
            self._reader.join(_RESTART)

    def last_words(self) -> str:
        return "\n".join([*self._said[-20:], super().last_words()])

    def _start(self, log: Path) -> "subprocess.Popen[str]":
        with open(log, "ab") as errors:
            return self._server.start(self._argv, stdout=subprocess.PIPE, stderr=errors, text=True)

    def _read(self) -> None:
        while True:
            assert self._process.stdout is not None
            with contextlib.suppress(ValueError):  # closed
                for line in self._process.stdout:
                    self._note(line)
            if self._stopped.wait(_RESTART):
                return
            # It gives up when it cannot connect again at once
            end(self._process)
            self._process = self._start(self._log)

    def _note(self, line: str) -> None:
        found = _REPORT.match(line)
        if found:
            self._reports.append((time.monotonic(), float(found[1]), float(found[2])))
        else:
            self._said.append(line.rstrip())
