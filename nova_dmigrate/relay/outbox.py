# SPDX-License-Identifier: Apache-2.0
"""What the source has to send, in the order in which it goes: copies that were asked for, then the
stream, then, when the network would idle while the volume is busy, copies of what the destination
would read last.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.relay.window import Window
from nova_dmigrate.relay.wire.frames import COPY, FrameType

#: Pages in one frame of copies: 1 MiB, small enough to be spread over the connections.
COPIES_PER_FRAME = 256
#: Seconds after which it is asked again whether copies are to be sent unasked.
_POLL = 0.02
#: Bytes a second from which on the thread that brings a frame sends it as well.
_FAST = 300e6


@dataclass
class Parcel:
    """A frame on its way out. ``done`` is called once its bytes were handed to the kernel."""

    type: FrameType
    payload: Sequence[memoryview]
    size: int
    flags: int = 0
    block: int = 0
    seq: int = 0
    done: Callable[[], None] | None = None
    unasked: bool = False
    direct: bool = False

    @property
    def occupies(self) -> bool:
        """Whether it is something to do for the network that cannot be left undone. References are
        so small that it idles beside them."""
        return not self.unasked and self.type is not FrameType.REFERENCES


def copies_parcel(
    entries: NDArray[np.int64], slots: NDArray[np.uint32], pages: NDArray[np.uint8]
) -> Parcel:
    """The frame that carries page copies: uint8 (n, 4096) for entries (n,), slots (n,)."""
    records = np.empty(len(slots), COPY)
    records["entry"] = entries
    records["slot"] = slots
    records["page"] = pages
    return Parcel(FrameType.COPIES, [memoryview(records.view(np.uint8))], records.nbytes)


class Outbox:
    """The source's send queue, shared by one thread that fills it and one per connection that
    empties it.

    The queue is short in time, not in bytes: QEMU derives the guest's downtime from the rate at
    which its socket takes data, so nothing between QEMU and the network may swallow more than a
    moment's worth.
    """

    def __init__(
        self,
        window: Window,
        *,
        delay: float,
        floor: int,
        fill: Callable[[float], NDArray[np.uint32] | None],
    ) -> None:
        """:param delay: seconds of the network's rate that may wait here.
        :param floor: bytes that may always wait here.
        :param fill: is asked when nothing else is to be sent, and told for how many seconds that
            has been so; returns the destination's reading order if waiting references should be
            sent as copies, else None.
        """
        self._window = window
        #: Sends a numbered frame at once and accounts for it; None to leave all to other threads.
        #: The connection that it uses has a sender thread as well, see :meth:`take`.
        self.direct: Callable[[Parcel], None] | None = None
        #: Seconds of the network's rate that may wait here; may be changed at any time.
        self.delay = delay
        self._floor = floor
        self._fill = fill
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._room = threading.Condition(lock)
        self._queue: deque[Parcel] = deque()
        self._queued = 0
        self._seq = 0
        self._idle_since: float | None = None
        self._ended = False
        self._aborted = False
        self._in_hand = 0
        self._needed_in_hand = 0
        # Frames of one connection must go in the order of their numbers: the destination would wait
        # for ever for one that stands behind a later one. Two threads use the direct connection, so
        # only one of them may have a frame in hand.
        self._direct_in_hand = False
        self._held_up = False
        self._busy_since = 0.0
        self._busy_seconds = 0.0
        self._busy_bytes = 0
        self._wire_bytes = 0
        self._rate_mark = (0, 0, 0.0)
        #: Bytes a second, as they were put in, that went while there was something to send.
        self.rate = 0.0
        #: Bytes a second that the network has taken for these; fewer where they were compressed.
        self.wire_rate = 0.0
        #: Seconds that the stream waited for room here.
        self.blocked_seconds = 0.0
        self.copies_asked = 0
        self.copies_unasked = 0

    def put(self, parcel: Parcel) -> None:
        """Send or queue a frame of the stream; waits for room. After an abort frames are thrown
        away.
        """
        with self._room:
            at_once = self._may_go_at_once()
            if at_once:
                self._number(parcel, direct=True)
        if at_once and self.direct is not None:
            self.direct(parcel)
            return
        with self._room:
            if self._queued >= self._limit() and not self._aborted:
                begin = time.monotonic()
                self._room.wait_for(lambda: self._queued < self._limit() or self._aborted)
                self.blocked_seconds += time.monotonic() - begin
            if not self._aborted:
                self._queue.append(parcel)
                self._queued += parcel.size
                self._work.notify()
                return
        if parcel.done is not None:
            parcel.done()

    def end(self, parcel: Parcel) -> None:
        """Queue the last frame; nothing is sent after it."""
        self.put(parcel)
        with self._work:
            self._ended = True
            self._work.notify_all()

    def abort(self, parcel: Parcel) -> None:
        """Throw away what waits and send this frame as the last one."""
        with self._work:
            dropped, self._queue = self._queue, deque([parcel])
            self._queued = parcel.size
            self._ended = self._aborted = True
            self._work.notify_all()
            self._room.notify_all()
        for lost in dropped:
            if lost.done is not None:
                lost.done()

    def wake(self) -> None:
        """Something that only the window or the reader's progress shows may have to be sent now."""
        with self._work:
            self._work.notify()

    def take(self, timeout: float, *, direct: bool = False) -> Parcel | None:
        """The next frame, numbered, or None when ``timeout`` seconds brought none.

        :param direct: whether it is to be sent on the connection that :attr:`direct` uses.
        :raises EOFError: the last frame has been taken.
        """
        with self._work:
            deadline = time.monotonic() + timeout
            while True:
                held_up = direct and self._direct_in_hand
                self._held_up |= held_up
                parcel = None if held_up else self._choose()
                if parcel is not None:
                    break
                if self._ended and not (held_up and self._queue):
                    self._work.notify_all()
                    raise EOFError
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                # Whether to send copies unasked depends on time alone.
                self._work.wait(min(left, _POLL) if self._window.unresolved else left)
            self._number(parcel, direct)
            return parcel

    def _may_go_at_once(self) -> bool:
        """On a fast network handing a frame to another thread costs more than sending it."""
        return (
            self.direct is not None
            and self.wire_rate > _FAST
            and not (self._direct_in_hand or self._queue or self._ended or self._aborted)
        )

    def _number(self, parcel: Parcel, direct: bool) -> None:
        """The parcel is the next one to be sent."""
        parcel.direct = direct
        self._direct_in_hand |= direct
        parcel.seq = self._seq
        self._seq += 1
        if not self._in_hand:
            self._busy_since = time.monotonic()
        self._in_hand += 1
        self._needed_in_hand += parcel.occupies

    def sent(self, parcel: Parcel, wire_bytes: int) -> None:
        """Account for a frame that the kernel has taken, as so many bytes of payload."""
        with self._work:
            now = time.monotonic()
            self._busy_bytes += parcel.size
            self._wire_bytes += wire_bytes
            self._busy_seconds += now - self._busy_since
            self._busy_since = now
            self._in_hand -= 1
            self._needed_in_hand -= parcel.occupies
            if parcel.direct:
                self._direct_in_hand = False
                if self._held_up:
                    self._held_up = False
                    self._work.notify_all()
            if parcel.occupies:
                self._idle_since = None
            bytes_then, wire_then, seconds_then = self._rate_mark
            seconds = self._busy_seconds - seconds_then
            if seconds >= 0.1:
                self.rate = (self._busy_bytes - bytes_then) / seconds
                self.wire_rate = (self._wire_bytes - wire_then) / seconds
                self._rate_mark = (self._busy_bytes, self._wire_bytes, self._busy_seconds)
        if parcel.done is not None:
            parcel.done()

    @property
    def busy_seconds(self) -> float:
        """Seconds in which at least one connection had something to send."""
        return self._busy_seconds

    def _limit(self) -> float:
        return max(self._floor, self.rate * self.delay)

    def _choose(self) -> Parcel | None:
        if not self._aborted:
            asked = self._window.take_missed(COPIES_PER_FRAME)
            if asked is not None:
                self.copies_asked += len(asked[1])
                return copies_parcel(*asked)
        if self._queue:
            parcel = self._queue.popleft()
            self._queued -= parcel.size
            self._room.notify()
            return parcel
        if self._ended:
            return None
        now = time.monotonic()
        if self._idle_since is None or self._needed_in_hand:
            self._idle_since = now
        rank = self._fill(now - self._idle_since)
        unasked = None if rank is None else self._window.take_last(COPIES_PER_FRAME, rank)
        if unasked is not None:
            self.copies_unasked += len(unasked[1])
            parcel = copies_parcel(*unasked)
            parcel.unasked = True
            return parcel
        return None
