# SPDX-License-Identifier: Apache-2.0
"""A proxy between two QEMUs that keeps what the source sends, connection by connection."""

import contextlib
import pathlib
import socket
import threading

CHUNK = 1 << 18
STREAM_MAGIC = b"QEVM"


class Tee(contextlib.AbstractContextManager["Tee"]):
    """Listens on ``path``; every connection gets one of its own to ``target``.

    Both directions are relayed with their half-closes, the forward bytes are kept.
    """

    def __init__(self, path: pathlib.Path, target: pathlib.Path) -> None:
        self._target = target
        self._streams: list[bytearray] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._start(self._accept)

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                source, _ = self._listener.accept()
                destination = socket.socket(socket.AF_UNIX)
                destination.connect(str(self._target))
                self._sockets += [source, destination]
                stream = bytearray()
                self._streams.append(stream)
                self._start(self._copy, source, destination, stream)
                self._start(self._copy, destination, source, None)

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket, keep: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                if keep is not None:
                    keep += data
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def main_stream(self) -> bytes:
        """What the main channel carried: the one that begins with the stream's magic."""
        for stream in self._streams:
            if stream.startswith(STREAM_MAGIC):
                return bytes(stream)
        return b""

    def channels(self) -> int:
        """Connections that were made, the main channel included."""
        return len(self._streams)

    def __exit__(self, *exc: object) -> None:
        # shutdown wakes the threads, which close alone would leave in accept and recv.
        for each in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for each in [self._listener, *self._sockets]:
            each.close()
