# SPDX-License-Identifier: Apache-2.0
"""The memory of another process: its anonymous mappings, their guest pages, pieces of content.

Nothing here stops or changes the process. A page that is not in memory is not touched either:
reading it would make the kernel allocate it on the process's behalf, so what is present is always
asked for first.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import re
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception
from nova_dmigrate.agent import processes

PAGE_SIZE = 4096
_PAGE_SHIFT = 12
_PAGEMAP_ENTRY = 8
_PRESENT = np.uint64(1 << 63)
_PFN_MASK = np.uint64((1 << 55) - 1)
_MAX_PFN = 2**32 - 2  # see buffermap.MAX_PAGES

# The kernel takes at most 1024 pieces in one call (UIO_MAXIOV)
_IOV_MAX = 1024

_MAPS_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ (\d+) *(.*)")

# Names under which anonymous memory and huge pages appear. The kernel calls System V segments and
# shared anonymous memory deleted files.
_POOL_NAMES = re.compile(r"|\[anon(_shmem)?:.*\]|/anon_hugepage.*|/SYSV[0-9a-f]{8}.*|/dev/zero.*")

U64 = NDArray[np.uint64]
Bytes = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Mapping:
    """A stretch of virtual addresses, in bytes, aligned to 4 KiB."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def parse_maps(text: str, min_bytes: int = 0) -> list[Mapping]:
    """The writable anonymous mappings in the text of /proc/PID/maps, neighbours merged.

    The kernel splits one allocation into several mappings where advice or policy differ, so a
    frame of the buffer pool may straddle two of them.

    ``min_bytes``: leave out what is smaller after merging.
    """
    merged: list[Mapping] = []
    for line in text.splitlines():
        match = _MAPS_LINE.fullmatch(line)
        if match is None or not match[3].startswith("rw") or not _POOL_NAMES.fullmatch(match[6]):
            continue
        start, end = int(match[1], 16), int(match[2], 16)
        if merged and merged[-1].end == start:
            merged[-1] = Mapping(merged[-1].start, end)
        else:
            merged.append(Mapping(start, end))
    return [mapping for mapping in merged if mapping.size >= min_bytes]


class ProcessMemory:
    """Read access to the memory of process ``pid``. Use as a context manager.

    Any number of threads may read at the same time: nothing is kept from one call to the next.
    It is closed when all of them have come back.

    :raises ServerNotFound: if the process is gone.
    :raises PrivilegeError: if the kernel does not let us.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        try:
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise processes.process_error(pid, error) from error

    def __enter__(self) -> ProcessMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1

    def mappings(self, min_bytes: int = 0) -> list[Mapping]:
        """The mappings in which a buffer pool may lie, sorted by address."""
        try:
            with open(f"/proc/{self._pid}/maps", encoding="utf-8", errors="replace") as file:
                return parse_maps(file.read(), min_bytes)
        except OSError as error:
            raise processes.process_error(self._pid, error) from error

    def guest_pages(self, address: int, count: int) -> NDArray[np.int64]:
        """Guest page (PFN) of each of ``count`` pages from ``address`` on: int64 (count,).

        -1 where the page is not in memory, or beyond what a buffer map can name.

        :raises PrivilegeError: if the kernel hides the numbers (it needs CAP_SYS_ADMIN).
        """
        entries = np.zeros(count, np.uint64)
        view = memoryview(entries).cast("B")
        position = (address >> _PAGE_SHIFT) * _PAGEMAP_ENTRY
        filled = 0
        try:
            while filled < len(view):
                got = os.preadv(self._pagemap, [view[filled:]], position + filled)
                if not got:
                    break  # the process is gone, or the address beyond its address space
                filled += got
        except OSError as error:
            raise processes.process_error(self._pid, error) from error
        present = (entries & _PRESENT) != 0
        numbers = (entries & _PFN_MASK).astype(np.int64)
        if bool(present.any()) and not bool(numbers[present].any()):
            raise exception.PrivilegeError(
                reason="the kernel hides page frame numbers; the agent needs CAP_SYS_ADMIN"
            )
        numbers[~present | (numbers > _MAX_PFN)] = -1
        return numbers

    def read_pieces(self, addresses: U64, lengths: U64) -> tuple[Bytes, bool]:
        """Read many pieces: (their bytes one after the other, u8; whether all could be read).

        Pieces that cannot be read (any more) are zeros.

        ``addresses``, ``lengths``: u64 (n,), in bytes.
        """
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if ends.size else 0
        content = np.zeros(total, np.uint8)
        # The kernel fills one buffer from many pieces; it costs half of what two lists cost.
        remote = np.empty((addresses.size, 2), np.uint64)
        remote[:, 0] = addresses
        remote[:, 1] = lengths
        local = np.empty((1, 2), np.uint64)
        first = done = 0
        whole = True
        while first < addresses.size:
            local[0] = (content.ctypes.data + done, total - done)
            pieces = min(_IOV_MAX, addresses.size - first)
            got = self._readv(local, remote[first : first + pieces])
            last = first + pieces
            if done + got == int(ends[last - 1]):
                first, done = last, done + got
                continue
            # The first piece that is not whole could not be read: go on behind it.
            whole = False
            failed = int(np.searchsorted(ends, np.uint64(done + got), side="right"))
            content[done + got : int(ends[failed])] = 0
            first, done = failed + 1, int(ends[failed])
        return content, whole

    def _readv(self, local: U64, remote: U64) -> int:
        """Bytes read; 0 where the first piece is not readable."""
        got: int = _process_vm_readv(
            self._pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote), 0
        )
        if got >= 0:
            return got
        number = ctypes.get_errno()
        if number == errno.EFAULT:
            return 0
        raise processes.process_error(self._pid, OSError(number, os.strerror(number)))


_process_vm_readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
_process_vm_readv.restype = ctypes.c_ssize_t
_process_vm_readv.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]
