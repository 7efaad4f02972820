# SPDX-License-Identifier: Apache-2.0
"""One authenticated connection between two relays: it sends or it receives frames, never both."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn

from nova_dmigrate import exception
from nova_dmigrate.relay.wire import frames, tls
from nova_dmigrate.relay.wire.frames import Buffer, Frame, FrameType, Header, Role
from nova_dmigrate.relay.wire.transport import (
    PlainTransport,
    TlsTransport,
    Transport,
    peer_full_seconds,
)

_NOTHING = memoryview(b"")

_KEEPALIVE_IDLE = 10
_KEEPALIVE_INTERVAL = 5
_KEEPALIVE_COUNT = 3


def prepare_socket(sock: socket.socket) -> None:
    """Set what every TCP socket of a relay needs."""
    # Frames are written whole: nothing is gained by waiting for more to fill a segment.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that vanished without FIN or RST is noticed also by the side that has nothing to send.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)


class Connection:
    """Frames to or from one peer.

    The source sends on DATA connections and receives on ACKS connections, the destination the other
    way round. Several threads may send (a frame is never torn), one thread may receive. After a
    PeerLost or a FrameError of receive() every later call fails, too, and repeats the reason.

    :ivar peer: "address:port" of the other side
    :ivar role: what the connection is for
    :ivar index: number among the connections of this role, from 0
    :ivar bytes_sent: bytes of frames handed to the socket, headers included
    :ivar bytes_received: bytes of whole frames taken from the socket, headers included
    """

    def __init__(
        self, sock: socket.socket, *, peer: str, role: Role, index: int, timeout: float | None
    ):
        """Take ownership of a connected TCP ``sock`` whose handshake is done."""
        self.peer = peer
        self.role = role
        self.index = index
        self.bytes_sent = 0
        self.bytes_received = 0
        self._sock = sock
        self._transport: Transport
        if isinstance(sock, ssl.SSLSocket):
            self._transport = TlsTransport(sock)
        else:
            self._transport = PlainTransport(sock)
        self._rules = frames.RULES[role]
        self._send_lock = threading.Lock()
        self._header = memoryview(bytearray(frames.HEADER_SIZE))
        self._header_got = 0
        self._timeout: float | None = None
        self._lost: str | None = None
        self.set_timeout(timeout)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def seconds_peer_full(self) -> float:
        """Seconds in which the peer took nothing: not the network has kept data back then."""
        return peer_full_seconds(self._sock)

    def limit_unsent(self, size: int) -> None:
        """Let no more than about ``size`` bytes wait in the kernel that it has not sent yet."""
        self._transport.limit_unsent(size)

    def set_timeout(self, seconds: float | None) -> None:
        """Fail with PeerLost when nothing moves for ``seconds``; None waits for ever.

        A sender fails when the peer takes nothing for so long, a receiver when nothing comes. A
        peer that has nothing to say keeps a receiver content with KEEPALIVE frames.
        """
        if seconds is not None and seconds < 0.001:
            raise ValueError(f"a timeout of {seconds} s")
        self._timeout = seconds
        self._transport.set_timeout(seconds)
        self._sock.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int((seconds or 0) * 1000)
        )

    def send(
        self,
        type: FrameType,
        *,
        flags: int = 0,
        block: int = 0,
        seq: int = 0,
        payload: Sequence[Buffer] = (),
    ) -> int:
        """Send one frame, whose payload is the concatenation of C-contiguous buffers.

        Returns when the socket has taken everything: the buffers may then be used again. In the
        clear nothing is copied here.

        :returns: bytes of the frame, header included
        :raises FrameError: the payload is not one that the peer would accept; nothing was sent
        :raises PeerLost: the connection has failed or failed now
        """
        buffers: list[Buffer] = [b""]
        length = 0
        for buffer in payload:
            length += memoryview(buffer).nbytes
            buffers.append(buffer)
        rule = self._rules.get(type)
        if rule is None:
            raise exception.FrameError(
                peer=self.peer, reason=f"{type!r} is not for a connection of role {self.role.name}"
            )
        if not rule.minimum <= length <= rule.maximum or length % rule.unit:
            raise exception.FrameError(peer=self.peer, reason=frames.describe_length(rule, length))
        buffers[0] = frames.HEADER.pack(type, flags, block, length, seq)
        size = frames.HEADER_SIZE + length
        with self._send_lock:
            if self._lost is not None:
                raise self._peer_lost()
            try:
                self._transport.send(buffers, size)
            except OSError as error:
                self._fail(error, f"while sending a {rule.type.name} frame")
            except BaseException:
                # An interrupted frame cannot be continued.
                self._lose("sending was interrupted in the middle of a frame")
                raise
            self.bytes_sent += size
        return size

    def receive(self, allocate: Callable[[Header], memoryview]) -> Frame:
        """Wait for the next frame.

        :param allocate: is given the valid header of a frame that has a payload, and returns
            writable bytes, ``header.length`` at least, into which the payload is read directly
        :returns: header and payload; the payload is the allocated memory's first part
        :raises FrameError: what came is not a frame that may come here
        :raises PeerLost: the peer closed the connection, vanished or was silent for too long
        """
        header = self.receive_header()
        if not header.length:
            return Frame(header, _NOTHING)
        try:
            payload = allocate(header)[: header.length]
            if len(payload) != header.length or payload.itemsize != 1:
                raise ValueError(f"{payload.nbytes} bytes allocated for {header}")
        except BaseException:
            self._lose("a frame was not read to its end")
            raise
        self.receive_payload(header, payload)
        return Frame(header, payload)

    def receive_header(self) -> Header:
        """Wait for the next frame's header; unless its length is 0 receive_payload must follow.

        :raises FrameError, PeerLost: see receive()
        """
        if self._lost is not None:
            raise self._peer_lost()
        got = self._header_got
        if got < frames.HEADER_SIZE:
            try:
                self._transport.receive_into(self._header[got:], _NOTHING)
            except EOFError:
                self._fail_at_end("")
            except OSError as error:
                self._fail(error, "while waiting for a frame")
        self._header_got = 0
        try:
            header = frames.parse_header(self._header, self._rules, self.peer)
        except exception.FrameError as error:
            self._lose(f"it sent {error.kwargs['reason']}")
            raise
        self.bytes_received += frames.HEADER_SIZE
        return header

    def receive_payload(self, header: Header, payload: memoryview) -> None:
        """Fill ``payload``, exactly ``header.length`` bytes, with what follows ``header``.

        :raises PeerLost: see receive()
        """
        try:
            self._header_got = self._transport.receive_into(payload, self._header)
        except EOFError:
            self._fail_at_end(f" in the middle of a {header.type.name} frame")
        except OSError as error:
            self._fail(error, f"in the middle of a {header.type.name} frame")
        self.bytes_received += header.length

    def shutdown(self) -> None:
        """End the connection for both sides. Threads that wait in send or receive get PeerLost."""
        self._lose("the connection was shut down at this side")
        # An error: it has ended already.
        with contextlib.suppress(OSError):
            # Not SSLSocket's method, which first lets go of the TLS state: a sending thread could
            # go on in the clear. Without close_notify the peer sees an end all the same.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back. What was sent still reaches the peer. Other threads must be out."""
        self._lose("the connection is closed at this side")
        self._sock.close()

    def _lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason

    def _peer_lost(self) -> exception.PeerLost:
        return exception.PeerLost(peer=self.peer, reason=self._lost)

    def _fail_at_end(self, where: str) -> NoReturn:
        self._lose(f"it closed the connection{where}")
        raise self._peer_lost() from None

    def _fail(self, error: OSError, where: str) -> NoReturn:
        if isinstance(error, BlockingIOError | TimeoutError):
            self._lose(f"nothing moved for {self._timeout:g} s {where}")
        elif isinstance(error, ssl.SSLError):
            self._lose(f"{tls.explain(error)} {where}")
        else:
            self._lose(f"{error.strerror or error} {where}")
        raise self._peer_lost() from error
