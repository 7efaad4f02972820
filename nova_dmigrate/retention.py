# SPDX-License-Identifier: Apache-2.0
"""What is kept, and for how long, of files that migrations leave: summaries, the history."""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_DAY = 24 * 3600.0


@dataclass(frozen=True)
class Retention:
    """How much is kept; 0 for all.

    :ivar count: files, the newest. :ivar days: since they were written.
    """

    count: int = 0
    days: float = 0.0

    def prune(self, files: Iterable[Path], newest: Path | None = None) -> None:
        """Remove of ``files`` what is not kept. What cannot be removed stays.

        :param newest: one that is kept in any case: it was just written, whatever the clock says.
        """
        times = {}
        for path in files:
            # Another process may prune, too
            with contextlib.suppress(OSError):
                times[path] = path.stat().st_mtime
        oldest = time.time() - self.days * _DAY
        order = sorted(times, key=lambda path: (path == newest, times[path], path), reverse=True)
        for place, path in enumerate(order):
            old = self.days and times[path] < oldest
            if path != newest and (old or self.count and place >= self.count):
                with contextlib.suppress(OSError):
                    path.unlink()
