# SPDX-License-Identifier: Apache-2.0
"""A process of an unprivileged user that looks like a database server.

As a program of its own it listens at a socket in its working directory, greets as MariaDB does,
and wants the client to log in by the plugin of its argument. What it is told it prints, in
hexadecimal, one connection a line. With the argument ``loop`` its socket's name leads to itself.
"""

import contextlib
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

USER = "nobody"
_PR_SET_NAME = 15
_CAPABILITIES = 0x000AA209  # of a server: protocol 4.1, secure connection, plugins among them


class Impostor:
    """The process, as the test sees it."""

    def __init__(self, process: "subprocess.Popen[str]", socket_path: Path) -> None:
        self._process = process
        self.pid = process.pid
        self.socket = socket_path

    def told(self) -> bytes:
        """What the next client that comes, or came, has said."""
        assert self._process.stdout is not None
        return bytes.fromhex(self._process.stdout.readline())

    def end(self) -> None:
        from tests.lab import processes

        processes.end(self._process, [(signal.SIGTERM, 5)])


@contextlib.contextmanager
def running(directory: Path, how: str, prefix: Sequence[str] = ()) -> Iterator[Impostor]:
    """An impostor that runs as USER, by the command ``prefix`` if need be."""
    from tests.lab import processes

    os.chmod(directory, 0o777)
    # The user may not be able to read this tree, nor its Python
    process = processes.spawn(
        ["setpriv", f"--reuid={USER}", "--clear-groups", *prefix, "/usr/bin/python3", "-I", "-c"]
        + [Path(__file__).read_text(), how],
        cwd=directory,
        stdout=subprocess.PIPE,
        text=True,
    )
    impostor = Impostor(process, directory / "server.sock")
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "up\n":
            raise RuntimeError("the impostor does not start")
        yield impostor
    finally:
        impostor.end()
        process.stdout.close()


def _packet(number: int, content: bytes) -> bytes:
    return struct.pack("<I", len(content))[:3] + bytes([number]) + content


def _greeting() -> bytes:
    return (
        b"\x0a5.5.5-10.11.6-MariaDB\0"
        + struct.pack("<I8sBHBHHB", 7, b"A" * 8, 0, _CAPABILITIES & 0xFFFF, 33, 2, 0x8, 21)
        + bytes(10)
        + b"B" * 12
        + b"\0mysql_native_password\0"
    )


def _converse(client: socket.socket, plugin: bytes) -> bytes:
    """Ask a client to log in; all that it says."""
    client.settimeout(5)
    said = b""
    with contextlib.suppress(OSError):
        client.sendall(_packet(0, _greeting()))
        said = client.recv(4096)
        if said:
            prompt = b"\x05Password: " if plugin == b"dialog" else b""
            client.sendall(_packet(said[3] + 1, b"\xfe" + plugin + b"\0" + prompt))
            said += client.recv(4096)
    return said


def main(how: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"mysqld", 0, 0, 0)
    path = os.path.join(os.getcwd(), "server.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.chmod(path, 0o777)
        listener.listen()
        if how == "loop":
            os.unlink(path)
            os.symlink("server.sock", path)
        print("up", flush=True)
        while True:
            with listener.accept()[0] as client:
                print(_converse(client, how.encode()).hex(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
