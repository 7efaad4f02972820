# SPDX-License-Identifier: Apache-2.0
"""A target of iSCSI on this machine's loopback, in user space, with one file as its only unit.

with IscsiTarget(file) as target:
    target.url                                          # iscsi://127.0.0.1:PORT/TARGET/1
"""

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path
from types import TracebackType

from tests.lab import processes
from tests.lab.relays import wait_until

_NAME = "iqn.2010-10.org.openstack:volume-1"
_UNIT = 1


def missing() -> str | None:
    """Why there can be none; None if there can."""
    if os.geteuid():
        return "only root can have an iSCSI target"
    if shutil.which("tgtd") is None:
        return "tgtd is not installed"
    return None


class IscsiTarget:
    """A context manager that yields itself. Anybody may connect, without an account."""

    def __init__(self, file: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            self._port = unused.getsockname()[1]
        # Of its control socket: others on this machine may have a target, too
        self._control = str(self._port % 32768)
        self.url = f"iscsi://127.0.0.1:{self._port}/{_NAME}/{_UNIT}"
        self.process = processes.spawn(
            ["tgtd", "-f", "-C", self._control, "--iscsi", f"portal=127.0.0.1:{self._port}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: self._asked("--op", "show", "--mode", "sys"), "tgtd answers")
            self._ask("--op", "new", "--mode", "target", "--tid", "1", "-T", _NAME)
            self._ask("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", str(_UNIT),
                      "-b", str(file))  # fmt: skip
            self._ask("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
        except BaseException:
            self.close()
            raise

    def connections(self) -> int:
        """How many initiators there are."""
        return self._ask("--op", "show", "--mode", "target").count("Initiator:")

    def close(self) -> None:
        processes.end(self.process)
        for name in (f"socket.{self._control}", f"socket.{self._control}.lock"):
            with contextlib.suppress(OSError):
                (Path("/var/run/tgtd") / name).unlink()

    def __enter__(self) -> "IscsiTarget":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def _ask(self, *arguments: str) -> str:
        done = self._run(*arguments)
        if done.returncode:
            raise AssertionError(f"tgtadm {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def _asked(self, *arguments: str) -> bool:
        return self._run(*arguments).returncode == 0

    def _run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = ["tgtadm", "-C", self._control, "--lld", "iscsi", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
