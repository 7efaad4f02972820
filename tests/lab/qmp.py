# SPDX-License-Identifier: Apache-2.0
"""A synchronous QMP client over a UNIX socket."""

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any


class QMPError(Exception):
    """QEMU refused a command; `.error_class` and the message are QEMU's own."""

    def __init__(self, command: str, error: dict[str, Any]) -> None:
        super().__init__(f"{command}: {error.get('desc')}")
        self.error_class = error.get("class")


class QMPClosed(Exception):
    """QEMU closed its monitor (it has ended), or did not answer in time."""


class QMPClient:
    """One monitor. Thread-safe: command and answer are one step. Events are kept in `events`."""

    def __init__(self, path: Path, timeout: float = 30) -> None:
        self._lock = threading.Lock()
        self._rest = b""
        self.events: list[dict[str, Any]] = []
        self._socket = connect_unix(path, timeout)
        try:
            self._receive(timeout)  # the greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *,
                timeout: float = 60) -> Any:  # fmt: skip
        """Run a command and return its result.

        :raises QMPError: QEMU's refusal.
        :raises QMPClosed: the monitor is gone or silent.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        with self._lock:
            try:
                self._socket.sendall(json.dumps(request).encode() + b"\n")
            except OSError as error:
                raise QMPClosed(f"{command}: {error}") from None
            while True:
                message = self._receive(timeout)
                if "event" in message:
                    self.events.append(message)
                elif "error" in message:
                    raise QMPError(command, message["error"])
                else:
                    return message.get("return")

    def close(self) -> None:
        self._socket.close()

    def _receive(self, timeout: float) -> dict[str, Any]:
        self._socket.settimeout(timeout)
        while b"\n" not in self._rest:
            try:
                data = self._socket.recv(65536)
            except OSError as error:
                raise QMPClosed(f"no answer from the monitor: {error}") from None
            if not data:
                raise QMPClosed("the monitor was closed")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def connect_unix(path: Path, timeout: float) -> socket.socket:
    """Connect to a listening UNIX socket that may not exist yet."""
    deadline = time.monotonic() + timeout
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
