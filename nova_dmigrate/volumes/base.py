# SPDX-License-Identifier: Apache-2.0
"""What the destination relay needs of a volume: to read it, concurrently and within its bounds.

A reader is one class in a module of its own, registered in ``nova_dmigrate.volumes``. Reads are
blocking and thread-safe, so that whoever reads chooses the queue depth by the number of threads.
"""

import abc
import dataclasses
import mmap
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from nova_dmigrate import exception

BLOCK_SIZE = 4096

#: The key of an encrypted volume, by the name that a volume's location has for it. Raises
#: HypervisorError: this host has none of that name, or does not tell it in time.
Keys = Callable[[str], bytes]


@dataclasses.dataclass(frozen=True)
class VolumeSpec:
    """How to reach a volume: its id, the name of the driver, and where that finds it.

    :ivar secret: the key to it, where the storage wants one; in no log.
    """

    volume_id: str
    driver: str
    location: str
    secret: str = dataclasses.field(default="", repr=False)


@dataclasses.dataclass(frozen=True)
class VolumeAccess:
    """How this host reaches network storage, whatever it is told of a volume.

    :ivar timeout: seconds after which storage that does not answer has failed.
    :ivar rbd_user, rbd_configuration, rbd_keyring: this host's account with Ceph; empty for what
        the volume's location says.
    :ivar keys: of volumes that QEMU encrypts; None where this host gives none to relays.
    :ivar runtime_directory: where short-lived files can be made; None for the system's place.
    """

    timeout: float = 5.0
    rbd_user: str = ""
    rbd_configuration: str = ""
    rbd_keyring: str = ""
    keys: Keys | None = None
    runtime_directory: Path | None = None


class VolumeReader(abc.ABC):
    """A volume opened for reading.

    ``volume_id`` names it in errors, ``size`` is its size in bytes when it was opened.
    """

    volume_id: str
    size: int

    @abc.abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` (bytes) on. Blocks; may be called by many threads.

        Offset and length must be multiples of 4 KiB. After an error the buffer's content is
        undefined.

        :raises VolumeBoundsError: if the range is unaligned or not inside the volume.
        :raises VolumeTimeoutError: if the volume does not answer.
        :raises VolumeReadError: if it cannot be read in full, or the reader was closed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give the volume back. Reads that are under way end undisturbed; later ones fail."""

    def __enter__(self) -> "VolumeReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def check_range(self, offset: int, length: int) -> None:
        """Check a range in bytes: what the guest's map asks for must not leave the volume.

        :raises VolumeBoundsError: if it is empty, unaligned or not inside the volume.
        """
        if offset % BLOCK_SIZE or length % BLOCK_SIZE or length <= 0:
            reason = f"{length} bytes at {offset} are not whole blocks of {BLOCK_SIZE} bytes"
        elif not 0 <= offset <= self.size - length:
            reason = f"{length} bytes at {offset} are outside its {self.size} bytes"
        else:
            return
        raise exception.VolumeBoundsError(volume=self.volume_id, reason=reason)


def aligned_buffer(size: int) -> memoryview:
    """A zeroed, writable buffer of ``size`` bytes that begins at a page boundary, as direct I/O
    needs. It is freed with its last view."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:size]
