# SPDX-License-Identifier: Apache-2.0
"""The buffer map on its way from the source relay to the destination's, in the midst of the stream.

Both relays number the entries of the map, so both take it or neither does. It may come at any time
of the bulk: what the source has sent by then is settled, whatever the map says of it.
"""

import enum
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from oslo_log import log

from nova_dmigrate.buffermap import BufferMap
from nova_dmigrate.memory_layout import MemoryLayout
from nova_dmigrate.relay import protocol
from nova_dmigrate.relay.outbox import Outbox
from nova_dmigrate.relay.pagemap import PageMap
from nova_dmigrate.stream.elements import RamBlock

LOG = log.getLogger(__name__)

#: Seconds for each page of a map, beside the patience with a destination that has nothing to do: it
#: has to take the map in. On a busy machine it was a quarter of that.
_PAGE_SECONDS = 1e-6


class MapState(enum.Enum):
    """What has become of the map."""

    NONE = "none"
    OFFERED = "offered"
    TAKEN = "taken"
    REFUSED = "refused"  # by the destination, or it cannot be read
    LATE = "late"


@dataclass(frozen=True)
class _Offer:
    """A map, and its chunks as they go to the destination."""

    buffer_map: BufferMap
    layout: MemoryLayout
    chunks: Sequence[bytes]


class MapHandover:
    """One map, or none: offered by any thread, handed over by the one that relays the stream.

    :ivar state: what has become of it.
    """

    def __init__(self, instance: str, outbox: Outbox, patience: float) -> None:
        """:param patience: seconds that the destination may take to answer to a small map."""
        self._instance = instance
        self._outbox = outbox
        self._patience = patience
        self._lock = threading.Lock()
        self._map: _Offer | None = None
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
        # Not later: the stream would have to wait for it
        made = _Offer(buffer_map, layout, tuple(buffer_map.to_chunks()))
        with self._lock:
            if self.state is not MapState.NONE:
                return False
            self._map = made
            self.state = MapState.OFFERED
            return True

    def fail(self) -> None:
        """There will be none: it cannot be read."""
        with self._lock:
            if self.state is MapState.NONE:
                self.state = MapState.REFUSED

    def decline(self) -> None:
        """It has come too late."""
        with self._lock:
            if self._map is not None:
                LOG.warning("Instance %s: the buffer map has come too late", self._instance)
                self._map = None
                self.state = MapState.LATE

    def hand_over(self, blocks: tuple[RamBlock, ...], first: int) -> PageMap | None:
        """Send the map and wait for the answer; the page map if the destination has taken it.

        :param first: the first position that may be referenced.
        """
        with self._lock:
            offer, self._map = self._map, None
        assert offer is not None
        page_map = PageMap.place_map(blocks, offer.buffer_map, offer.layout)
        for parcel in protocol.map_parcels(offer.chunks, offer.layout, first):
            self._outbox.put(parcel)
        patience = self._patience + offer.buffer_map.page_count * _PAGE_SECONDS
        if not self._answered.wait(patience):
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
