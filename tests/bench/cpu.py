# SPDX-License-Identifier: Apache-2.0
"""CPU time of other processes."""

import os
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used so far, all of its threads; in steps of 10 ms.

    Works until the process has been waited for, also when it has ended.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Meter:
    """CPU seconds of a child process from now, its start-up left out, to its own end."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = cpu_seconds(pid)

    def finish(self, timeout: float = 60) -> float:
        """Wait for the end of the process without taking its exit status away.

        :raises TimeoutError: it does not end.
        """
        deadline = time.monotonic() + timeout
        options = os.WEXITED | os.WNOWAIT | os.WNOHANG
        while os.waitid(os.P_PID, self._pid, options) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self._pid} does not end")
            time.sleep(0.005)
        return cpu_seconds(self._pid) - self._before
