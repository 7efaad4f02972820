# SPDX-License-Identifier: Apache-2.0
"""What one connection brings to the destination: frames in pooled memory, as they were before they
were compressed.
"""

from collections.abc import Callable

from nova_dmigrate import exception
from nova_dmigrate.relay.buffers import BufferPool
from nova_dmigrate.relay.compression import decompress, plain_header
from nova_dmigrate.relay.feed import DEPTH, ReceivedFrame
from nova_dmigrate.relay.wire.connection import Connection
from nova_dmigrate.relay.wire.frames import Frame, FrameType, Header

#: Frames up to this size are received into pooled memory; larger ones are rare.
_FRAME_BUFFER = (1 << 20) + (64 << 10)


class FrameReceiver:
    """Used by one thread.

    It has a pool of its own: a frame whose turn has not come must not keep the one before it, of
    another connection, out.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pool = BufferPool(_FRAME_BUFFER, DEPTH + 2)
        self._compressed = memoryview(bytearray(_FRAME_BUFFER))
        self._done: Callable[[], None] | None = None

    def close(self) -> None:
        """Whoever waits for memory gets it, from elsewhere."""
        self._pool.close()

    def receive(self) -> ReceivedFrame:
        """Wait for the next frame.

        :raises FrameError: what came is not a frame that may come here.
        :raises PeerLost: see :meth:`Connection.receive`.
        """
        self._done = None
        frame = self._connection.receive(self._allocate)
        if frame.header.type is FrameType.COMPRESSED:
            frame = self._decompress(frame)
        return ReceivedFrame(frame, self._done)

    def _decompress(self, frame: Frame) -> Frame:
        try:
            header = plain_header(frame.header, frame.payload)
            return decompress(header, frame.payload, self._allocate(header))
        except ValueError as error:
            raise exception.FrameError(
                peer=self._connection.peer, reason=f"a COMPRESSED frame {error}"
            ) from error

    def _allocate(self, header: Header) -> memoryview:
        if header.type is FrameType.COMPRESSED:
            if header.length > len(self._compressed):
                self._compressed = memoryview(bytearray(header.length))
            return self._compressed
        if header.length <= self._pool.size:
            buffer = self._pool.take()
            if buffer is not None:
                self._done = buffer.release
                return buffer.view
        return memoryview(bytearray(header.length))
