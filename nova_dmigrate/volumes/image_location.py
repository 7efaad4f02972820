# SPDX-License-Identifier: Apache-2.0
"""Where an image is, and in what format: the location of a volume of drivers ``nbd``, ``luks`` and
``iscsi``.

As text: ``FORMAT:PLACE``, as in ``qcow2:/var/lib/libvirt/images/db.qcow2``, or with the name of a
key ``FORMAT,key=NAME:PLACE``. The format is never guessed: what a guest writes to a raw volume may
look like any other.
"""

import dataclasses
import re

from nova_dmigrate.volumes.iscsi_unit import SCHEME, IscsiUnit

#: ``luks``: raw, and encrypted by QEMU.
FORMATS = ("raw", "qcow2", "luks")
_KEY = re.compile(r"[0-9A-Za-z-]{1,64}")


@dataclasses.dataclass(frozen=True)
class ImageLocation:
    """:ivar format: one of ``FORMATS``. :ivar place: an absolute path, of a file or a block device,
    or an `IscsiUnit` as text.
    :ivar key: name of the key that the host has for it, libvirt's UUID of a secret; empty for none.
    """

    format: str
    place: str
    key: str = ""

    @classmethod
    def parse(cls, text: str) -> "ImageLocation":
        """:raises ValueError: it is none."""
        head, _, place = text.partition(":")
        kind, comma, key = head.partition(",key=")
        if kind not in FORMATS:
            raise ValueError(
                f"{text!r} does not begin with a format ({', '.join(FORMATS)}) and ':'"
            )
        if comma and not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no name of a key")
        if place.startswith(SCHEME):
            if kind == "qcow2":
                raise ValueError("images of format qcow2 are read from files and devices only")
            place = str(IscsiUnit.parse(place))
        elif not place.startswith("/") or "\0" in place:
            raise ValueError(f"{place!r} is no absolute path")
        return cls(kind, place, key)

    @property
    def remote(self) -> bool:
        """Whether QEMU itself connects to it."""
        return self.place.startswith(SCHEME)

    def __str__(self) -> str:
        key = f",key={self.key}" if self.key else ""
        return f"{self.format}{key}:{self.place}"
