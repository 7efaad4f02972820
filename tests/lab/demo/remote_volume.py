# SPDX-License-Identifier: Apache-2.0
"""A volume that the destination reaches over the same link as the migration: nothing is won there.

At the source qemu-storage-daemon serves it by NBD; at the destination another one has it as a file,
which is made a block device again, at the path that the volume has for the guest. What the guest
writes after its arrival takes that way as well, so there is one volume.
"""

import contextlib
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.lab.demo.clients import ClientError
from tests.lab.demo.stage import Stage
from tests.lab.loop_device import LoopDevice
from tests.lab.processes import terminate
from tests.lab.relays import wait_until

_FIRST_PORT = 10809
#: Of the servers of this process, each with a port of its own.
_numbers = itertools.count()
_NAME = "volume"


@contextlib.contextmanager
def shared_link(stage: Stage) -> Iterator[None]:
    """The first guest's destination has the volume over the link.

    :raises ClientError: one of the programs that bring it there has ended.
    """
    domain = stage.guests[0].domain
    source, destination = domain.host, stage.hosts.other(domain.host)
    file, size = domain.spec.disk, domain.spec.disk.stat().st_size
    # The guest uses it until its own end, also when it is at the other host again
    ends = stage.storage
    number = next(_numbers)
    port = _FIRST_PORT + number
    serving = file.with_suffix(f".server{number}")
    server = source.popen(
        ["qemu-storage-daemon", "--pidfile", str(serving), "--blockdev"]
        + [f"driver=file,node-name=v,filename={file},cache.direct=on,locking=off"]
        + ["--nbd-server", f"addr.type=inet,addr.host={source.address},addr.port={port}"]
        + ["--export", f"type=nbd,id=e,node-name=v,name={_NAME},writable=on"]
    )
    ends.callback(terminate, server)
    # It writes that file when its socket listens; the client tries only once
    _wait_for(server, serving.exists, "the volume is served")
    mountpoint = file.with_suffix(f".remote{number}")
    mountpoint.touch()
    client = destination.popen(
        ["qemu-storage-daemon", "--blockdev"]
        + [
            f"driver=nbd,node-name=v,export={_NAME},reconnect-delay=30,"
            f"server.type=inet,server.host={source.address},server.port={port}"
        ]
        + ["--export", f"type=fuse,id=e,node-name=v,mountpoint={mountpoint},writable=on"]
    )
    ends.callback(terminate, client)
    seen = Path(f"/proc/{client.pid}/root{mountpoint}")

    def there() -> bool:
        with contextlib.suppress(OSError):
            return os.stat(seen).st_size == size
        return False

    _wait_for(client, there, "the remote volume is there")
    device = ends.enter_context(LoopDevice(seen))
    destination.run(["mount", "--bind", str(device.path), str(domain.volume)])
    try:
        yield
    finally:
        destination.run(["umount", "--lazy", str(domain.volume)])


def _wait_for(daemon: "subprocess.Popen[Any]", condition: Callable[[], bool], what: str) -> None:
    def fulfilled() -> bool:
        if daemon.poll() is not None:
            raise ClientError(f"qemu-storage-daemon has ended before {what}")
        return condition()

    wait_until(fulfilled, what)
