# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a file lie on the device beneath its file system (FIEMAP).

Only file systems whose FIEMAP speaks of bytes of that one device are asked: ext4 (also when it
mounts ext2 or ext3) and XFS. On others, Btrfs for one, the same numbers mean something else.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import re
import struct

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception
from nova_dmigrate.agent import processes

BLOCK = 4096

_FS_IOC_FIEMAP = 0xC020660B
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_XFLAG_REALTIME = 0x1

_REQUEST = struct.Struct("<QQIIII")
_EXTENTS_PER_CALL = 512
_EXTENT = np.dtype(
    {
        "names": ["logical", "physical", "length", "flags"],
        "formats": ["<u8", "<u8", "<u8", "<u4"],
        "offsets": [0, 8, 16, 40],
        "itemsize": 56,
    }
)
_LAST = 0x1
# Not (yet) on the device, not as the file has it, or not at that place alone: unknown, delayed
# allocation, encoded, encrypted, not aligned, inline, tail, unwritten
_UNUSABLE = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800

_SUPPORTED = ("ext2", "ext3", "ext4", "xfs")

U64 = NDArray[np.uint64]


@dataclasses.dataclass(frozen=True)
class Extents:
    """Stretches of a file and where they lie. Arrays u64 (n,), in bytes, sorted by ``logical``.

    ``logical``: offset in the file. ``physical``: offset on the device. ``length``: bytes.
    """

    logical: U64
    physical: U64
    length: U64


@dataclasses.dataclass(frozen=True)
class Mount:
    """The file system of one device number: its type and options, as the kernel lists them."""

    kind: str
    options: frozenset[str]


def read_mounts(pid: int) -> dict[int, Mount]:
    """The mounts that a process sees, by device number."""
    try:
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="replace") as file:
            return parse_mounts(file.read())
    except OSError as error:
        raise processes.process_error(pid, error) from error


def parse_mounts(text: str) -> dict[int, Mount]:
    """Mounts by device number (st_dev), from the text of /proc/PID/mountinfo."""
    mounts: dict[int, Mount] = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, source = left.split(), right.split()
        match = re.fullmatch(r"(\d+):(\d+)", fields[2]) if len(fields) > 2 else None
        if match is None or not source:
            continue
        options = frozenset(source[2].split(",")) if len(source) > 2 else frozenset()
        mounts[os.makedev(int(match[1]), int(match[2]))] = Mount(source[0], options)
    return mounts


def check_mount(path: str, mount: Mount | None) -> None:
    """Check that extents of files on this file system can be trusted.

    :raises StorageError: if not; its ``code`` is the reason as a stable word.
    """
    kind = "unknown" if mount is None else mount.kind
    if mount is None or kind not in _SUPPORTED:
        raise exception.StorageError(
            path=path, reason=f"file system {kind} is not supported", code="unsupported-filesystem"
        )
    if "data=journal" in mount.options:
        raise exception.StorageError(
            path=path,
            reason="the file system journals data, so that the newest may not be in place",
            code="journalled-data",
        )


def file_extents(descriptor: int, path: str) -> Extents:
    """The usable extents of an open file, at present. ``path`` is for messages only.

    :raises StorageError: if the file system does not tell, or keeps the file elsewhere.
    """
    _check_realtime(descriptor, path)
    pieces = []
    position, end = 0, 2**63 - 1
    while position < end:
        extents = _fiemap(descriptor, path, position, end - position)
        if not extents.size:
            break
        pieces.append(extents)
        position = int(extents["logical"][-1] + extents["length"][-1])
        if extents["flags"][-1] & _LAST:
            break
    found = np.concatenate(pieces) if pieces else np.empty(0, _EXTENT)
    found = found[(found["flags"] & _UNUSABLE) == 0]
    return Extents(
        found["logical"].astype(np.uint64),
        found["physical"].astype(np.uint64),
        found["length"].astype(np.uint64),
    )


def _fiemap(descriptor: int, path: str, start: int, length: int) -> NDArray[np.void]:
    """One call: the next extents from ``start`` on, as _EXTENT (n,)."""
    buffer = bytearray(_REQUEST.size + _EXTENTS_PER_CALL * _EXTENT.itemsize)
    _REQUEST.pack_into(buffer, 0, start, length, 0, 0, _EXTENTS_PER_CALL, 0)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, buffer, True)
    except OSError as error:
        raise exception.StorageError(
            path=path,
            reason=f"its extents cannot be read: {error.strerror}",
            code="unsupported-filesystem",
        ) from error
    mapped = _REQUEST.unpack_from(buffer)[3]
    extents: NDArray[np.void] = np.frombuffer(buffer, _EXTENT, mapped, _REQUEST.size)
    return extents


def _check_realtime(descriptor: int, path: str) -> None:
    """XFS can keep a file on a second device, on which the extents' offsets then are."""
    attributes = bytearray(28)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_FSGETXATTR, attributes, True)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            return  # a file system that does not know the question has no such device
        raise exception.StorageError(
            path=path,
            reason=f"its attributes cannot be read: {error.strerror}",
            code="unsupported-filesystem",
        ) from error
    if struct.unpack_from("<I", attributes)[0] & _FS_XFLAG_REALTIME:
        raise exception.StorageError(
            path=path,
            reason="the file is on the real-time device of XFS",
            code="unsupported-filesystem",
        )
