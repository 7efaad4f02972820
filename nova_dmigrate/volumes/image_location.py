# SPDX-License-Identifier: Apache-2.0
"""Where an image is, and in what format: the location of a volume of driver ``nbd``.

As text: ``FORMAT:PATH``, as in ``qcow2:/var/lib/libvirt/images/db.qcow2``. The format is never
guessed: what a guest writes to a raw volume may look like any other.
"""

import dataclasses

#: ``luks``: raw, and encrypted by QEMU.
FORMATS = ("raw", "qcow2", "luks")


@dataclasses.dataclass(frozen=True)
class ImageLocation:
    """:ivar format: one of ``FORMATS``. :ivar path: absolute, of a file or a block device."""

    format: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "ImageLocation":
        """:raises ValueError: it is none."""
        kind, _, path = text.partition(":")
        if kind not in FORMATS:
            raise ValueError(
                f"{text!r} does not begin with a format ({', '.join(FORMATS)}) and ':'"
            )
        if not path.startswith("/") or "\0" in path:
            raise ValueError(f"{path!r} is no absolute path")
        return cls(kind, path)

    def __str__(self) -> str:
        return f"{self.format}:{self.path}"
