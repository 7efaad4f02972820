# SPDX-License-Identifier: Apache-2.0
"""The port of an agent that does what a test wants."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nova_dmigrate.rpc import channel, messages
from nova_dmigrate.rpc.dispatcher import Dispatcher


@contextlib.contextmanager
def agent_at(path: Path, agent: Any) -> Iterator[None]:
    """An agent behind a socket as QEMU has it for a virtio-serial port.

    :param agent: has a method for each of the protocol's that is asked for.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    server = channel.ChannelServer(
        Dispatcher(agent, messages.AGENT), lambda: listener.accept()[0].detach()
    )
    server.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        server.stop()
        path.unlink()
