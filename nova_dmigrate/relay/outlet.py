# SPDX-License-Identifier: Apache-2.0
"""The destination QEMU's end: its socket, dialled when the stream begins, and its return path."""

import contextlib
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.relay.wire.frames import Buffer
from nova_dmigrate.relay.wire.transport import PlainTransport

_RETURN_SIZE = 64 << 10


class QemuOutlet:
    """A connection to the QEMU that waits for an incoming migration.

    It is made only once there is a stream: whoever connects to that socket and goes away ends that
    QEMU.
    """

    def __init__(self, path: Path, instance: str) -> None:
        self._path = path
        self._instance = instance
        self._socket: socket.socket | None = None
        self._transport: PlainTransport | None = None
        self.bytes = 0

    @property
    def connected(self) -> bool:
        """Whether QEMU has been dialled."""
        return self._socket is not None

    def dial(self) -> None:
        """:raises QemuError: QEMU does not listen there."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(self._path))
        except OSError as error:
            connection.close()
            raise self._error(f"cannot connect to QEMU at {self._path}: {error}") from error
        self._socket = connection
        self._transport = PlainTransport(connection)

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all of ``buffers``; waits for QEMU.

        :raises QemuError: QEMU has closed its end.
        """
        if self._transport is None:
            raise self._error("the stream began before its first bytes")
        size = sum([memoryview(buffer).nbytes for buffer in buffers])
        try:
            self._transport.send(buffers, size)
        except OSError as error:
            raise self._error(f"QEMU does not take the stream any more: {error}") from error
        self.bytes += size

    def finish(self) -> None:
        """QEMU gets the end of file; its return path stays open."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def read_return_path(self, deliver: Callable[[bytes], None]) -> None:
        """Hand over what QEMU says until it closes its end."""
        assert self._socket is not None
        # A broken connection is its end as well: what is sent tells whether that came too early.
        with contextlib.suppress(OSError):
            while data := self._socket.recv(_RETURN_SIZE):
                deliver(data)

    def abort(self) -> None:
        """Break the connection; whoever waits in it returns."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back."""
        if self._socket is not None:
            self._socket.close()

    def _error(self, reason: str) -> exception.QemuError:
        return exception.QemuError(instance=self._instance, reason=reason)
