# SPDX-License-Identifier: Apache-2.0
"""Reader of a block device or a raw file, past the host's page cache.

Direct I/O is not only faster here. The volume is written by another host while it is read, so a
copy in this host's page cache may be stale: never wrong, as digests decide, but a miss.
"""

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator

import numpy as np
from oslo_log import log as logging

from nova_dmigrate import exception
from nova_dmigrate.volumes import base
from nova_dmigrate.volumes.uses import Uses

LOG = logging.getLogger(__name__)

# Buffers that are not aligned for direct I/O are read through an aligned one of this size.
_BOUNCE_BYTES = 1 << 20


class BlockReader(base.VolumeReader):
    """A block device or raw file at ``spec.location``, a path.

    :raises VolumeOpenError: if it is neither, or cannot be opened or read.
    """

    def __init__(self, spec: base.VolumeSpec) -> None:
        self.volume_id = spec.volume_id
        self._path = spec.location
        self._uses = Uses(self.volume_id, self._give_back)
        self._local = threading.local()
        self._fd, self.direct = self._open()
        try:
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            os.close(self._fd)
            raise self._open_error(error) from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.check_range(offset, buffer.nbytes)
        with self._descriptor() as fd:
            self._read(fd, offset, _bytes(buffer))

    def close(self) -> None:
        self._uses.close()

    def _give_back(self) -> None:
        os.close(self._fd)

    def _open(self) -> tuple[int, bool]:
        """(descriptor, whether it does direct I/O)."""
        try:
            return self._open_as(os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise self._open_error(error) from error
            refusal = error.strerror
        except ValueError as error:  # a path with a NUL byte
            raise self._open_error(error) from error
        try:
            fd = self._open_as(0)
        except OSError as error:
            raise self._open_error(error) from error
        LOG.warning(
            "Volume %s: %s does not support direct I/O (%s), so it is read through the host's "
            "page cache",
            self.volume_id,
            self._path,
            refusal,
        )
        return fd, False

    def _open_as(self, extra_flags: int) -> int:
        # O_NONBLOCK so that opening a FIFO does not wait for its writer; it has no effect on
        # what is accepted.
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | extra_flags)
        try:
            self._check_kind(fd)
            _probe(fd)
        except (OSError, exception.VolumeOpenError):
            os.close(fd)
            raise
        return fd

    def _check_kind(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise exception.VolumeOpenError(
                volume=self.volume_id,
                reason=f"{self._path} is neither a block device nor a regular file",
            )

    def _open_error(self, error: Exception) -> exception.VolumeOpenError:
        return exception.VolumeOpenError(
            volume=self.volume_id, reason=f"{self._path} cannot be opened: {_reason(error)}"
        )

    @contextlib.contextmanager
    def _descriptor(self) -> Iterator[int]:
        """The descriptor, kept open until the end of the block.

        Closing it under a read would let the read go to whatever file gets its number next.
        """
        self._uses.begin()
        try:
            yield self._fd
        finally:
            self._uses.end()

    def _read(self, fd: int, offset: int, buffer: memoryview) -> None:
        if not self.direct:
            # Before, so that nothing stale is read; after, so that nothing is left behind.
            os.posix_fadvise(fd, offset, buffer.nbytes, os.POSIX_FADV_DONTNEED)
            self._fill(fd, offset, buffer)
            os.posix_fadvise(fd, offset, buffer.nbytes, os.POSIX_FADV_DONTNEED)
        elif _is_aligned(buffer):
            self._fill(fd, offset, buffer)
        else:
            self._fill_through_bounce(fd, offset, buffer)

    def _fill(self, fd: int, offset: int, buffer: memoryview) -> None:
        """Read until the buffer is full; a single read may return less."""
        while buffer:
            try:
                done = os.preadv(fd, [buffer], offset)
            except OSError as error:
                raise self._read_error(offset, _reason(error)) from error
            # Direct I/O continues at block boundaries only.
            if done % base.BLOCK_SIZE or not done:
                raise self._read_error(offset + done, "the volume ends there")
            offset += done
            buffer = buffer[done:]

    def _fill_through_bounce(self, fd: int, offset: int, buffer: memoryview) -> None:
        bounce: memoryview | None = getattr(self._local, "bounce", None)
        if bounce is None:
            bounce = self._local.bounce = base.aligned_buffer(_BOUNCE_BYTES)
        for start in range(0, buffer.nbytes, _BOUNCE_BYTES):
            part = buffer[start : start + _BOUNCE_BYTES]
            self._fill(fd, offset + start, bounce[: part.nbytes])
            part[:] = bounce[: part.nbytes]

    def _read_error(self, offset: int, reason: str) -> exception.VolumeReadError:
        return exception.VolumeReadError(
            volume=self.volume_id, reason=f"reading at byte {offset}: {reason}"
        )


def _probe(fd: int) -> None:
    """Read the first block: some file systems accept O_DIRECT and refuse to read then.

    :raises OSError: (EINVAL) if this one does. Any other error is that of one block, and must
        not cost the whole volume.
    """
    try:
        os.preadv(fd, [base.aligned_buffer(base.BLOCK_SIZE)], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise


def _bytes(buffer: memoryview) -> memoryview:
    return buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")


def _is_aligned(buffer: memoryview) -> bool:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address % base.BLOCK_SIZE == 0


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
