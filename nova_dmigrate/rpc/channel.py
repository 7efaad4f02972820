# SPDX-License-Identifier: Apache-2.0
"""Requests over a virtio-serial port, for clouds whose guests must not reach the broker.

The guest opens ``/dev/virtio-ports/org.openstack.dmigrate.0``, the host the UNIX socket that QEMU
has for it. Each line is a JSON object (see `lines`): requests have ``id``, ``version``,
``method``, ``request_id`` and ``arguments``; answers have the request's ``id`` and either
``result`` or ``error``. There is one request at a time.

The port outlives connections and migrations, so both sides must expect halves of lines and
answers to questions that somebody else asked: those have another ``id``, and are skipped.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.rpc.dispatcher import Answer, Dispatcher, refusal
from nova_dmigrate.rpc.lines import EndOfLines, LineStream, NobodyThere, decode
from nova_dmigrate.rpc.messages import AGENT
from nova_dmigrate.rpc.transport import Transport

LOG = logging.getLogger(__name__)

PORT_NAME = "org.openstack.dmigrate.0"
PORT_PATH = f"/dev/virtio-ports/{PORT_NAME}"

_MAX_ID = 64
_SEND_PATIENCE = 30.0  # seconds for the other side to take a whole message
_REOPEN_INTERVAL = 0.5
# Polling a port says at once that nobody is there, and waits for nobody to come.
_ABSENCE_INTERVAL = 0.2
_WAKE_INTERVAL = 1.0

Opener = Callable[[], int]


def open_port(path: str) -> int:
    """A descriptor of a character device or a UNIX socket.

    :raises OSError: if it is not there, nobody listens, or too many wait to be accepted: QEMU
        takes one connection at a time.
    """
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)  # else it waits for a place in the queue, for ever
        connection.connect(path)
        return connection.detach()


class ChannelTransport(Transport):
    """The host's way to the agent of one instance over the socket of its virtio-serial port."""

    def __init__(self, instance: str, opener: Opener) -> None:
        self._instance = instance
        self._opener = opener
        self._lock = threading.Lock()
        self._stream: LineStream | None = None

    def call(self, method: str, request_id: str, arguments: dict[str, Any], timeout: float) -> Any:
        end = time.monotonic() + timeout
        with self._lock:
            try:
                return self._ask(method, request_id, arguments, end)
            except (EndOfLines, OSError) as error:
                self._drop()
                raise self._unreachable(f"its channel failed: {error}") from error
            except exception.AgentUnreachable:
                self._drop()
                raise

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _ask(self, method: str, request_id: str, arguments: dict[str, Any], end: float) -> Answer:
        if self._stream is None:
            self._stream = LineStream(self._opener())
        number = uuid.uuid4().hex
        request = {
            "id": number,
            "version": AGENT.methods[method].since,
            "method": method,
            "request_id": request_id,
            "arguments": arguments,
        }
        if not self._stream.send(request, end):
            raise self._unreachable("it does not take the request")
        while True:
            line = self._stream.receive(end)
            if line is None:
                raise self._unreachable("no answer in time")
            answer = decode(line)
            if answer is not None and answer.get("id") == number:
                return answer

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _unreachable(self, reason: str) -> exception.AgentUnreachable:
        return exception.AgentUnreachable(instance=self._instance, reason=reason)


class ChannelServer:
    """The agent's side: answers what comes through the port until it is stopped.

    A port whose other end nobody holds reads as closed. It stays open all the same: when a guest
    closes its port, what a host has already sent that comes just then is thrown away.
    """

    def __init__(self, dispatcher: Dispatcher, opener: Opener) -> None:
        self._dispatcher = dispatcher
        self._opener = opener
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def reconnect(self) -> None:
        """Nothing to do: the port follows the guest to whatever host it runs on."""

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(2 * _WAKE_INTERVAL)

    def _run(self) -> None:
        complained = False
        while not self._stopped.is_set():
            try:
                stream = LineStream(self._opener())
            except OSError as error:
                if not complained:
                    LOG.error("The channel cannot be opened, next attempt follows: %s", error)
                complained = True
                self._stopped.wait(_REOPEN_INTERVAL)
                continue
            complained = False
            try:
                self._serve(stream)
            except EndOfLines as error:
                LOG.debug("The channel has to be opened anew: %s", error)
                self._stopped.wait(_REOPEN_INTERVAL)
            finally:
                stream.close()

    def _serve(self, stream: LineStream) -> None:
        """Answer until the agent is stopped.

        :raises EndOfLines: if the stream is of no use any more.
        """
        while not self._stopped.is_set():
            try:
                self._serve_line(stream)
            except NobodyThere:
                if not stream.is_device:
                    raise
                self._stopped.wait(_ABSENCE_INTERVAL)

    def _serve_line(self, stream: LineStream) -> None:
        line = stream.receive(time.monotonic() + _WAKE_INTERVAL)
        if line is None:
            return
        answer = self._answer(line)
        if answer is not None and not stream.send(answer, time.monotonic() + _SEND_PATIENCE):
            LOG.warning("An answer was not taken from the channel, it is dropped")

    def _answer(self, line: bytes) -> Answer | None:
        """The answer to a line, None to one that no answer could be assigned to."""
        request = decode(line)
        number = None if request is None else request.get("id")
        if request is None or not isinstance(number, str) or not 0 < len(number) <= _MAX_ID:
            LOG.info("Ignored %d bytes in the channel that are no request", len(line))
            return None
        if not AGENT.speaks(request.get("version")):
            answer = refusal("version", f"the agent speaks version {AGENT.version}")
        else:
            answer = self._dispatcher.answer(
                request.get("method"), request.get("request_id"), request.get("arguments")
            )
        return {"id": number, **answer}
