# SPDX-License-Identifier: Apache-2.0
"""A server of NBD that does what a test says: right, wrong, slowly, or not at all."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

READ, DISCONNECT = 0, 2
FIXED_NEWSTYLE = 1
ACK, INFO = 1, 3

Request = tuple[int, int, int, int]


def greeting(magic: bytes = b"NBDMAGICIHAVEOPT", flags: int = FIXED_NEWSTYLE) -> bytes:
    return magic + struct.pack(">H", flags)


def answer(kind: int, data: bytes = b"", option: int = 7, magic: int = 0x3E889045565A9) -> bytes:
    """One answer to an option."""
    return struct.pack(">QIII", magic, option, kind, len(data)) + data


def exported(size: int) -> bytes:
    """All answers to NBD_OPT_GO."""
    other = answer(INFO, struct.pack(">HIII", 3, 1, 4096, 1 << 25))
    return other + answer(INFO, struct.pack(">HQH", 0, size, 1)) + answer(ACK)


def reply(cookie: int, data: bytes = b"", error: int = 0, magic: int = 0x67446698) -> bytes:
    return struct.pack(">IIQ", magic, error, cookie) + data


class Peer:
    """The server's end of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._file = connection.makefile("rb")
        self.export = b""

    def negotiate(self, answers: bytes, hello: bytes | None = None) -> None:
        self.send(greeting() if hello is None else hello)
        self._file.read(4 + 8 + 4)
        (length,) = struct.unpack(">I", self._file.read(4))
        data = self._file.read(length)
        self.export = data[4 : 4 + int.from_bytes(data[:4], "big")]
        self.send(answers)

    def requests(self, count: int) -> list[Request]:
        """(type, cookie, offset, length) of so many requests; fewer if the client is gone."""
        found = []
        while len(found) < count:
            data = self._file.read(28)
            if len(data) < 28:
                break
            magic, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", data)
            assert magic == 0x25609513, hex(magic)
            found.append((kind, cookie, offset, length))
        return found

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)


class Server:
    """Serves one connection after the other, each with the next of ``scripts``.

    :ivar failures: of the scripts.
    """

    def __init__(self, path: Path, scripts: Sequence[Callable[[Peer], None]]) -> None:
        self.address = str(path)
        self.failures: list[Exception] = []
        self._scripts = scripts
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """Wait for the last script to end."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        for script in self._scripts:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    script(Peer(connection))
                except Exception as error:
                    self.failures.append(error)
