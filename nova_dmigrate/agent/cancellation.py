# SPDX-License-Identifier: Apache-2.0
"""Giving up a piece of work that nobody wants any more, from another thread."""

from __future__ import annotations

import threading

from nova_dmigrate import exception


class Cancellation:
    """Set once, by any thread; looked at by the work itself, at least at each of its chunks.

    :param what: the work, as a noun.
    """

    def __init__(self, what: str = "the map") -> None:
        self._what = what
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Go on, or not.

        :raises AgentError: if it is cancelled.
        """
        if self._event.is_set():
            raise exception.AgentError(
                reason=f"{self._what} is not wanted any more", code="cancelled"
            )

    def wait(self, seconds: float) -> None:
        """Go on after so many seconds, or not.

        :raises AgentError: as soon as it is cancelled.
        """
        self._event.wait(seconds)
        self.check()
