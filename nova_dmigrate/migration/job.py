# SPDX-License-Identifier: Apache-2.0
"""How far QEMU says that a migration is."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Job:
    """How far a migration is, as QEMU tells it; bytes, and milliseconds.

    :ivar statistics: all of it, by libvirt's own names.
    """

    remaining: int = 0
    transferred: int = 0
    total: int = 0
    passes: int = 0
    downtime_ms: float | None = None
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
