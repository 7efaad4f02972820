# SPDX-License-Identifier: Apache-2.0
"""Cutting guest memory into bands with so few pages in each that one fits into little memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PAGES = 1 << 21  # of one band: 16 MiB of map
# All frames are gone through for each band, so there are not many of them: of a pool of terabytes a
# band then takes 0.25 bytes a page
_MOST_BANDS = 32
_BIN_SHIFT = 16  # 256 MiB of guest memory
_BINS = 1 << (32 - _BIN_SHIFT)


@dataclasses.dataclass(frozen=True)
class Band:
    """Guest pages from ``first`` to below ``behind``, of which no more than ``pages`` are used."""

    first: int
    behind: int
    pages: int

    def holds(self, guest: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Whether each guest page lies in it."""
        # Modulo 2**32 what is below it is far above it
        inside: Any = guest - np.uint32(self.first) < self.behind - self.first
        return inside  # type: ignore[no-any-return]


def choose(guests: Iterable[NDArray[np.uint32]]) -> Iterator[Band]:
    """Bands in ascending order that hold all of ``guests`` (arrays of any shape)."""
    counts = np.zeros(_BINS, np.int64)
    for guest in guests:
        counts += np.bincount(guest.ravel() >> np.uint32(_BIN_SHIFT), minlength=_BINS)
    # However often a page is found (the kernel can merge equal ones), it is used once
    pages = np.minimum(counts, 1 << _BIN_SHIFT)
    limit = max(MAX_PAGES, int(pages.sum()) // _MOST_BANDS)
    first = behind = total = 0
    for number in np.flatnonzero(pages).tolist():
        more = int(pages[number])
        if total + more > limit:
            yield Band(first << _BIN_SHIFT, behind << _BIN_SHIFT, total)
            total = 0
        if not total:
            first = number
        behind = number + 1
        total += more
    if total:
        yield Band(first << _BIN_SHIFT, behind << _BIN_SHIFT, total)
