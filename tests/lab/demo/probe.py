# SPDX-License-Identifier: Apache-2.0
"""Downtime as a client sees it: one connection, a trivial question every few ms, and the longest
time without an answer.

    with Probe(server, directory) as probe:
        begin = time.monotonic()
        ...                                     # migrate
        silence = probe.silence(begin, time.monotonic())

The client writes two times for each answer, when it has asked and when the answer was there, as
float64 of time.monotonic().
"""

import contextlib
import dataclasses
import os
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pymysql
from numpy.typing import NDArray

from tests.lab.demo.clients import (
    Client,
    ClientError,
    Server,
    parser,
    server_of,
    until_asked_to_end,
)

#: Seconds between questions. An emulated server takes some milliseconds for an answer.
INTERVAL = 0.01
_RETRY = 0.05
_READY_PATIENCE = 60.0
_ANSWER = struct.Struct("=dd")


@dataclasses.dataclass(frozen=True)
class Silence:
    """The longest time between two answers. ``ordinary``: what it is otherwise, the median.

    Seconds; ``begin`` and ``end`` by time.monotonic().
    """

    begin: float
    end: float
    ordinary: float

    @property
    def downtime(self) -> float:
        """For how long no client was served."""
        return max(self.end - self.begin - self.ordinary, 0.0)


class Probe(Client):
    """The client at work."""

    def __init__(self, server: Server, directory: Path, interval: float = INTERVAL) -> None:
        """:param directory: for the file of its answers.
        :raises ClientError: there is no first answer in time.
        """
        self._file, log = directory / "probe", directory / "probe.log"
        self._file.touch()
        with open(log, "wb") as errors:
            process = server.start_module(
                __name__, self._file, "--interval", interval, stdout=errors, stderr=errors
            )
        super().__init__(process, log)
        deadline = time.monotonic() + _READY_PATIENCE
        while not len(self.answers()):
            if process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ClientError(f"the probe has no answer: {self.last_words()}")
            time.sleep(0.02)

    def answers(self) -> NDArray[np.float64]:
        """(n, 2): when each answered question was asked, when its answer came."""
        raw = self._file.read_bytes()
        return np.frombuffer(raw[: len(raw) // 16 * 16], np.float64).reshape(-1, 2)

    def silence(self, since: float, until: float) -> Silence:
        """The longest silence that touches a span of time.

        :raises ClientError: there is no answer before the span.
        """
        answered = self.answers()[:, 1]
        before = answered[answered <= since]
        if not len(before):
            raise ClientError("the probe has no answer from before")
        times = np.concatenate([before[-1:], answered[(answered > since) & (answered <= until)]])
        later = answered[answered > until]
        # A silence that is not over yet counts as well
        times = np.append(times, later[0] if len(later) else max(until, times[-1]))
        gaps = np.diff(times)
        longest = int(gaps.argmax())
        return Silence(
            float(times[longest]), float(times[longest + 1]), float(np.median(np.diff(answered)))
        )

    def latencies(self, since: float, until: float) -> NDArray[np.float64]:
        """(n, 2): times of answers in a span, and seconds that they took."""
        answers = self.answers()
        inside = answers[(answers[:, 1] >= since) & (answers[:, 1] <= until)]
        return np.column_stack([inside[:, 1], inside[:, 1] - inside[:, 0]])


def ask(server: Server, file: Path, interval: float, ended: threading.Event) -> None:
    """Ask until asked to end; after a broken connection by a new one."""
    # It must not wait behind busy emulators for its turn on the CPU
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    with open(file, "ab", buffering=0) as answers:
        while not ended.is_set():
            try:
                with server.connect() as connection, connection.cursor() as cursor:
                    while not ended.is_set():
                        asked = time.monotonic()
                        cursor.execute("SELECT 1")
                        answered = time.monotonic()
                        answers.write(_ANSWER.pack(asked, answered))
                        ended.wait(max(asked + interval - answered, 0))
            except (pymysql.err.Error, OSError) as error:
                print(f"{time.monotonic():.3f} {error!r}", file=sys.stderr, flush=True)
                ended.wait(_RETRY)


def main() -> None:
    made = parser("Ask a server a trivial question again and again.")
    made.add_argument("--interval", type=float, default=INTERVAL)
    made.add_argument("file", type=Path)
    arguments = made.parse_args()
    ask(server_of(arguments), arguments.file, arguments.interval, until_asked_to_end())


if __name__ == "__main__":
    main()
