# SPDX-License-Identifier: Apache-2.0
"""Relays that talk to each other over the loopback, and people who should not be there."""

import atexit
import contextlib
import functools
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nova_dmigrate.relay.wire import (
    Agreement,
    Connection,
    Credentials,
    Frame,
    FrameType,
    Header,
    Listener,
    Role,
    TlsSettings,
    connect,
)
from tests import base
from tests.unit.relay.wire.certificates import Authority

#: Longer than anything takes, however slow the machine is.
LONG = 60.0
#: What a test that waits for a time-out has to wait.
SHORT = 0.2

SOURCE = "source.example.org"
DESTINATION = "destination.example.org"
HOST = "127.0.0.1"


@functools.cache
def _authority() -> tuple[Authority, TlsSettings, TlsSettings]:
    """Make the certificates of the two hosts once for all tests of the process."""
    directory = tempfile.mkdtemp(prefix="ndm-certificates-")
    atexit.register(shutil.rmtree, directory)
    authority = Authority(Path(directory))
    source = authority.settings(SOURCE, peer=DESTINATION)
    return authority, source, authority.settings(DESTINATION, peer=SOURCE)


def allocate(header: Header) -> memoryview:
    """Return new memory for the payload of a frame."""
    return memoryview(bytearray(header.length))


class WireTestCase(base.TestCase):
    """The destination listens, the source connects; ``use_tls`` says how."""

    use_tls = False

    def setUp(self) -> None:
        super().setUp()
        self.credentials = Credentials("2f3c6a1e-7d7e-4a55-9d43-0f2d1f6b7a10", os.urandom(32))

    @property
    def authority(self) -> Authority:
        return _authority()[0]

    @property
    def source_tls(self) -> TlsSettings | None:
        return _authority()[1] if self.use_tls else None

    @property
    def destination_tls(self) -> TlsSettings | None:
        return _authority()[2] if self.use_tls else None

    def listen(self, **changes: Any) -> Listener:
        """Start the destination's listener; it is closed with the test."""
        arguments: dict[str, Any] = {
            "host": HOST,
            "port": 0,
            "credentials": self.credentials,
            "tls": self.destination_tls,
            "timeout": LONG,
        }
        listener = Listener(**{**arguments, **changes})
        self.addCleanup(listener.close)
        return listener

    def connect(self, listener: Listener, **changes: Any) -> tuple[Connection, Agreement]:
        """Connect as the source does."""
        arguments: dict[str, Any] = {
            "credentials": self.credentials,
            "role": Role.DATA,
            "index": 0,
            "tls": self.source_tls,
            "timeout": LONG,
        }
        connection, agreement = connect(*listener.address, **{**arguments, **changes})
        self.addCleanup(connection.close)
        return connection, agreement

    def pair(self, role: Role = Role.DATA) -> tuple[Connection, Connection]:
        """Return the two ends of one connection: the one that sends, the one that receives."""
        listener = self.listen()
        source, _ = self.connect(listener, role=role)
        destination, _ = listener.accept(LONG)
        self.addCleanup(destination.close)
        return (source, destination) if role is Role.DATA else (destination, source)

    def assert_right_peer_gets_in(self, listener: Listener) -> None:
        """Connect, and let a frame go across."""
        source, _ = self.connect(listener)
        destination, _ = listener.accept(LONG)
        self.addCleanup(destination.close)
        self.assert_carries(source, destination)

    def assert_carries(
        self,
        sender: Connection,
        receiver: Connection,
        frame_type: FrameType = FrameType.VERBATIM,
    ) -> None:
        """Let a frame go across."""
        sender.send(frame_type, seq=7, payload=[b"sea"])
        frame = receiver.receive(allocate)
        self.assertEqual((7, b"sea"), (frame.header.seq, bytes(frame.payload)))

    def assert_refused(self, listener: Listener, count: int, reason: str) -> None:
        """Wait until ``count`` strangers were refused, the last one for ``reason``."""
        wait_for(lambda: listener.refused >= count)
        self.assertEqual(count, listener.refused)
        self.assertIn(reason, listener.last_refusal)
        wait_for(lambda: reason in self.log.output)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds."""
    end = time.monotonic() + LONG
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("the condition never held")
        time.sleep(0.005)


def stranger(listener: Listener, data: bytes = b"") -> socket.socket:
    """Connect to the listener without a handshake, and send ``data``."""
    sock = socket.create_connection(listener.address, LONG)
    if data:
        sock.sendall(data)
    return sock


def read_all(sock: socket.socket) -> bytes:
    """Return what comes until the end; a reset is an end, too."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            data += part
    return data


@contextlib.contextmanager
def in_thread(function: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """Run ``function`` beside the block, which may call the result to wait for its outcome."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(LONG)
        if not outcome:
            raise AssertionError("the thread does not end")
        return outcome[0]

    yield result
    result()


def receive_all(connection: Connection, count: int) -> list[Frame]:
    """Return the next ``count`` frames."""
    return [connection.receive(allocate) for _ in range(count)]
