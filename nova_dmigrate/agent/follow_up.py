# SPDX-License-Identifier: Apache-2.0
"""Noticing, within the guest, that it runs on another host since a moment ago.

The surest sign is the one that QEMU gives to the guest itself: after a migration virtio-net is
told to announce the guest in its new place, and the kernel tells everyone who listens to link
events that the neighbours were notified (IFLA_EVENT_NOTIFY_PEERS). Where no virtio-net is, clocks
may tell: the wall clock is set forward by what the guest has missed, or a short sleep took long.

A wrong alarm costs one reconnection to the broker, nothing else.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

LOG = logging.getLogger(__name__)

_RTMGRP_LINK = 1
_RTM_NEWLINK = 16
_IFLA_EVENT = 44
_NOTIFY_PEERS = 4
_MESSAGE = struct.Struct("=IHHII")  # struct nlmsghdr
_INTERFACE_BYTES = 16  # struct ifinfomsg
_ATTRIBUTE = struct.Struct("=HH")
_NESTED_FLAGS = 0xC000
_RECEIVE_BYTES = 1 << 16

# QEMU announces five times in half a second, for each network card
_QUIET_SECONDS = 5.0
_CLOCK_JUMP = 1.0
_LONG_PAUSE = 5.0


def announced_interfaces(data: bytes) -> Iterator[int]:
    """Index of each interface that was announced anew, from messages of rtnetlink."""
    position = 0
    while position + _MESSAGE.size <= len(data):
        length, kind, _, _, _ = _MESSAGE.unpack_from(data, position)
        if length < _MESSAGE.size or position + length > len(data):
            return
        body = data[position + _MESSAGE.size : position + length]
        if kind == _RTM_NEWLINK and len(body) >= _INTERFACE_BYTES:
            if _event(body[_INTERFACE_BYTES:]) == _NOTIFY_PEERS:
                yield struct.unpack_from("=i", body, 4)[0]
        position += _aligned(length)


def _event(attributes: bytes) -> int | None:
    """The event among the attributes of a link."""
    position = 0
    while position + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, position)
        if length < _ATTRIBUTE.size or position + length > len(attributes):
            return None
        if kind & ~_NESTED_FLAGS == _IFLA_EVENT and length == _ATTRIBUTE.size + 4:
            event: int = struct.unpack_from("=I", attributes, position + _ATTRIBUTE.size)[0]
            return event
        position += _aligned(length)
    return None


def _aligned(length: int) -> int:
    return (length + 3) & ~3


class ClockWatch:
    """Tells from clocks that the guest was away. To be asked about once a second.

    :param wall, boot: seconds of the two clocks.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, boot: Callable[[], float] | None = None
    ) -> None:
        self._wall = wall
        self._boot = boot or (lambda: time.clock_gettime(time.CLOCK_BOOTTIME))
        self._last: tuple[float, float] | None = None

    def sign(self) -> str | None:
        """What has happened since the last question, None for nothing out of the ordinary."""
        last, self._last = self._last, (self._wall(), self._boot())
        if last is None:
            return None
        wall, boot = self._last[0] - last[0], self._last[1] - last[1]
        if abs(wall - boot) > _CLOCK_JUMP:
            return f"the wall clock jumped by {wall - boot:+.1f} s"
        if boot > _LONG_PAUSE:
            return f"the guest was away for {boot:.1f} s"
        return None


class FollowUp:
    """Counts moves to another host, and has something done at each.

    :param on_move: called with the sign that was seen, in the watching thread.
    """

    def __init__(
        self,
        on_move: Callable[[str], None],
        clocks: ClockWatch | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_move = on_move
        self._clocks = clocks or ClockWatch()
        self._monotonic = monotonic
        self._last: float | None = None
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="follow-up", daemon=True)
        self.moves = 0

    @property
    def since_move(self) -> float | None:
        """Seconds since the last move, None if there was none."""
        return None if self._last is None else max(0.0, self._monotonic() - self._last)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        os.write(self._stop_write, b"x")
        if self._thread.ident is not None:
            self._thread.join(5)

    def noticed(self, sign: str) -> None:
        """A sign of a move. Signs in short succession are one move."""
        since = self.since_move
        self._last = self._monotonic()
        if since is not None and since < _QUIET_SECONDS:
            return
        self.moves += 1
        LOG.info("The guest seems to run on another host: %s", sign)
        self._on_move(sign)

    def check_clocks(self) -> None:
        sign = self._clocks.sign()
        if sign is not None:
            self.noticed(sign)

    def check_announcement(self, data: bytes) -> None:
        for index in announced_interfaces(data):
            self.noticed(f"network interface {index} was announced anew")

    def _run(self) -> None:
        events = _open_events()
        poll = select.poll()
        poll.register(self._stop_read, select.POLLIN)
        if events is not None:
            poll.register(events, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(1000)}
            if self._stop_read in ready:
                break
            if events is not None and events.fileno() in ready:
                try:
                    self.check_announcement(events.recv(_RECEIVE_BYTES))
                except OSError as error:
                    # The kernel had more to say than fits: an announcement may be among it
                    self.noticed(f"events of the network were lost ({error})")
            self.check_clocks()
        if events is not None:
            events.close()


def _open_events() -> socket.socket | None:
    """A socket that gets the events of network interfaces. Needs no privilege."""
    try:
        events = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        events.bind((0, _RTMGRP_LINK))
    except OSError as error:
        LOG.warning("Events of the network cannot be seen, clocks have to do: %s", error)
        return None
    return events
