# SPDX-License-Identifier: Apache-2.0
"""Moving whole buffers through a socket, in the clear or through TLS.

Both classes raise what the socket raises (OSError and its subclasses) and EOFError at the stream's
end; :mod:`nova_dmigrate.relay.wire.connection` turns that into errors that name the peer.
"""

import os
import socket
import ssl
import struct
import sys
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nova_dmigrate.relay.wire.frames import Buffer

_IOV_MAX = os.sysconf("SC_IOV_MAX")
_TIMEVAL = struct.Struct("@ll")

#: Up to this length a payload and the next frame's header are read by one call. Beyond it most
#: likely not all of the payload is there yet, and one call that waits for it is cheaper.
_TOGETHER = 32 << 10

#: A TLS record's largest payload. Writes are cut such that all records but the last are full.
_RECORD = 16 << 10
#: SSL_write's timeout is for the whole call, so that a large write over a slow link would fail
#: though it makes progress. This many bytes must get through within one timeout.
_TLS_WRITE = 256 << 10


class Transport(Protocol):
    """What a connection needs of a socket."""

    def send(self, buffers: Sequence[Buffer], size: int) -> None:
        """Send all of ``buffers``, ``size`` bytes together."""

    def receive_into(self, view: memoryview, spill: memoryview) -> int:
        """Fill ``view`` (bytes, not empty); return how many bytes after it went into ``spill``."""

    def set_timeout(self, seconds: float | None) -> None:
        """Let calls fail with an OSError after so long without progress, or never."""

    def limit_unsent(self, size: int) -> None:
        """Let no more than about so many bytes wait in the kernel that it has not sent yet."""


def byte_view(buffer: Buffer) -> memoryview:
    """Return a view of the bytes of a contiguous ``buffer``; memoryview.cast refuses records."""
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1:
        return view
    return memoryview(np.frombuffer(view, dtype=np.uint8))


_TCP_NOTSENT_LOWAT = 25  # linux/tcp.h
_RWND_LIMITED = 176  # offset of tcpi_rwnd_limited, u64 microseconds


class PlainTransport:
    """A TCP socket in the clear.

    The socket is in blocking mode and the kernel keeps the time (SO_RCVTIMEO, SO_SNDTIMEO). With
    Python's own timeouts every call would poll first and come back, and take the interpreter lock
    again, for every part that fits the socket's buffer: many times per MiB instead of once.
    """

    def __init__(self, sock: socket.socket):
        sock.settimeout(None)
        self._sock = sock

    def send(self, buffers: Sequence[Buffer], size: int) -> None:
        sent = self._sock.sendmsg(buffers[:_IOV_MAX])
        if sent < size:
            self._send_rest([byte_view(buffer) for buffer in buffers], sent)

    def _send_rest(self, views: list[memoryview], sent: int) -> None:
        first = 0
        while True:
            while first < len(views) and sent >= len(views[first]):
                sent -= len(views[first])
                first += 1
            if first == len(views):
                return
            views[first] = views[first][sent:]
            sent = self._sock.sendmsg(views[first : first + _IOV_MAX])

    def receive_into(self, view: memoryview, spill: memoryview) -> int:
        wanted = len(view)
        got = 0
        if spill and wanted <= _TOGETHER:
            got = self._sock.recvmsg_into((view, spill))[0]
            if got >= wanted:
                return got - wanted
            if not got:
                raise EOFError
        receive = self._sock.recv_into
        while got < wanted:
            # With a timeout MSG_WAITALL, too, returns what has come by then.
            count = receive(view[got:] if got else view, 0, socket.MSG_WAITALL)
            if not count:
                raise EOFError
            got += count
        return 0

    def set_timeout(self, seconds: float | None) -> None:
        whole, fraction = divmod(seconds or 0.0, 1.0)
        value = _TIMEVAL.pack(int(whole), int(fraction * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def limit_unsent(self, size: int) -> None:
        _limit_unsent(self._sock, size)


class TlsTransport:
    """A socket with TLS. Python's timeouts are used: SSL_read would repeat after the kernel's."""

    def __init__(self, sock: ssl.SSLSocket):
        self._sock = sock

    def send(self, buffers: Sequence[Buffer], size: int) -> None:
        joined = bytearray()
        for buffer in buffers:
            view = byte_view(buffer)
            if joined or len(view) < _RECORD:
                room = _RECORD - len(joined)
                joined += view[:room]
                view = view[room:]
                if len(joined) < _RECORD:
                    continue
                self._write(memoryview(joined))
                joined = bytearray()
            whole = len(view) - len(view) % _RECORD
            self._write(view[:whole])
            joined += view[whole:]
        self._write(memoryview(joined))

    def _write(self, view: memoryview) -> None:
        send = self._sock.send
        length = len(view)
        done = 0
        while done < length:
            done += send(view[done : done + _TLS_WRITE])

    def receive_into(self, view: memoryview, spill: memoryview) -> int:
        receive = self._sock.recv_into
        wanted = len(view)
        got = 0
        while got < wanted:
            # One record at most for each call. What is left of a record waits in OpenSSL's memory:
            # to read the next header separately costs no system call.
            count = receive(view[got:])
            if not count:
                raise EOFError
            got += count
        return 0

    def set_timeout(self, seconds: float | None) -> None:
        self._sock.settimeout(seconds)

    def limit_unsent(self, size: int) -> None:
        _limit_unsent(self._sock, size)


def peer_full_seconds(sock: socket.socket) -> float:
    """Seconds for which data waited because the peer's receive window was full.

    :returns: tcpi_rwnd_limited of struct tcp_info (linux/tcp.h); 0 where the kernel has none.
    """
    # Not SSLSocket's own method, which there is none of
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RWND_LIMITED + 8)
    if len(info) < _RWND_LIMITED + 8:
        return 0.0
    microseconds: int = int.from_bytes(info[_RWND_LIMITED:], sys.byteorder)
    return microseconds / 1e6


def _limit_unsent(sock: socket.socket, size: int) -> None:
    # Python 3.11 has no name for it
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, size)
