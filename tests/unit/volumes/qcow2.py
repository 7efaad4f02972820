# SPDX-License-Identifier: Apache-2.0
"""Headers of qcow2 images, as docs/interop/qcow2.txt of QEMU has them."""

import struct


def header(
    backing: str = "",
    backing_format: str = "",
    version: int = 3,
    cluster_bits: int = 16,
    features: int = 0,
    magic: bytes = b"QFI\xfb",
) -> bytes:
    """:param backing_format: empty for none that is named. :param features: incompatible ones."""
    name, kind = backing.encode(), backing_format.encode()
    extensions = struct.pack(">II", 0x6803F857, 3) + b"abc".ljust(8, b"\0")
    if kind:
        extensions += struct.pack(">II", 0xE2792ACA, len(kind)) + kind.ljust(8, b"\0")
    extensions += struct.pack(">II", 0, 0)
    length = 104 if version == 3 else 72
    place = length + len(extensions) if name else 0
    data = magic + struct.pack(">IQII", version, place, len(name), cluster_bits) + bytes(48)
    if version == 3:
        data += struct.pack(">QQQII", features, 0, 0, 4, length)
    return data + extensions + name
