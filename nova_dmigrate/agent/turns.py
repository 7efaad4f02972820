# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is at a volume from which a pool is filled, and clients' queries read as well."""

from __future__ import annotations

#: Seconds in which both have their turn: a piece cannot begin within a second of the last one.
_PERIOD = 6.0
#: Of that, what is the filling's at least, and at most.
_LEAST, _MOST = 0.25, 0.9
#: Of a piece.
FEWEST_PAGES = 64
_FIRST_PAGES = 256


class Turns:
    """The filling takes what clients leave of the volume.

    What that is, is seen while it rests: what they read then, of what the volume can. Where it is
    half or more, a volume is not what clients wait for, and the pool that fills soonest serves them
    best; where it is nothing, each page that is read for the list is one that they wait for.

    :param most: pages of a piece at most.
    :ivar size: pages of the next piece.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._share = _LEAST
        self.size = min(most, _FIRST_PAGES)

    def rest(self, took: float) -> float:
        """Seconds for the clients after a piece that took so many."""
        return took * (1 - self._share) / self._share

    def note(self, pages: int, took: float, reads: float, can: float) -> None:
        """A piece, and the rest behind it.

        :param pages: of the piece; :param took: seconds.
        :param reads: pages that were read in a second of the rest.
        :param can: pages that were read in a second of the piece.
        """
        left = 2 * (1 - reads / can) if can > 0 else _LEAST
        # One look at clients, who come and go, is not worth more than the last ones
        self._share = (self._share + min(_MOST, max(_LEAST, left))) / 2
        fitting = int(pages * min(2.0, _PERIOD * self._share / max(took, 1e-3)))
        self.size = min(self._most, max(FEWEST_PAGES, fitting))
