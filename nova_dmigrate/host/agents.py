# SPDX-License-Identifier: Apache-2.0
"""Asks the agents of guests on this host on behalf of others, over their virtio-serial ports.

A guest that has just moved here can so be asked by whoever has moved it, from another host.
"""

import contextlib
import dataclasses
import json
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.buffermap import framed_size, put_chunk
from nova_dmigrate.host import permissions
from nova_dmigrate.rpc.channel import ChannelTransport, open_port
from nova_dmigrate.rpc.client import AgentClient, ClientSettings
from nova_dmigrate.rpc.host_messages import (
    LARGE_MAP,
    MAX_ANSWER,
    SAVING_SECONDS,
    AgentAnswer,
    AgentRequest,
    SaveChunks,
    SavedChunks,
)
from nova_dmigrate.rpc.messages import AGENT
from nova_dmigrate.rpc.transport import Transport

#: Seconds for which a port stays open when it has been used: a guest that is busy takes its time to
#: notice that somebody has come, and whoever asks once mostly asks again.
_KEPT = 2.0
#: Codes of refusals of an agent that whoever has asked for chunks goes on by; what others mean is
#: not the guest's to choose.
_TOLD = ("nonsense", "unknown-map")


class AgentProxy:
    """Asks agents for others.

    :param directories: below which ports may be.
    """

    def __init__(self, directories: Sequence[str]) -> None:
        self._ports = _Ports(directories)

    def ask(self, request: AgentRequest) -> AgentAnswer:
        """The agent's answer.

        :raises RequestRefused: the agent cannot be reached, or not be asked that.
        """
        if request.method not in AGENT.methods:
            raise _refused(f"agents have no method {request.method}", "malformed")
        try:
            arguments = json.loads(request.arguments)
        except (ValueError, RecursionError) as error:
            raise _refused("the arguments are not JSON", "malformed") from error
        way = _PortTransport(request.instance, self._ports, request.channel_path)
        with _reached():
            answer = way.call(request.method, request.request_id, arguments, request.timeout)
        text = json.dumps(answer)
        if len(text) > MAX_ANSWER:
            raise _refused("the agent's answer is too long", "nonsense")
        return AgentAnswer(text)

    def save_chunks(self, request: SaveChunks, descriptor: int) -> SavedChunks:
        """Fetch chunks of a map for a second or so, and put them into a file.

        :param descriptor: of the file.
        :raises RequestRefused: the agent cannot be reached or refuses, or the file cannot be
            written, or would become larger than it may.
        """
        way = _PortTransport(request.instance, self._ports, request.channel_path)
        settings = ClientSettings(timeout=request.timeout, attempts=1)
        client = AgentClient(request.instance, way, settings)
        end = time.monotonic() + SAVING_SECONDS
        chunks, size = request.first, request.offset
        try:
            with _reached():
                while chunks < request.behind:
                    data = client.chunk(request.map_id, chunks, request.max_chunk_bytes)
                    if size + framed_size(data) > request.max_bytes:
                        raise _refused(
                            f"it would have more than {request.max_bytes} bytes", LARGE_MAP
                        )
                    size = put_chunk(descriptor, size, data)
                    chunks += 1
                    if time.monotonic() >= end:
                        break
        except exception.AgentRefused as error:
            code = error.kwargs.get("code")
            raise _refused(str(error), code if code in _TOLD else "agent-refused") from error
        except OSError as error:
            raise _refused(f"the buffer map cannot be written: {error}", "map-file") from error
        return SavedChunks(chunks, size)


class _Ports:
    """The ports of guests, each while somebody uses it.

    :param directories: below which they may be.
    """

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = directories
        self._lock = threading.Lock()
        self._ports: weakref.WeakValueDictionary[str, _Port] = weakref.WeakValueDictionary()

    def port(self, path: str) -> "_Port":
        """:raises RequestRefused: it may not be used, or is not there."""
        real = permissions.channel(path, self._directories)
        with self._lock:
            return self._ports.setdefault(real, _Port(real))


class _PortTransport(Transport):
    """The way to the agent of one instance on this host. One request at a time is handed on to each
    port: QEMU lets one at a time have it.
    """

    def __init__(self, instance: str, ports: _Ports, path: str) -> None:
        self._instance = instance
        self._ports = ports
        self._path = path

    def call(self, method: str, request_id: str, arguments: dict[str, Any], timeout: float) -> Any:
        end = time.monotonic() + timeout
        port = self._ports.port(self._path)
        if not port.lock.acquire(timeout=timeout):
            raise exception.AgentUnreachable(
                instance=self._instance, reason="others are asking it all the time"
            )
        try:
            return port.ask(self._instance, _Request(method, request_id, arguments), end)
        finally:
            port.lock.release()

    def close(self) -> None:
        """Nothing to do: ports are closed when nobody has used them for a while."""


@dataclasses.dataclass(frozen=True)
class _Request:
    method: str
    request_id: str
    arguments: dict[str, Any]


class _Port:
    """Exists while somebody asks through it, or waits for that, and as long as it is open.

    All but the lock belongs to who has the lock.
    """

    def __init__(self, path: str) -> None:
        self.lock = threading.Lock()
        self._path = path
        self._transport: ChannelTransport | None = None
        self._used = 0.0
        self._watched = False  # whether something closes it when it is not used any more

    def ask(self, instance: str, request: _Request, end: float) -> Any:
        """The agent's answer, until ``end``.

        :raises AgentUnreachable: it has none.
        """
        if self._transport is not None:
            try:
                return self._ask(self._transport, request, end)
            except exception.AgentUnreachable:
                # The guest may have been stopped, and be another one by now
                self._close()
                if time.monotonic() >= end:
                    raise
        self._transport = ChannelTransport(instance, lambda: open_port(self._path))
        try:
            return self._ask(self._transport, request, end)
        except exception.AgentUnreachable:
            self._close()
            raise

    def _ask(self, transport: ChannelTransport, request: _Request, end: float) -> Any:
        left = end - time.monotonic()
        answer = transport.call(request.method, request.request_id, request.arguments, left)
        self._used = time.monotonic()
        if not self._watched:
            self._watch()
        return answer

    def _watch(self) -> None:
        timer = threading.Timer(_KEPT, self._close_unused)
        timer.daemon = True
        timer.start()
        self._watched = True

    def _close_unused(self) -> None:
        with self.lock:
            self._watched = False
            if time.monotonic() >= self._used + _KEPT:
                self._close()
            else:
                self._watch()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """:raises RequestRefused: an agent cannot be reached."""
    try:
        yield
    except exception.AgentUnreachable as error:
        raise _refused(str(error), "agent-unreachable") from error


def _refused(reason: str, code: str) -> exception.RequestRefused:
    return exception.RequestRefused(reason=reason, code=code)
