# SPDX-License-Identifier: Apache-2.0
"""From a block device of the guest to the volumes beneath it.

Followed are disks, their partitions, and device-mapper devices made of linear pieces (LVM's
ordinary volumes), nested as they may be. Everything else (dm-crypt, RAID, thin pools, caches,
multipath, network block devices) is refused by name: a wrong place would cost a miss for every
page. A disk is named by its serial: Nova gives it the Cinder volume's id, of which virtio-blk
shows the first 20 characters.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.agent import filesystem

_SECTOR = 512
_MAX_DEPTH = 8
_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)

# struct dm_ioctl up to and including dev, of 312 bytes altogether; then struct dm_target_spec
_DM_TABLE_STATUS = 0xC138FD0C
_DM_HEADER = struct.Struct("<3I I I I i I I I Q")
_DM_HEADER_BYTES = 312
_DM_STATUS_TABLE_FLAG = 1 << 4
_DM_BUFFER_FULL_FLAG = 1 << 8
_DM_TARGET = struct.Struct("<QQiI16s")
_DM_BUFFER_BYTES = 1 << 20

_TARGET_CODES = {"crypt": "dm-crypt", "raid": "raid", "mirror": "raid", "striped": "raid"}


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a device that lies in one piece on a volume. In bytes.

    ``start``: where it begins on the device. ``offset``: where it begins on the volume.
    """

    start: int
    length: int
    volume_id: str
    volume_size: int
    offset: int


@dataclasses.dataclass(frozen=True)
class DmTarget:
    """One line of a device-mapper table. ``start`` and ``length`` are in sectors."""

    start: int
    length: int
    kind: str
    arguments: str


class DeviceStack:
    """Looks up devices in sysfs and remembers what it found.

    ``volume_names``: kernel name of a disk -> volume id, see ``MapOptions``. ``sysfs`` and
    ``read_table`` can be replaced where there are no such devices.
    """

    def __init__(
        self,
        volume_names: Mapping[str, str],
        sysfs: Path = Path("/sys"),
        read_table: Callable[[int], Sequence[DmTarget]] | None = None,
    ) -> None:
        self._names = volume_names
        self._sysfs = sysfs
        self._read_table = read_table or read_dm_table
        self._known: dict[int, tuple[Segment, ...]] = {}

    def segments(self, device: int) -> tuple[Segment, ...]:
        """What a device (as in st_dev, st_rdev) consists of, sorted by start.

        :raises StorageError: if it is not understood; its ``code`` is the reason as a word.
        """
        if device not in self._known:
            self._known[device] = tuple(self._resolve(device, 0))
        return self._known[device]

    def _resolve(self, device: int, depth: int) -> list[Segment]:
        number = f"{os.major(device)}:{os.minor(device)}"
        link = self._sysfs / "dev" / "block" / number
        if not link.exists():
            raise _error(f"device {number}", "it is not on a block device", "unsupported-device")
        directory = link.resolve()
        if depth > _MAX_DEPTH:
            raise _error(directory.name, "too many devices on each other", "unsupported-device")
        if (directory / "partition").exists():
            return self._partition(directory, depth)
        if (directory / "dm").is_dir():
            return self._linear(device, directory, depth)
        return [self._disk(directory)]

    def _partition(self, directory: Path, depth: int) -> list[Segment]:
        parent = _device_number(directory.parent)
        start = _number(directory / "start") * _SECTOR
        length = _number(directory / "size") * _SECTOR
        return _cut(self._resolve(parent, depth + 1), start, length, 0)

    def _linear(self, device: int, directory: Path, depth: int) -> list[Segment]:
        segments = []
        for target in self._read_table(device):
            match = re.fullmatch(r"(\d+):(\d+) (\d+)", target.arguments.strip())
            if target.kind != "linear" or match is None:
                raise _error(
                    directory.name,
                    f"device-mapper target {target.kind} is not supported",
                    _TARGET_CODES.get(target.kind, "unsupported-device"),
                )
            below = self._resolve(os.makedev(int(match[1]), int(match[2])), depth + 1)
            segments += _cut(
                below,
                int(match[3]) * _SECTOR,
                target.length * _SECTOR,
                target.start * _SECTOR,
            )
        return sorted(segments, key=lambda segment: segment.start)

    def _disk(self, directory: Path) -> Segment:
        name = directory.name
        size = _number(directory / "size") * _SECTOR
        given = self._names.get(name)
        if given is not None:
            return Segment(0, size, given, size, 0)
        if (directory / "md").is_dir():
            raise _error(name, "it is a RAID", "raid")
        if not (directory / "device").exists():
            raise _error(name, "it is not a disk", "unsupported-device")
        serial = _serial(directory)
        if not _SERIAL.fullmatch(serial):
            raise _error(name, "the disk has no serial by which to name its volume", "no-serial")
        return Segment(0, size, serial, size, 0)


@dataclasses.dataclass(frozen=True)
class Placed:
    """Stretches of a file on one volume, arrays u64 (n,) in bytes, sorted by ``logical``."""

    volume_id: str
    volume_size: int
    logical: filesystem.U64
    offset: filesystem.U64
    length: filesystem.U64


def place(extents: filesystem.Extents, segments: Sequence[Segment]) -> list[Placed]:
    """Where the extents of a file, given on a device, lie on the volumes.

    What is left of each after rounding to blocks of 4 KiB inwards; a stretch whose place in the
    file and on the volume are not congruent modulo 4 KiB has no common blocks and is dropped.
    """
    placed = []
    behind = extents.physical + extents.length
    for segment in segments:
        start = np.maximum(extents.physical, np.uint64(segment.start))
        stop = np.minimum(behind, np.uint64(segment.start + segment.length))
        hit = start < stop
        logical = extents.logical[hit] + (start[hit] - extents.physical[hit])
        offset = start[hit] - np.uint64(segment.start) + np.uint64(segment.offset)
        length = stop[hit] - start[hit]
        block = np.uint64(filesystem.BLOCK)
        skip = (block - logical % block) % block
        usable = ((logical % block) == (offset % block)) & (length >= skip + block)
        logical, offset, length = logical + skip, offset + skip, length - np.minimum(skip, length)
        length -= length % block
        placed.append(
            Placed(
                segment.volume_id,
                segment.volume_size,
                logical[usable],
                offset[usable],
                length[usable],
            )
        )
    return placed


def read_dm_table(device: int) -> list[DmTarget]:
    """The table of a device-mapper device, asked of the kernel (needs CAP_SYS_ADMIN).

    :raises StorageError: if the kernel does not tell.
    """
    name = f"dm-{os.minor(device)}"
    buffer = bytearray(_DM_BUFFER_BYTES)
    encoded = (os.minor(device) & 0xFF) | (os.major(device) << 8)
    encoded |= (os.minor(device) & ~0xFF) << 12
    _DM_HEADER.pack_into(
        buffer,
        0,
        4,
        0,
        0,
        len(buffer),
        _DM_HEADER_BYTES,
        0,
        0,
        _DM_STATUS_TABLE_FLAG,
        0,
        0,
        encoded,
    )
    try:
        with open("/dev/mapper/control", "rb") as control:
            fcntl.ioctl(control, _DM_TABLE_STATUS, buffer, True)
    except OSError as error:
        raise _error(
            name, f"its table cannot be read: {error.strerror}", "unsupported-device"
        ) from error
    return parse_dm_status(bytes(buffer), name)


def parse_dm_status(reply: bytes, name: str) -> list[DmTarget]:
    """The targets in the kernel's reply (struct dm_ioctl and what follows it).

    :raises StorageError: if the reply makes no sense.
    """
    header = _DM_HEADER.unpack_from(reply)
    begin, count, flags = header[4], header[5], header[7]
    if flags & _DM_BUFFER_FULL_FLAG:
        raise _error(name, "its table is too long", "unsupported-device")
    targets = []
    position = begin
    try:
        for _ in range(count):
            start, length, _status, following, kind = _DM_TARGET.unpack_from(reply, position)
            text = position + _DM_TARGET.size
            arguments = reply[text : reply.index(b"\0", text)].decode("ascii", "replace")
            targets.append(
                DmTarget(start, length, kind.split(b"\0")[0].decode("ascii", "replace"), arguments)
            )
            position = begin + following
    except (struct.error, ValueError) as error:
        raise _error(name, "its table makes no sense", "unsupported-device") from error
    return targets


def _cut(below: Sequence[Segment], start: int, length: int, at: int) -> list[Segment]:
    """The stretch [start, start + length) of a device, as it appears at ``at`` of another."""
    cut = []
    for segment in below:
        first = max(segment.start, start)
        last = min(segment.start + segment.length, start + length)
        if first < last:
            cut.append(
                dataclasses.replace(
                    segment,
                    start=first - start + at,
                    length=last - first,
                    offset=segment.offset + first - segment.start,
                )
            )
    return cut


def _serial(directory: Path) -> str:
    """The serial of a disk in sysfs (its directory below /sys/block), "" if it has none."""
    for name in ("serial", "device/serial"):  # virtio-blk; NVMe
        text = _text(directory / name)
        if text:
            return text
    # SCSI: page 0x80 of the vital product data, 4 bytes of header with the length, then text
    try:
        page = (directory / "device" / "vpd_pg80").read_bytes()
    except OSError:
        return ""
    length = int.from_bytes(page[2:4], "big")
    return page[4 : 4 + length].decode("ascii", "replace").strip(" \0")


def _device_number(directory: Path) -> int:
    match = re.fullmatch(r"(\d+):(\d+)", _text(directory / "dev"))
    if match is None:
        raise _error(directory.name, "sysfs does not tell its number", "unsupported-device")
    return os.makedev(int(match[1]), int(match[2]))


def _number(path: Path) -> int:
    text = _text(path)
    if not text.isdigit():
        raise _error(path.parent.name, f"sysfs does not tell its {path.name}", "unsupported-device")
    return int(text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip(" \n\0")
    except OSError:
        return ""


def _error(name: str, reason: str, code: str) -> exception.StorageError:
    return exception.StorageError(path=name, reason=reason, code=code)
