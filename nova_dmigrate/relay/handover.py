# SPDX-License-Identifier: Apache-2.0
"""The buffer map on its way from the source relay to the destination's, in the midst of the stream.

Both relays number the entries of the map, so both take it or neither does. It may come at any time
of the bulk: what the source has sent by then is settled, whatever the map says of it.
"""

import enum
import threading

from oslo_log import log

from nova_dmigrate.buffermap import BufferMap
from nova_dmigrate.memory_layout import MemoryLayout
from nova_dmigrate.relay import protocol
from nova_dmigrate.relay.outbox import Outbox
from nova_dmigrate.relay.pagemap import PageMap
from nova_dmigrate.stream.elements import RamBlock

LOG = log.getLogger(__name__)


class MapState(enum.Enum):
    """What has become of the map."""

    NONE = "none"
    OFFERED = "offered"
    TAKEN = "taken"
    REFUSED = "refused"


class MapHandover:
    """One map, or none: offered by any thread, handed over by the one that relays the stream.

    :ivar state: what has become of it.
    """

    def __init__(self, instance: str, outbox: Outbox, patience: float) -> None:
        """:param patience: seconds that the destination may take to answer."""
        self._instance = instance
        self._outbox = outbox
        self._patience = patience
        self._lock = threading.Lock()
        self._map: tuple[BufferMap, MemoryLayout] | None = None
        self._answered = threading.Event()
        self._refused: str | None = None
        self.state = MapState.NONE

    @property
    def waiting(self) -> bool:
        """Whether there is a map that was not handed over yet."""
        return self._map is not None

    def offer(self, buffer_map: BufferMap, layout: MemoryLayout) -> bool:
        """Have a map used from the next moment on at which that is possible; False if there was one
        before, which stays the only one.
        """
        with self._lock:
            if self.state is not MapState.NONE:
                return False
            self._map = buffer_map, layout
            self.state = MapState.OFFERED
            return True

    def decline(self, reason: str) -> None:
        """It is of no use any more."""
        if self.waiting:
            LOG.warning("Instance %s: the buffer map is not used: %s", self._instance, reason)
            self._map = None
            self.state = MapState.REFUSED

    def hand_over(self, blocks: tuple[RamBlock, ...], first: int) -> PageMap | None:
        """Send the map and wait for the answer; the page map if the destination has taken it.

        :param first: the first position that may be referenced.
        """
        assert self._map is not None
        buffer_map, layout = self._map
        page_map = PageMap.place_map(blocks, buffer_map, layout)
        for parcel in protocol.map_parcels(buffer_map, layout, first):
            self._outbox.put(parcel)
        self._map = None
        if not self._answered.wait(self._patience):
            self._refused = "it did not answer"
        if self._refused:
            LOG.warning(
                "Instance %s migrates without a buffer map, which the destination refused: %s",
                self._instance,
                self._refused,
            )
            self.state = MapState.REFUSED
            return None
        self.state = MapState.TAKEN
        return page_map

    def answer(self, refused: str) -> None:
        """What the destination says; empty if it has taken the map."""
        self._refused = refused
        self._answered.set()

    def release(self) -> None:
        """After a failure: wait no more."""
        self.answer("the migration has failed")
