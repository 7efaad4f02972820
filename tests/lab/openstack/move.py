# SPDX-License-Identifier: Apache-2.0
"""How a live migration went, as those see it who judge it. What there is to know of it, no way to a
cloud.
"""

import dataclasses
from typing import Any

#: Nova's words for an end, and DMigrate's.
COMPLETED, CANCELLED = "completed", "cancelled"

#: As DMigrate's notifications have it.
Summary = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Move:
    """How a live migration went.

    :ivar status: Nova's word.
    :ivar source, host: where the server was before, and is afterwards.
    :ivar summary: DMigrate's; empty if it has had nothing to do with it.
    :ivar event: what DMigrate tells of it as an event of Nova's; empty as well.
    """

    status: str
    source: str
    host: str
    summary: Summary
    event: str = ""

    def __str__(self) -> str:
        told = self.summary
        if not told:
            return f"{self.status}, DMigrate says nothing"
        why = f", {told['fallback_reason']}" if told["fallback_reason"] else ""
        pages = f", {told['pages_referenced']} references" if told["pages_referenced"] else ""
        misses = f", {told['misses']} misses" if told.get("misses") else ""
        mapped = f", the map in {told['mapping_s']:.1f} s" if told.get("mapping_s") else ""
        took = f"{told['mode']} {told['state']} in {told['total_s']:.1f} s"
        return f"{self.status}, {took}{why}{mapped}{pages}{misses}"
