# SPDX-License-Identifier: Apache-2.0
"""A unit of an iSCSI target, to which QEMU itself connects: a place of an image.

As text it is QEMU's URL: ``iscsi://HOST[:PORT]/TARGET/UNIT``, with an IPv6 address in brackets.
There is no account in it: locations are logged.
"""

import dataclasses
import re
from typing import Any

SCHEME = "iscsi://"
_URL = re.compile(r"iscsi://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(\d{1,5}))?/([\w.:-]{1,223})/(\d{1,5})")
_PORT = 3260


@dataclasses.dataclass(frozen=True)
class IscsiUnit:
    """:ivar host: name or address, an IPv6 one in brackets. :ivar target: its qualified name."""

    host: str
    target: str
    unit: int
    port: int = _PORT

    @classmethod
    def parse(cls, text: str) -> "IscsiUnit":
        """:raises ValueError: it is none."""
        found = _URL.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not {SCHEME}HOST[:PORT]/TARGET/UNIT")
        host, port, target, unit = found.groups()
        return cls(host, target, int(unit), int(port or _PORT))

    def __str__(self) -> str:
        return f"{SCHEME}{self.host}:{self.port}/{self.target}/{self.unit}"

    def blockdev(self) -> dict[str, Any]:
        """Options of QEMU's ``--blockdev``. Nothing is reserved at the target."""
        return {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": f"{self.host}:{self.port}",
            "target": self.target,
            "lun": self.unit,
            "read-only": True,
            "cache": {"direct": True},
        }
