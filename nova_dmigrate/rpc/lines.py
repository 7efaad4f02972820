# SPDX-License-Identifier: Apache-2.0
"""Messages as lines of JSON over a file descriptor: bounded, and in step again after garbage.

A line that is too long is dropped to its end, one that is no JSON object is reported as None. So
whatever the other side, or a reader of half a line before a migration, has left in between costs
one message, and the next newline brings both sides back in step.
"""

from __future__ import annotations

import errno
import json
import os
import select
import stat
import time
from typing import Any

from nova_dmigrate.rpc import messages

MAX_LINE_BYTES = messages.MAX_MESSAGE_BYTES + 1024
_READ_BYTES = 1 << 16
_NEWLINE = b"\n"
_REOPEN_PATIENCE = 2.0  # seconds
_REOPEN_POLL = 0.02


class EndOfLines(Exception):
    """The other side has closed, or is not there."""


class NobodyThere(EndOfLines):
    """Nobody holds the other end. That of a character device may be taken again."""


class Splitter:
    """Cuts what arrives into lines of at most ``limit`` bytes; drops those that are longer."""

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self._limit = limit
        self._rest = bytearray()
        self._dropping = False

    def feed(self, data: bytes) -> list[bytes]:
        """The whole lines, without newlines, that ``data`` completes. Empty ones are left out."""
        *ends, rest = data.split(_NEWLINE)
        lines = []
        for end in ends:
            self._add(end)
            if self._rest and not self._dropping:
                lines.append(bytes(self._rest))
            self._rest.clear()
            self._dropping = False
        self._add(rest)
        return lines

    def _add(self, part: bytes) -> None:
        if self._dropping or len(self._rest) + len(part) > self._limit:
            self._dropping = True
            self._rest.clear()
        else:
            self._rest += part


def encode(message: dict[str, Any]) -> bytes:
    """A message as a line. A newline in front ends what another writer may have begun."""
    text = json.dumps(message, separators=(",", ":"), ensure_ascii=True)
    return _NEWLINE + text.encode("ascii") + _NEWLINE


def decode(line: bytes) -> dict[str, Any] | None:
    """The object in a line, None if it is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


class LineStream:
    """Lines over a descriptor in non-blocking mode: a socket, or a virtio-serial port.

    Not for several threads at once, but `close` may come from another one.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._splitter = Splitter()
        self._lines: list[bytes] = []
        os.set_blocking(descriptor, False)

    @property
    def is_device(self) -> bool:
        """Whether this is a character device, which others may hold the other end of in turn."""
        return stat.S_ISCHR(os.fstat(self._descriptor).st_mode)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def receive(self, end: float) -> bytes | None:
        """The next line, None if there is none until ``end`` (monotonic seconds).

        :raises EndOfLines: if the other side has closed.
        """
        while not self._lines:
            if not self._wait(select.POLLIN, end):
                return None
            try:
                data = os.read(self._descriptor, _READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _end_of_lines(error) from error
            if not data:
                raise NobodyThere("the other side has closed")
            self._lines = self._splitter.feed(data)
        return self._lines.pop(0)

    def send(self, message: dict[str, Any], end: float) -> bool:
        """Send a message; False if the other side has not taken all of it until ``end``.

        :raises EndOfLines: if the other side has closed.
        """
        rest = memoryview(encode(message))
        absent = None
        while rest:
            events = self._wait(select.POLLOUT, end)
            if not events:
                return False
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError as error:
                # A virtio-serial port takes nothing then, and polling it does not wait. When one
                # host has closed and the next has opened it, the guest's kernel may tell of the
                # first after having delivered what the second has sent.
                if events & select.POLLHUP:
                    absent = time.monotonic() if absent is None else absent
                    if time.monotonic() > absent + _REOPEN_PATIENCE:
                        raise NobodyThere("the other side has closed") from error
                    time.sleep(_REOPEN_POLL)
            except OSError as error:
                raise _end_of_lines(error) from error
        return True

    def _wait(self, event: int, end: float) -> int:
        """The events of the descriptor that is ready, or broken; 0 if it is not before ``end``."""
        poll = select.poll()
        try:
            poll.register(self._descriptor, event)
        except (ValueError, OSError) as error:
            raise EndOfLines("closed here") from error
        left = end - time.monotonic()
        ready = poll.poll(left * 1000) if left > 0 else []
        return ready[0][1] if ready else 0


def _end_of_lines(error: OSError) -> EndOfLines:
    # What a terminal says whose other side has been closed
    return (NobodyThere if error.errno == errno.EIO else EndOfLines)(str(error))
