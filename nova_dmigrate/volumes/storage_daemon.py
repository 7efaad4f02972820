# SPDX-License-Identifier: Apache-2.0
"""A qemu-storage-daemon that exports one image by NBD, to this process alone and for as long as it
lives.
"""

import collections
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from oslo_log import log as logging

LOG = logging.getLogger(__name__)

PROGRAM = "qemu-storage-daemon"
EXPORT = "volume"
#: Has the kernel kill the daemon when the thread that has started it is gone.
_BOUND = ("setpriv", "--pdeathsig", "KILL", "--")
#: What it says on standard error is kept to so many lines.
_LINES = 8
_MAX_LINE = 1024
_BACKLOG = 64


class StorageDaemon:
    """The process. It serves at :attr:`address` until :meth:`stop`.

    A thread of its own starts it and outlives it: the kernel kills the daemon when that thread
    ends, which it does with this process, however that ends.

    :param image: options of ``--blockdev``. :param keys: values of the ``secret`` objects that they
        name, by name; they are on no command line, and on no disk.
    :param directory: in which files can be made, None for the system's. Nothing is left there.
    :raises OSError, ValueError: it cannot be started.
    """

    def __init__(
        self, image: dict[str, Any], keys: dict[str, bytes], directory: Path | None
    ) -> None:
        self._said: collections.deque[str] = collections.deque(maxlen=_LINES)
        self._started, self._ended = threading.Event(), threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._failure: OSError | ValueError | None = None
        with contextlib.ExitStack() as inherited:
            listener, self._place = _listen(directory)
            inherited.callback(listener.close)
            descriptors = [listener.fileno()]
            command = [*_BOUND, PROGRAM]
            for name, key in keys.items():
                descriptors.append(inherited.enter_context(_readable(key)))
                command += ["--object", f"secret,id={name},file=/proc/self/fd/{descriptors[-1]}"]
            node = json.dumps({**image, "node-name": EXPORT})
            self._prefix = f"{PROGRAM}: --blockdev {node}: "
            command += [
                "--blockdev",
                node,
                "--nbd-server",
                f"addr.type=fd,addr.str={descriptors[0]}",
                "--export",
                f"type=nbd,id={EXPORT},node-name={EXPORT},name={EXPORT},writable=off",
            ]
            threading.Thread(
                target=self._keep,
                args=(command, descriptors),
                name="storage-daemon",
                daemon=True,
            ).start()
            self._started.wait()
        if self._failure is not None:
            os.close(self._place)
            raise self._failure

    @property
    def address(self) -> str:
        """Path of its socket, for this process alone."""
        return f"/proc/self/fd/{self._place}"

    def ended(self, seconds: float) -> bool:
        """Whether it has ended, or does so within that time."""
        return self._ended.wait(seconds)

    @property
    def said(self) -> str:
        """Its last words on standard error, on one line."""
        return "; ".join(self._said)

    def stop(self, patience: float) -> bool:
        """Kill it, which loses nothing: it only reads. Once only; whether it is gone.

        :param patience: seconds that are waited for that: where its storage hangs, it ends when
            that answers.
        """
        assert self._process is not None
        os.close(self._place)
        self._process.kill()
        return self._ended.wait(patience)

    def _keep(self, command: Sequence[str], descriptors: Sequence[int]) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=descriptors,
                # Not with this process by a signal from a terminal
                start_new_session=True,
                text=True,
                errors="replace",
            )
        except (OSError, ValueError) as error:
            self._failure = error
        finally:
            self._started.set()
        if self._process is not None:
            assert self._process.stderr is not None
            for line in self._process.stderr:
                self._said.append(line.strip().removeprefix(self._prefix)[:_MAX_LINE])
            self._process.stderr.close()
            self._process.wait()
        self._ended.set()


def _listen(directory: Path | None) -> tuple[socket.socket, int]:
    """A listening socket that has no name any more, with a descriptor by which it is reached.

    So there is nothing to be removed, and nobody else to connect.
    """
    with tempfile.TemporaryDirectory(dir=directory, prefix="volume-") as private:
        path = os.path.join(private, "nbd")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
            listener.listen(_BACKLOG)
            return listener, os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            listener.close()
            raise


@contextlib.contextmanager
def _readable(data: bytes) -> Iterator[int]:
    """A descriptor with the data, in memory."""
    descriptor = os.memfd_create("key")
    try:
        os.write(descriptor, data)
        yield descriptor
    finally:
        os.close(descriptor)
