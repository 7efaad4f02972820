# SPDX-License-Identifier: Apache-2.0
"""What of a session QEMU has to reach: its socket, and the directory of that."""

import contextlib
import os
import shutil
import stat
from pathlib import Path

from nova_dmigrate.host.qemu_account import OWN
from nova_dmigrate.host.store import Record


class QemuFiles:
    """Makes, gives away, and removes it.

    :param owner: user and group that get it, as in `qemu_account`.
    """

    def __init__(self, owner: tuple[int, int]) -> None:
        self._owner = owner

    def make_directory(self, record: Record) -> None:
        """A directory of its own, in which QEMU can make or find its socket.

        :raises OSError: it cannot be made.
        """
        if record.directory is None:
            return
        path = Path(record.directory)
        path.mkdir(mode=0o700, exist_ok=True)
        if self._owner != OWN:
            # What is made there belongs to QEMU's group, whoever makes it
            path.chmod(0o2770)
            self._give(path)

    def give_socket(self, record: Record) -> None:
        """Let QEMU connect to a socket that the relay has made.

        :raises OSError: it cannot be given away.
        """
        self._give(Path(record.socket))

    def remove(self, record: Record) -> None:
        """:raises OSError: something stays behind."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(record.socket).st_mode):
                os.unlink(record.socket)
        if record.directory is not None:
            shutil.rmtree(record.directory, ignore_errors=True)

    def _give(self, path: Path) -> None:
        if self._owner != OWN:
            os.chown(path, *self._owner, follow_symlinks=False)
