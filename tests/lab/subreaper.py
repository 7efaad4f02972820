# SPDX-License-Identifier: Apache-2.0
"""Runs a program and reaps at once what its children leave behind, as systemd would.

A container's first process may take seconds to reap a QEMU that has ended, and libvirt waits for
that at the end of each migration. It runs by itself, without this tree; its arguments are the
command line.
"""

import ctypes
import os
import signal
import subprocess
import sys

_PR_SET_CHILD_SUBREAPER = 36


def main(argv: list[str]) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    program = subprocess.Popen(argv)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(program.pid, number))
    while True:
        pid, status = os.wait()
        if pid == program.pid:
            return os.waitstatus_to_exitcode(status) & 0xFF


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
