# SPDX-License-Identifier: Apache-2.0
"""The source QEMU's end: its connection, and its stream cut into elements."""

import contextlib
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from oslo_log import log

from nova_dmigrate import exception
from nova_dmigrate.relay.buffers import BufferPool, PooledBuffer
from nova_dmigrate.stream.elements import Element
from nova_dmigrate.stream.reader import StreamParser

LOG = log.getLogger(__name__)

_RECEIVE_FLOOR = 64 << 10
_GATHER_MICROSECONDS = 2000


class QemuListener:
    """The UNIX socket on which the source QEMU's migration stream arrives; exactly one connection
    is served.
    """

    def __init__(self, path: Path, instance: str) -> None:
        """:raises QemuError: the socket cannot be made."""
        self._path = path
        self._instance = instance
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A socket that a killed relay left behind would keep the next migration from starting.
            path.unlink(missing_ok=True)
            self._socket.bind(str(path))
            self._socket.listen(1)
        except OSError as error:
            self._socket.close()
            raise exception.QemuError(
                instance=instance, reason=f"cannot listen on {path}: {error}"
            ) from error

    def accept(self) -> socket.socket:
        """Wait for QEMU.

        :raises QemuError: the listener was closed.
        """
        try:
            return self._socket.accept()[0]
        except OSError as error:
            raise exception.QemuError(
                instance=self._instance, reason=f"QEMU did not connect to {self._path}: {error}"
            ) from error

    def watch(self) -> None:
        """Wait for a further connection: with multifd QEMU opens one for each channel.

        :raises UnsupportedStream: there was one. Returns when the listener is closed.
        """
        try:
            self._socket.accept()[0].close()
        except OSError:
            return
        raise exception.UnsupportedStream(
            instance=self._instance,
            reason="QEMU opened a second connection: multifd does not go through a relay",
        )

    def close(self) -> None:
        """Stop listening and remove the socket."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            LOG.warning("The socket %s stays behind: %s", self._path, error)


class Intake:
    """Reads QEMU's stream into pooled buffers and yields what a buffer's bytes are made of.

    ``limit`` is what may be taken from the socket at once, in bytes, and ``gather`` whether more is
    waited for (a moment) once there is something; whoever paces QEMU changes them.
    """

    def __init__(
        self, connection: socket.socket, pool: BufferPool, parser: StreamParser, instance: str
    ) -> None:
        self._connection = connection
        self._pool = pool
        self._parser = parser
        self._instance = instance
        self.limit = pool.size
        self.gather = True
        self.bytes = 0
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        # The kernel keeps the time of a receive that waits for more.
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, _GATHER_MICROSECONDS)
        )

    def hung_up(self) -> bool:
        """Whether QEMU has closed its end; what it sent before that may still be unread."""
        poller = select.poll()
        poller.register(self._connection, select.POLLRDHUP)
        return bool(poller.poll(0))

    def batches(self) -> Iterator[tuple[list[Element], PooledBuffer]]:
        """Yield the elements of each buffer; they view its memory, so whoever keeps them holds the
        buffer.

        Ends when QEMU closes the connection.

        :raises QemuError: the connection broke.
        """
        rest = memoryview(b"")
        previous: PooledBuffer | None = None
        while True:
            buffer = self._pool.take()
            if buffer is None:
                return
            try:
                carried = len(rest)
                buffer.view[:carried] = rest
                if previous is not None:
                    previous.release()
                    previous = None
                filled = self._fill(buffer.view, carried)
                if filled == carried:
                    return
                elements, consumed = self._parser.parse(buffer.view[:filled])
                rest = buffer.view[consumed:filled]
                yield elements, buffer
                buffer.hold()
                previous = buffer
            finally:
                buffer.release()

    def _fill(self, view: memoryview, filled: int) -> int:
        """Take at least a byte and at most the limit; returns the buffer's fill.

        Once there is something, more is waited for only for a moment: QEMU's socket holds some 200
        KiB, and to handle each such piece alone would cost several times the work.
        """
        end = min(len(view), filled + max(self.limit, _RECEIVE_FLOOR))
        flags = socket.MSG_WAITALL if self.gather else socket.MSG_DONTWAIT
        try:
            self._poll.poll()
            count = self._connection.recv_into(view[filled:end], 0, flags)
        except OSError as error:
            raise exception.QemuError(
                instance=self._instance, reason=f"QEMU's connection broke: {error}"
            ) from error
        self.bytes += count
        return filled + count
