# SPDX-License-Identifier: Apache-2.0
"""When a volume can be given back: not as long as somebody reads."""

import threading
from collections.abc import Callable

from nova_dmigrate import exception


class Uses:
    """The reads of one volume that are under way, by any number of threads.

    :param give_back: called once, when it is closed and nothing is read any more.
    """

    def __init__(self, volume_id: str, give_back: Callable[[], None]) -> None:
        self._volume_id = volume_id
        self._give_back = give_back
        self._state = threading.Lock()
        self._reading = 0
        self._closed = False

    @property
    def reading(self) -> int:
        """How many reads are under way."""
        return self._reading

    def begin(self) -> None:
        """A read begins; :meth:`end` has to follow.

        :raises VolumeReadError: the volume was closed.
        """
        with self._state:
            if self._closed:
                raise exception.VolumeReadError(
                    volume=self._volume_id, reason="its reader was closed"
                )
            self._reading += 1

    def end(self) -> None:
        """A read has ended."""
        with self._state:
            self._reading -= 1
            last = self._closed and not self._reading
        if last:
            self._give_back()

    def close(self) -> None:
        """Let no further read begin."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            unused = not self._reading
        if unused:
            self._give_back()
