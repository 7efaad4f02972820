# SPDX-License-Identifier: Apache-2.0
"""How far QEMU says that a migration is, and has been."""

import dataclasses
from collections.abc import Mapping
from typing import Any

#: Rows kept; when there are more, every second one goes and further ones are half as many.
_LIMIT = 3600


@dataclasses.dataclass(frozen=True)
class Job:
    """How far a migration is, as QEMU tells it; bytes, and milliseconds.

    :ivar downtime_ms: for so long the guest stood still; None while it is QEMU's forecast.
    :ivar statistics: all of it, by libvirt's own names.
    """

    remaining: int = 0
    transferred: int = 0
    total: int = 0
    passes: int = 0
    downtime_ms: float | None = None
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class JobSeries:
    """The way of an ordinary migration, of which no relay keeps a series.

    :ivar rows: the oldest first: ``t``, seconds as they are given, and ``wire_bytes`` until then.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._noted = 0
        self._every = 1

    def note(self, seconds: float, job: Job) -> None:
        """How far it is at this moment."""
        if self.rows and job.transferred < self.rows[-1]["wire_bytes"]:
            self.rows.clear()  # it was begun anew
        self._noted += 1
        if self._noted % self._every:
            return
        self.rows.append({"t": round(seconds, 3), "wire_bytes": job.transferred})
        if len(self.rows) > _LIMIT:
            del self.rows[::2]
            self._every *= 2
