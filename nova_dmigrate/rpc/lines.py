# SPDX-License-Identifier: Apache-2.0
"""Messages as lines of JSON over a file descriptor: bounded, and in step again after garbage.

A line that is too long is dropped to its end, one that is no JSON object is reported as None. So
whatever the other side, or a reader of half a line before a migration, has left in between costs
one message, and the next newline brings both sides back in step.
"""

from __future__ import annotations

import json
import os
import select
import time
from typing import Any

from nova_dmigrate.rpc import messages

MAX_LINE_BYTES = messages.MAX_MESSAGE_BYTES + 1024
_READ_BYTES = 1 << 16
_NEWLINE = b"\n"


class EndOfLines(Exception):
    """The other side has closed, or is not there."""


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
                raise EndOfLines(str(error)) from error
            if not data:
                raise EndOfLines("the other side has closed")
            self._lines = self._splitter.feed(data)
        return self._lines.pop(0)

    def send(self, message: dict[str, Any], end: float) -> bool:
        """Send a message; False if the other side has not taken all of it until ``end``.

        :raises EndOfLines: if the other side has closed.
        """
        rest = memoryview(encode(message))
        while rest:
            if not self._wait(select.POLLOUT, end):
                return False
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise EndOfLines(str(error)) from error
        return True

    def _wait(self, event: int, end: float) -> bool:
        """Whether the descriptor is ready, or broken, before ``end``."""
        poll = select.poll()
        try:
            poll.register(self._descriptor, event)
        except (ValueError, OSError) as error:
            raise EndOfLines("closed here") from error
        left = end - time.monotonic()
        return left > 0 and bool(poll.poll(left * 1000))
