# SPDX-License-Identifier: Apache-2.0
"""A file as a block device: a volume that several hosts of one machine have in common.

The kernel detaches it when the last process that has it open is gone, this one included: a crash
leaves no loop device behind.
"""

import errno
import fcntl
import os
import struct
from pathlib import Path

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_AUTOCLEAR, _DIRECT_IO = 4, 16
# struct loop_config: descriptor, block size, struct loop_info64 of which only the flags are set
_CONFIG = struct.Struct("=II 52x I 176x 64x")


class LoopDevice:
    """`path` is the device, `file` what is behind it, read and written past the page cache.

    A context manager.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        backing = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.path, self._descriptor = _configure(backing)
        finally:
            os.close(backing)

    def __enter__(self) -> "LoopDevice":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the device; it is gone when its other users have, too."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _configure(backing: int) -> tuple[Path, int]:
    config = _CONFIG.pack(backing, 0, _AUTOCLEAR | _DIRECT_IO)
    with open("/dev/loop-control", "rb") as control:
        while True:
            path = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                return path, device
            except OSError as error:
                os.close(device)
                # Somebody else has taken it since.
                if error.errno != errno.EBUSY:
                    raise
