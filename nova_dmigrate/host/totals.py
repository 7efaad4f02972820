# SPDX-License-Identifier: Apache-2.0
"""What the relays of a host have done since the service was started, summed up."""

import collections
from collections.abc import Mapping
from typing import Any

#: What a relay's report calls the bytes of each path.
PATHS = {"network": "wire_bytes", "saved": "saved_bytes", "volume": "volume_bytes"}


class Totals:
    """Sums of what relays tell of themselves, and of how sessions have ended.

    :ivar bytes: by role and path, as in `PATHS`; ``saved`` is what compression has spared the
        network.
    :ivar references: guest pages that sources have sent as references.
    :ivar misses: references that did not resolve, by reason.
    :ivar ended: sessions by role and final state.
    """

    def __init__(self) -> None:
        self.bytes: collections.Counter[tuple[str, str]] = collections.Counter()
        self.references = 0
        self.misses: collections.Counter[str] = collections.Counter()
        self.ended: collections.Counter[tuple[str, str]] = collections.Counter()

    def add(self, role: str, report: Mapping[str, Any]) -> None:
        """A relay has done that, all in all: progress or summary."""
        for path, name in PATHS.items():
            self.bytes[role, path] += report.get(name, 0)
        self.references += report.get("referenced_pages", 0)
        self.misses.update(report.get("misses", {}))

    def copy(self) -> "Totals":
        """The same, to add to."""
        made = Totals()
        made.bytes.update(self.bytes)
        made.references = self.references
        made.misses.update(self.misses)
        made.ended.update(self.ended)
        return made
