# SPDX-License-Identifier: Apache-2.0
"""Downtime as a client of the guest sees it: the largest gap between the guest's heartbeats.

The guest's own clock stops together with the guest, so no clock loop inside it can see a downtime.
It sends a byte about every millisecond instead, and the recorder notes when each arrives, from
whichever QEMU it comes.
"""

import contextlib
import os
import select
import socket
import threading
import time
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from tests.lab.guest import Guest
from tests.lab.qmp import connect_unix


class HeartbeatRecorder:
    """Records the beats of several QEMUs of one guest; `beat on` is up to the caller.

    A context manager.
    """

    def __init__(self, *guests: Guest) -> None:
        self._sockets = [connect_unix(guest.beat_path, 10) for guest in guests]
        self._times: list[list[float]] = [[] for _ in guests]
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._record, name="heartbeats", daemon=True)
        self._thread.start()

    def __enter__(self) -> "HeartbeatRecorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.stop()

    def stop(self) -> None:
        """End the recording; the results stay."""
        if self._thread.is_alive():
            self._wake.send(b"x")
            self._thread.join()
        for connection in (*self._sockets, self._wake, self._woken):
            connection.close()

    def times(self, guest: int | None = None) -> NDArray[np.float64]:
        """time.monotonic() of the beats so far, of one guest (by place in arguments) or all."""
        chosen = self._times if guest is None else [self._times[guest]]
        return np.sort(np.concatenate([np.array(times[:]) for times in chosen]))

    def largest_gap(self, since: float | None = None, until: float | None = None) -> float:
        """The longest silence in seconds between two beats, if wanted within a span of monotonic().

        :raises ValueError: fewer than two beats.
        """
        times = self.times()
        if since is not None:
            times = times[times >= since]
        if until is not None:
            times = times[times <= until]
        if times.size < 2:
            raise ValueError(f"only {times.size} heartbeats")
        return float(np.diff(times).max())

    def handover_gap(self) -> float:
        """Seconds from the first guest's last beat to the second's first; negative: both lived."""
        return float(self.times(1)[0] - self.times(0)[-1])

    def _record(self) -> None:
        # The recorder must not wait behind two busy emulators for its turn on the CPU.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
        places = {connection.fileno(): i for i, connection in enumerate(self._sockets)}
        poller = select.poll()
        for descriptor in (*places, self._woken.fileno()):
            poller.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poller.poll():
                if descriptor not in places:
                    return
                place = places[descriptor]
                try:
                    data = self._sockets[place].recv(4096)
                except OSError:
                    data = b""
                if not data:  # its QEMU has ended
                    poller.unregister(descriptor)
                    continue
                self._times[place].extend([time.monotonic()] * len(data))
