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
from collections.abc import Iterator, Sequence

import numpy as np
from oslo_log import log as logging

from nova_dmigrate import exception
from nova_dmigrate.volumes import base
from nova_dmigrate.volumes.uses import Uses

LOG = logging.getLogger(__name__)

# Ranges that follow each other on the volume are read by one system call, up to this many.
_MAX_BUFFERS = min(os.sysconf("SC_IOV_MAX"), 1024)
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
            self._read(fd, offset, [_bytes(buffer)])

    def read_ranges(
        self, ranges: Sequence[tuple[int, memoryview]]
    ) -> list[exception.VolumeError | None]:
        results: list[exception.VolumeError | None] = []
        for offset, buffers in _merged(ranges):
            error = self._try_read_all(offset, buffers)
            if error is not None and len(buffers) > 1:
                # One bad block must not fail its neighbours.
                for buffer in buffers:
                    results.append(self._try_read(offset, buffer))
                    offset += buffer.nbytes
            else:
                results.extend([error] * len(buffers))
        return results

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

    def _try_read_all(
        self, offset: int, buffers: Sequence[memoryview]
    ) -> exception.VolumeError | None:
        """Fill buffers that follow each other on the volume, or tell why not."""
        try:
            self.check_range(offset, sum(buffer.nbytes for buffer in buffers))
            for buffer in buffers:
                self.check_range(offset, buffer.nbytes)
            with self._descriptor() as fd:
                self._read(fd, offset, [_bytes(buffer) for buffer in buffers])
        except exception.VolumeError as error:
            return error
        return None

    def _read(self, fd: int, offset: int, buffers: list[memoryview]) -> None:
        if not self.direct:
            length = sum(buffer.nbytes for buffer in buffers)
            # Before, so that nothing stale is read; after, so that nothing is left behind.
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
            self._fill(fd, offset, buffers)
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        elif all(_is_aligned(buffer) for buffer in buffers):
            self._fill(fd, offset, buffers)
        else:
            self._fill_through_bounce(fd, offset, buffers)

    def _fill(self, fd: int, offset: int, buffers: list[memoryview]) -> None:
        """Read until the buffers are full; a single read may return less."""
        while buffers:
            try:
                done = os.preadv(fd, buffers, offset)
            except OSError as error:
                raise self._read_error(offset, _reason(error)) from error
            # Direct I/O continues at block boundaries only.
            if done % base.BLOCK_SIZE or not done:
                raise self._read_error(offset + done, "the volume ends there")
            offset += done
            buffers = _behind(buffers, done)

    def _fill_through_bounce(self, fd: int, offset: int, buffers: list[memoryview]) -> None:
        bounce: memoryview | None = getattr(self._local, "bounce", None)
        if bounce is None:
            bounce = self._local.bounce = base.aligned_buffer(_BOUNCE_BYTES)
        for buffer in buffers:
            for start in range(0, buffer.nbytes, _BOUNCE_BYTES):
                part = buffer[start : start + _BOUNCE_BYTES]
                self._fill(fd, offset, [bounce[: part.nbytes]])
                part[:] = bounce[: part.nbytes]
                offset += part.nbytes

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


def _merged(
    ranges: Sequence[tuple[int, memoryview]],
) -> Iterator[tuple[int, list[memoryview]]]:
    """Join neighbours in ``ranges`` that follow each other on the volume."""
    start = end = 0
    buffers: list[memoryview] = []
    for offset, buffer in ranges:
        if buffers and (offset != end or len(buffers) == _MAX_BUFFERS):
            yield start, buffers
            buffers = []
        if not buffers:
            start = offset
        buffers.append(buffer)
        end = offset + buffer.nbytes
    if buffers:
        yield start, buffers


def _behind(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left of ``buffers`` after their first ``done`` bytes."""
    for index, buffer in enumerate(buffers):
        if done < buffer.nbytes:
            return [buffer[done:], *buffers[index + 1 :]]
        done -= buffer.nbytes
    return []


def _bytes(buffer: memoryview) -> memoryview:
    return buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")


def _is_aligned(buffer: memoryview) -> bool:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address % base.BLOCK_SIZE == 0


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
