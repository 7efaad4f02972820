# SPDX-License-Identifier: Apache-2.0
"""A QEMU process and its QMP connection, as little of it as recording needs."""

import contextlib
import json
import pathlib
import socket
import subprocess
import time
from typing import Any

START_TIMEOUT = 60.0
REPLY_TIMEOUT = 60.0
POLL = 0.005


class QmpError(Exception):
    """QEMU refused a command, or is gone."""


class Qemu(contextlib.AbstractContextManager["Qemu"]):
    """A running emulator; leaving the context ends it.

    :param argv: the complete command line, without the QMP options
    :param directory: where the QMP socket and the log go
    """

    def __init__(self, name: str, argv: list[str], directory: pathlib.Path) -> None:
        self.name = name
        path = directory / f"{name}.qmp"
        self._log = directory / f"{name}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*argv, "-qmp", f"unix:{path},server=on,wait=off"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._connect(path)
        except BaseException:
            self.close()
            raise

    def _connect(self, path: pathlib.Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise QmpError(f"{self.name} does not start: {self.log()}") from error
                time.sleep(POLL)
        self._socket.settimeout(REPLY_TIMEOUT)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self("qmp_capabilities")

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return its result; events on the way are dropped.

        :raises QmpError: with QEMU's description of what is wrong
        """
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode())
        for line in self._lines:
            reply = json.loads(line)
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise QmpError(f"{self.name}: {command}: {reply['error']['desc']}")
        raise QmpError(f"{self.name} is gone: {self.log()}")

    def monitor(self, line: str) -> str:
        """Run a command of the human monitor."""
        return str(self("human-monitor-command", **{"command-line": line}))

    def close(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.wait()

    def __exit__(self, *exc: object) -> None:
        self.close()
