# SPDX-License-Identifier: Apache-2.0
"""Connecting to a relay, and letting in the right one among whoever connects."""

import collections
import contextlib
import select
import socket
import ssl
import threading
import time

from oslo_log import log as logging

from nova_dmigrate import exception
from nova_dmigrate.relay.wire import hello
from nova_dmigrate.relay.wire import tls as tls_module
from nova_dmigrate.relay.wire.connection import Connection, prepare_socket
from nova_dmigrate.relay.wire.frames import Role
from nova_dmigrate.relay.wire.hello import Agreement, Credentials, Refusal
from nova_dmigrate.relay.wire.tls import TlsSettings

__all__ = ["Agreement", "Credentials", "Listener", "Role", "connect"]

LOG = logging.getLogger(__name__)

#: First byte of a TLS connection (the record type "handshake"); that of ours is hello.MAGIC's.
_TLS_FIRST = b"\x16"
_PLAIN_FIRST = hello.MAGIC[:1]

#: After a refusal the socket is read this long, that an unread byte does not turn our close into a
#: reset, which would take the error message away from the peer.
_LINGER_SECONDS = 0.5
_LINGER_BYTES = 64 << 10


class _Channel:
    """Bytes over a socket until a deadline, which is for all of the handshake."""

    def __init__(self, sock: socket.socket, timeout: float, start: float):
        self.sock = sock
        self._timeout = timeout
        self._deadline = start + timeout
        self._interruption: str | None = None

    def hurry(self) -> None:
        """Let the next call to the socket last no longer than what is left."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self.hurry()
            part = self.sock.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def write(self, data: bytes) -> None:
        self.hurry()
        self.sock.sendall(data)

    def first_byte(self) -> bytes:
        """Return what will be read first, or b"" when the other side has closed."""
        self.hurry()
        return self.sock.recv(1, socket.MSG_PEEK)

    def start_tls(self, context: ssl.SSLContext, server_name: str | None) -> ssl.SSLSocket:
        """Put TLS on the socket; a server gives no ``server_name``."""
        sock = context.wrap_socket(
            self.sock,
            server_side=server_name is None,
            server_hostname=server_name,
            do_handshake_on_connect=False,
        )
        self.sock = sock
        self.hurry()
        sock.do_handshake()
        return sock

    def refusal(self, error: Exception) -> Refusal:
        """Put into words what ended the handshake."""
        if isinstance(error, Refusal):
            return error
        if self._interruption:
            return Refusal("busy", self._interruption)
        if isinstance(error, TimeoutError):
            return Refusal("timeout", f"the handshake was not done within {self._timeout:g} s")
        if isinstance(error, EOFError) or tls_module.is_end(error):
            return Refusal("closed", "it closed the connection during the handshake")
        if isinstance(error, ssl.SSLError):
            code = "certificate" if tls_module.is_about_certificates(error) else "tls"
            return Refusal(code, tls_module.explain(error))
        text = error.strerror if isinstance(error, OSError) else None
        return Refusal("failed", f"{text or error} during the handshake")

    def interrupt(self, reason: str) -> None:
        """Let the thread that shakes hands fail at once, with ``reason``."""
        self._interruption = reason
        # An error: it has ended, or TLS is just taking over the socket. The caller tries again.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Close such that what was written last arrives."""
        try:
            # socket.socket's methods: what comes now need not be TLS.
            socket.socket.shutdown(self.sock, socket.SHUT_WR)
            end = time.monotonic() + _LINGER_SECONDS
            drained = 0
            while drained < _LINGER_BYTES and (left := end - time.monotonic()) > 0:
                self.sock.settimeout(left)
                count = len(socket.socket.recv(self.sock, 4096))
                if not count:
                    break
                drained += count
        except OSError:
            pass
        self.sock.close()


def connect(
    host: str,
    port: int,
    credentials: Credentials,
    role: Role,
    index: int,
    tls: TlsSettings | None,
    timeout: float,
    capabilities: frozenset[str] = frozenset(),
) -> tuple[Connection, Agreement]:
    """Connect to the relay that listens at ``host`` and ``port``.

    :param index: number of the connection among those of its ``role``, 0 to 255
    :param tls: None for a connection in the clear; there is no fallback from one to the other
    :param timeout: seconds for all of the handshake; then the timeout of the connection
    :raises ConfigurationError: a file of ``tls`` is not usable
    :raises VersionMismatch, AuthenticationError, HandshakeError: one side refused the other, or the
        peer is not reachable
    """
    if not 0 <= index <= hello.MAX_INDEX:
        raise ValueError(f"a connection of index {index}")
    context = tls_module.client_context(tls) if tls else None
    peer = _name((host, port))
    start = time.monotonic()
    try:
        sock = socket.create_connection((host, port), timeout)
    except OSError as error:
        reason = f"cannot connect: {error.strerror or error}"
        raise exception.HandshakeError(peer=peer, reason=reason) from error
    channel = _Channel(sock, timeout, start)
    try:
        prepare_socket(sock)
        if context is not None and tls is not None:
            channel.start_tls(context, tls.peer_name)
        agreement = hello.greet(channel, credentials, role, index, capabilities)
        connection = Connection(channel.sock, peer=peer, role=role, index=index, timeout=timeout)
    except (OSError, EOFError, Refusal) as error:
        channel.abandon()
        raise channel.refusal(error).as_error(peer) from error
    except BaseException:
        channel.sock.close()
        raise
    return connection, agreement


def _name(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Listener:
    """Waits for the other relay of one migration and keeps everybody else out.

    Every connection shakes hands in a thread of its own, so that a silent stranger holds up nobody.
    There are at most ``max_handshakes`` of them: then the oldest gives way, once it has had a fair
    time.

    :ivar address: host and port that it listens at
    :ivar refused: how many connections were refused
    :ivar last_refusal: who was refused last and why
    """

    def __init__(
        self,
        host: str,
        port: int,
        credentials: Credentials,
        tls: TlsSettings | None,
        timeout: float,
        capabilities: frozenset[str] = frozenset(),
        *,
        max_handshakes: int = 64,
    ):
        """Start to listen; port 0 chooses a free one.

        :param timeout: seconds for a handshake; then the timeout of the accepted connection
        :raises ConfigurationError: a file of ``tls`` or the address is not usable
        """
        self._context = tls_module.server_context(tls) if tls else None
        self._tls = tls
        self._credentials = credentials
        self._timeout = timeout
        self._capabilities = capabilities
        self._max_handshakes = max_handshakes
        self._fair_time = min(1.0, timeout / 4)
        self.refused = 0
        self.last_refusal: str | None = None
        self._closed = False
        # Guards all that follows and the two counters above.
        self._changed = threading.Condition()
        self._handshakes: dict[_Channel, float] = {}
        self._accepted: collections.deque[tuple[Connection, Agreement]] = collections.deque()
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._sock = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise exception.ConfigurationError(
                f"Cannot listen at {_name((host, port))}: {error.strerror or error}"
            ) from error
        self.address: tuple[str, int] = self._sock.getsockname()[:2]
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="wire-listener", daemon=True)
        self._thread.start()

    def accept(self, timeout: float | None = None) -> tuple[Connection, Agreement]:
        """Return the next connection of the right peer; its handshake is done.

        :raises HandshakeError: none came within ``timeout`` seconds, or close() was called
        """
        with self._changed:
            self._changed.wait_for(lambda: self._accepted or self._closed, timeout)
            if self._accepted:
                return self._accepted.popleft()
            if self._closed:
                reason = "the listener is closed"
            else:
                reason = f"no relay has connected within {timeout:g} s"
            if self.refused:
                reason += f"; refused: {self.refused}, last {self.last_refusal}"
        raise exception.HandshakeError(peer=_name(self.address), reason=reason)

    def close(self) -> None:
        """Stop to listen, drop unfinished handshakes and connections that nobody has accepted."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._wake_writer.send(b"x")
        self._thread.join()
        with self._changed:
            for channel in self._handshakes:
                channel.interrupt("the listener is closed")
            self._changed.wait_for(lambda: not self._handshakes, 2 * _LINGER_SECONDS)
            waiting = list(self._accepted)
            self._accepted.clear()
        for connection, _ in waiting:
            connection.close()
        for sock in (self._sock, self._wake_reader, self._wake_writer):
            sock.close()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _listen(self) -> None:
        self._sock.settimeout(0)
        while self._make_room():
            readable, _, _ = select.select([self._sock, self._wake_reader], [], [])
            if self._wake_reader in readable:
                return
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                # Out of descriptors or memory, or the peer has gone already.
                LOG.warning("Cannot accept a connection: %s", error)
                time.sleep(0.05)
                continue
            self._start_handshake(sock, _name(address))

    def _make_room(self) -> bool:
        """Wait until one more handshake may begin; return whether to go on listening."""
        with self._changed:
            while len(self._handshakes) >= self._max_handshakes and not self._closed:
                oldest, started = next(iter(self._handshakes.items()))
                left = started + self._fair_time - time.monotonic()
                if left <= 0:
                    oldest.interrupt("too many connections: it gave way to newer ones")
                    left = 0.01
                self._changed.wait(left)
            return not self._closed

    def _start_handshake(self, sock: socket.socket, peer: str) -> None:
        start = time.monotonic()
        channel = _Channel(sock, self._timeout, start)
        with self._changed:
            self._handshakes[channel] = start
        thread = threading.Thread(
            target=self._run_handshake, args=(channel, peer), name=f"wire-{peer}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            # No more threads. The place is given back, the stranger may come again.
            self._end_handshake(channel)
            sock.close()

    def _run_handshake(self, channel: _Channel, peer: str) -> None:
        try:
            connection, agreement = self._shake_hands(channel, peer)
        except Exception as error:
            refusal = channel.refusal(error)
            self._note_refusal(peer, refusal)
            self._tell(channel, refusal)
            channel.abandon()
        else:
            with self._changed:
                closed = self._closed
                if not closed:
                    self._accepted.append((connection, agreement))
            if closed:
                connection.close()
        finally:
            self._end_handshake(channel)

    def _end_handshake(self, channel: _Channel) -> None:
        with self._changed:
            del self._handshakes[channel]
            self._changed.notify_all()

    def _shake_hands(self, channel: _Channel, peer: str) -> tuple[Connection, Agreement]:
        prepare_socket(channel.sock)
        first = channel.first_byte()
        if self._context is None or self._tls is None:
            if first == _TLS_FIRST:
                raise Refusal("tls", "this relay is configured without TLS")
        elif first == _PLAIN_FIRST:
            raise Refusal("tls", "this relay is configured to require TLS")
        elif first != _TLS_FIRST:
            raise Refusal("malformed", "what it sent is not TLS") if first else EOFError
        else:
            sock = channel.start_tls(self._context, None)
            tls_module.check_peer_name(sock, self._tls.peer_name)
        role, index, agreement = hello.answer(channel, self._credentials, self._capabilities)
        connection = Connection(
            channel.sock, peer=peer, role=role, index=index, timeout=self._timeout
        )
        return connection, agreement

    def _tell(self, channel: _Channel, refusal: Refusal) -> None:
        """Send the refusal as an error; where TLS has failed OpenSSL has sent an alert already."""
        if isinstance(channel.sock, ssl.SSLSocket) and not channel.sock.version():
            return
        with contextlib.suppress(OSError, ValueError):
            # The deadline may be over, but there is no wait: it fits the socket's buffer.
            channel.sock.settimeout(_LINGER_SECONDS)
            channel.sock.sendall(hello.encode_refusal(refusal))

    def _note_refusal(self, peer: str, refusal: Refusal) -> None:
        with self._changed:
            self.refused += 1
            count = self.refused
            self.last_refusal = f"{peer}: {refusal.reason}"
        # A flood of strangers must not become a flood of lines.
        if count <= 16 or not count & (count - 1):
            LOG.warning(
                "Refused the connection of %s (%d refused by now): %s", peer, count, refusal.reason
            )
