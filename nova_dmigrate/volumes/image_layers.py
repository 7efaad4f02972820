# SPDX-License-Identifier: Apache-2.0
"""The files of an image, and how QEMU has to open them so that the guest is not disturbed.

A qcow2 image names its backing file in its header. The chain is followed here, and not by QEMU: so
all files of it are known beforehand, each is opened in the same way, and nothing else is ever
opened. The header is the host's; a guest cannot write it.
"""

import dataclasses
import os
import stat
import struct
from typing import Any

from nova_dmigrate.volumes.image_location import ImageLocation
from nova_dmigrate.volumes.iscsi_unit import SCHEME, IscsiUnit

#: Name of QEMU's object that has the key.
KEY = "key"
_MAX_LAYERS = 32

# The image's header: docs/interop/qcow2.txt of QEMU
_MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQII")
_FEATURES = struct.Struct(">Q")
_FEATURES_OFFSET, _LENGTH_OFFSET = 72, 100
_EXTERNAL_DATA = 1 << 2
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_MAX_NAME = 1023
_MAX_HEADER = 64 << 10

#: Of the tables of where clusters lie, which the guest changes, QEMU keeps two parts or more.
#: They are as small as it allows, so that each is read only moments before it is used: who reads in
#: the order of the volume comes to no part a second time. (Its option to forget parts that are not
#: used, cache-clean-interval, does nothing in a daemon: that clock stands still without a guest.)
_TABLE_BYTES = 512
_TABLES_BYTES = 2 * _TABLE_BYTES

Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One file of an image, or the unit that is all of it."""

    format: str
    place: str


def layers(location: ImageLocation) -> list[Layer]:
    """The image and its backing files, the uppermost first.

    :raises ValueError: it is not what the location says, or has files that are not followed.
    :raises OSError: one of them cannot be read.
    """
    found: list[Layer] = []
    following: tuple[str, str] | None = (location.format, location.place)
    while following is not None:
        if len(found) == _MAX_LAYERS:
            raise ValueError(f"it has more than {_MAX_LAYERS} layers")
        kind, place = following
        if kind == "qcow2":
            layer, following = _qcow2(place)
        else:
            layer, following = Layer(kind, place), None
        found.append(layer)
    return found


def blockdev(location: ImageLocation, encrypted: bool) -> Options:
    """Options of QEMU's ``--blockdev`` for an image.

    Nothing is written, no lock is taken (the guest's QEMU has one), and nothing is cached.

    :param encrypted: there is an object ``KEY`` with the key to the uppermost layer.
    :raises ValueError, OSError: as `layers` does.
    """
    uppermost, *backing = layers(location)
    node: Options | None = None
    for layer in reversed(backing):
        node = _node(layer, node, encrypted=False)
    return _node(uppermost, node, encrypted)


def _node(layer: Layer, backing: Options | None, encrypted: bool) -> Options:
    node: Options = {"driver": layer.format, "read-only": True, "file": _protocol(layer.place)}
    if layer.format == "qcow2":
        node["backing"] = backing
        node["l2-cache-size"] = _TABLES_BYTES
        node["l2-cache-entry-size"] = _TABLE_BYTES
        if encrypted:
            node["encrypt"] = {"format": "luks", "key-secret": KEY}
    elif layer.format == "luks" and encrypted:
        node["key-secret"] = KEY
    return node


def _protocol(place: str) -> Options:
    if place.startswith(SCHEME):
        return IscsiUnit.parse(place).blockdev()
    return _file(place)


def _file(path: str) -> Options:
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ValueError(f"{path} is neither a block device nor a regular file")
    return {
        "driver": "file" if stat.S_ISREG(mode) else "host_device",
        "filename": path,
        "read-only": True,
        "locking": "off",
        "cache": {"direct": True},
    }


def _qcow2(path: str) -> tuple[Layer, tuple[str, str] | None]:
    """A layer, with format and path of the one below it."""
    with open(path, "rb", opener=_open_at_once) as file:
        data = file.read(_MAX_HEADER)
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise ValueError(f"{path} is no qcow2 image")
    _, version, offset, length, bits = _HEADER.unpack_from(data)
    if version not in (2, 3) or not 9 <= bits <= 21:
        raise ValueError(f"{path} is a qcow2 image of an unknown kind")
    try:
        extensions = _FEATURES_OFFSET
        if version == 3:
            (features,) = _FEATURES.unpack_from(data, _FEATURES_OFFSET)
            if features & _EXTERNAL_DATA:
                raise ValueError(f"{path} has its data in another file, which is not followed")
            (extensions,) = struct.unpack_from(">I", data, _LENGTH_OFFSET)
        below = _backing(path, data, offset, length, extensions) if offset else None
    except struct.error as error:
        raise ValueError(f"{path} has a header that is cut off") from error
    return Layer("qcow2", path), below


def _backing(path: str, data: bytes, offset: int, length: int, extensions: int) -> tuple[str, str]:
    if length > _MAX_NAME or offset + length > len(data):
        raise ValueError(f"{path} has a header that is not understood")
    name = os.fsdecode(data[offset : offset + length])
    if ":" in name.partition("/")[0] or "\0" in name or not name:
        raise ValueError(f"{path} has the backing file {name!r}, which is no path")
    # As libvirt does where none is named: nothing is guessed
    kind = _extension(data, extensions, _BACKING_FORMAT) or "raw"
    if kind not in ("raw", "qcow2"):
        raise ValueError(f"{path} has a backing file of format {kind}")
    return kind, os.path.join(os.path.dirname(path), name)


def _extension(data: bytes, offset: int, wanted: int) -> str:
    """Text of an extension of the header; empty if it has none."""
    while True:
        kind, length = _EXTENSION.unpack_from(data, offset)
        offset += _EXTENSION.size
        if kind == wanted:
            return data[offset : offset + length].decode("ascii", "replace")
        if kind == 0:
            return ""
        offset += (length + 7) // 8 * 8


def _open_at_once(path: str, flags: int) -> int:
    """For ``open``: a FIFO is not waited for."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
