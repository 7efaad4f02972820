# SPDX-License-Identifier: Apache-2.0
"""What goes on besides while guests migrate: a network that others use or that gets narrow, a
volume that cannot be read for a while.

Where a trouble does not come, or ends too soon, what was measured is not what it is called: they
all raise ClientError then.
"""

import contextlib
import fcntl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.lab.demo.clients import ClientError
from tests.lab.demo.midway import midway
from tests.lab.demo.stage import Stage
from tests.lab.loop_device import LoopDevice
from tests.lab.processes import end

#: A trouble comes when the network has carried what it can in so many seconds, and stays for some.
COMES, STAYS = 2.0, 5.0
_PORT = 5001
_RECEIVER = """
import socket
server = socket.create_server(("", int(__import__("sys").argv[1])))
print("ready", flush=True)
connection, _ = server.accept()
while connection.recv(1 << 20): pass
"""
_SENDER = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
data = bytes(1 << 18)
while True: connection.sendall(data)
"""
# struct loop_info64, of which lo_sizelimit is at byte 32, and what takes it over
_LOOP_SET_STATUS64, _LOOP_GET_STATUS64, _LOOP_SET_CAPACITY = 0x4C04, 0x4C05, 0x4C07
_LOOP_INFO_BYTES, _SIZE_LIMIT_AT = 232, 32


@contextlib.contextmanager
def background_traffic(stage: Stage) -> Iterator[None]:
    """One more TCP connection, which takes what it gets, in the direction of the migration."""
    source = stage.guests[0].domain.host
    destination = stage.hosts.other(source)
    receiver = destination.popen(
        [sys.executable, "-c", _RECEIVER, str(_PORT)], stdout=subprocess.PIPE
    )
    try:
        assert receiver.stdout is not None
        receiver.stdout.readline()
        sender = source.popen(
            [sys.executable, "-c", _SENDER, destination.address, str(_PORT)],
            stderr=subprocess.DEVNULL,
        )
        try:
            yield
            if sender.poll() is not None:
                raise ClientError("the traffic in the background has ended by itself")
        finally:
            end(sender)
    finally:
        end(receiver)


@contextlib.contextmanager
def narrow_network(stage: Stage) -> Iterator[None]:
    """The network drops to a fifth and returns."""
    with _for_a_while(
        stage,
        lambda: stage.hosts.shape(stage.shape.network / 5),
        lambda: stage.hosts.shape(stage.shape.network),
    ):
        yield


@contextlib.contextmanager
def failing_volume(stage: Stage) -> Iterator[None]:
    """The destination cannot read most of the volume for a while.

    It has a block device of its own for the same file, at the same path. The guest's own reads and
    writes go on, at the source.
    """
    guest = stage.guests[0]
    destination = stage.hosts.other(guest.domain.host)
    volume = guest.domain.volume
    with LoopDevice(guest.domain.spec.disk) as other:
        destination.run(["mount", "--bind", str(other.path), str(volume)])
        try:
            with _for_a_while(
                stage, lambda: _limit(other.path, 1 << 20), lambda: _limit(other.path, 0)
            ):
                yield
        finally:
            # The guest, if it is there now, keeps it open
            destination.run(["umount", "--lazy", str(volume)])


@contextlib.contextmanager
def _for_a_while(
    stage: Stage, begin: Callable[[], None], finish: Callable[[], None]
) -> Iterator[None]:
    def come(over: threading.Event) -> None:
        try:
            begin()
            over.wait(STAYS)
        finally:
            finish()

    with midway(stage.hosts.link.carried, COMES * stage.shape.network * 1e6, come):
        yield


def _limit(device: Path, size: int) -> None:
    """Let a loop device end after so many bytes; 0 for where its file ends."""
    with open(device, "rb") as opened:
        info = bytearray(_LOOP_INFO_BYTES)
        fcntl.ioctl(opened, _LOOP_GET_STATUS64, info)
        struct.pack_into("=Q", info, _SIZE_LIMIT_AT, size)
        fcntl.ioctl(opened, _LOOP_SET_STATUS64, bytes(info))
        fcntl.ioctl(opened, _LOOP_SET_CAPACITY)
