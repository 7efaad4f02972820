# SPDX-License-Identifier: Apache-2.0
"""What a relay tells of itself: live progress on a socket, and a summary with a time series at the
end.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oslo_log import log

LOG = log.getLogger(__name__)

#: Samples a second of the time series.
SAMPLE_RATE = 10
#: Samples kept; when there are more, every second one goes and the interval doubles.
_SERIES_LIMIT = 36000
_REQUEST_LIMIT = 4096
_MAX_RATE = 1 << 50

Report = dict[str, Any]


class Stages:
    """Seconds spent in each stage of a migration; one stage is the current one."""

    def __init__(self, first: str) -> None:
        self.current = first
        self._since = time.monotonic()
        self._seconds: dict[str, float] = {}

    def enter(self, stage: str) -> None:
        """The next stage begins."""
        if stage != self.current:
            now = time.monotonic()
            self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
            self.current, self._since = stage, now

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, the current one included."""
        seconds = dict(self._seconds)
        seconds[self.current] = seconds.get(self.current, 0.0) + time.monotonic() - self._since
        return {stage: round(value, 4) for stage, value in seconds.items()}


class Sampler:
    """Calls ``sample`` ten times a second and keeps its rows as the time series.

    :param sample: called with the time (monotonic seconds); returns one row of cumulative figures.
    """

    def __init__(self, sample: Callable[[float], Report]) -> None:
        self._sample = sample
        self._rows: list[Report] = []
        self._begin = time.monotonic()
        self._every = 1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> list[Report]:
        """End; returns the series, oldest first, each row with ``t`` in seconds from the start."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        return self._rows

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(1 / SAMPLE_RATE):
            now = time.monotonic()
            row = self._sample(now)
            number += 1
            if number % self._every:
                continue
            self._rows.append({"t": round(now - self._begin, 3), **row})
            if len(self._rows) > _SERIES_LIMIT:
                del self._rows[::2]
                self._every *= 2


class ControlServer:
    """Answers requests on a UNIX socket, one JSON object a line: ``{"command": "progress"}``,
    ``"cancel"`` (the answer says whether it was possible), or ``"limit"`` with
    ``network_bandwidth`` and ``volume_bandwidth`` (bytes a second, 0 for no cap), which are in
    effect at once; the source's also ``"map"`` with ``buffer_map`` and ``memory_layout`` (paths of
    files, see `relay.session`).

    :param limit: takes network and volume bandwidth; a relay heeds the one that it has a use for.
    :param use_map: takes the two paths; None where there is no use for a map.

    Only the owner of the socket file may connect (mode 0600).
    """

    def __init__(
        self,
        path: Path,
        progress: Callable[[], Report],
        cancel: Callable[[], bool],
        limit: Callable[[float, float], None],
        use_map: Callable[[Path, Path], None] | None = None,
    ) -> None:
        self._path = path
        self._progress = progress
        self._cancel = cancel
        self._limit = limit
        self._use_map = use_map
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(mask)
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and remove the socket."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                # One question after the other: a client that is slow to ask is not waited for.
                peer.settimeout(1.0)
                try:
                    line = peer.makefile("rb").readline(_REQUEST_LIMIT)
                    peer.sendall(json.dumps(self._answer(line)).encode() + b"\n")
                except OSError as error:
                    LOG.debug("Control connection on %s broke: %s", self._path, error)

    def _answer(self, line: bytes) -> Report:
        try:
            request = json.loads(line)
            command = request["command"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {"error": "expected a JSON object with a command"}
        if command == "progress":
            return self._progress()
        if command == "cancel":
            return {"cancelled": self._cancel()}
        if command == "limit":
            rates = [request.get(f"{kind}_bandwidth") for kind in ("network", "volume")]
            if not all(_is_rate(rate) for rate in rates):
                return {"error": "expected network_bandwidth and volume_bandwidth, 0 or more"}
            self._limit(*rates)
            return {"limited": True}
        if command == "map" and self._use_map is not None:
            paths = [request.get(name) for name in ("buffer_map", "memory_layout")]
            if not all(isinstance(path, str) and path for path in paths):
                return {"error": "expected buffer_map and memory_layout, paths of files"}
            self._use_map(*map(Path, paths))
            return {"loading": True}
        return {"error": f"unknown command {command!r}"}


def _is_rate(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MAX_RATE
    )


def ask(path: Path, command: str, timeout: float = 5.0, **values: float | str) -> Report:
    """Ask the relay whose control socket is at ``path``; returns its answer.

    :param values: what goes with the command.
    :raises OSError: nobody answers there.
    :raises ValueError: what answers is not a relay.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(timeout)
        peer.connect(str(path))
        peer.sendall(json.dumps({"command": command, **values}).encode() + b"\n")
        answer = json.loads(peer.makefile("rb").readline())
    if not isinstance(answer, dict):
        raise ValueError(f"unexpected answer {answer!r}")
    return answer


def write_summary(path: Path, summary: Report) -> None:
    """Write a summary so that whoever sees the file sees all of it.

    A failure is logged only: how the migration ended does not depend on it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(summary, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        LOG.error("The summary cannot be written: %s", error)
