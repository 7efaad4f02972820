# SPDX-License-Identifier: Apache-2.0
"""How much of what there is has happened in each stretch of the simulated time."""

from __future__ import annotations

import collections
import dataclasses


@dataclasses.dataclass
class Series:
    """What happens in each stretch of time: ``length`` seconds, or less at the end."""

    length: float
    values: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )

    def add(self, name: str, at: float, amount: float) -> None:
        slots, index = self.values[name], int(at / self.length)
        slots.extend([0.0] * (index + 1 - len(slots)))
        slots[index] += amount

    def peak(self, name: str) -> float:
        """The most a second."""
        return max(self.values.get(name) or [0.0]) / self.length

    def total(self, name: str) -> float:
        return sum(self.values.get(name) or [0.0])

    def spread(self, name: str, at: float, amount: float, seconds: float) -> None:
        """Note what happens from that moment on for so many seconds."""
        end = at + seconds
        if seconds <= 0 or int(at / self.length) == int(end / self.length):
            self.add(name, at, amount)
            return
        while at < end:
            behind = min(end, (int(at / self.length) + 1) * self.length)
            self.add(name, at, amount * (behind - at) / seconds)
            at = behind if behind > at else end
