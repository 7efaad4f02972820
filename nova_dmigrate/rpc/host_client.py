# SPDX-License-Identifier: Apache-2.0
"""Asks the service of a host, and through it the agent of an instance there."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.rpc import host_messages
from nova_dmigrate.rpc.caller import Caller
from nova_dmigrate.rpc.client import MapFile
from nova_dmigrate.rpc.host_messages import HOST, HostState, Order, SessionState
from nova_dmigrate.rpc.transport import Transport

#: How long whoever wants to migrate waits for a sign of life of the other host, in seconds: in two
#: it shall be known whether there is one.
HELLO_TIMEOUT = 1.8
_TIMEOUT = 10.0
_ATTEMPTS = 2
_RETRY_DELAY = 0.2
# What the way to the host may take beside the agent's own time
_PROXY_SECONDS = 1.0
_GZIP = 16 + zlib.MAX_WBITS


class HostClient:
    """The service of one host. All methods raise HostUnreachable and HostRefused.

    :param timeout: seconds for one answer, but that to `hello`.
    :param sleep: waits that many seconds.
    """

    def __init__(
        self,
        host: str,
        transport: Transport,
        timeout: float = _TIMEOUT,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.host = host
        self._caller = Caller(HOST, host, transport, timeout, _ATTEMPTS, _RETRY_DELAY, sleep)

    def __enter__(self) -> HostClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back connections."""
        self._caller.close()

    def hello(self, timeout: float = HELLO_TIMEOUT) -> HostState:
        """Whether the host can take part, asked once: within ``timeout`` seconds it is known."""
        result: HostState = self._caller.call(
            "hello", host_messages.HelloArguments(), attempts=1, timeout=timeout
        )
        return result

    def open_session(self, order: Order) -> SessionState:
        """Have a relay started. Returns at once; `renew` tells when it runs."""
        source = isinstance(order, host_messages.OpenSource)
        return self._session("open_source" if source else "open_destination", order)

    def session(self, session_id: str) -> SessionState:
        """How far a session is, without keeping it alive."""
        return self._session("session", host_messages.SessionReference(session_id))

    def renew(self, session_id: str, lease_seconds: float = 30.0) -> SessionState:
        """Keep a session alive, and learn how far it is."""
        return self._session("renew", host_messages.RenewSession(session_id, lease_seconds))

    def use_map(self, session_id: str, buffer_map: str, memory_layout: str) -> SessionState:
        """Have the source relay load a map, two files on the host, while the stream flows."""
        return self._session("use_map", host_messages.UseMap(session_id, buffer_map, memory_layout))

    def close_session(self, session_id: str) -> SessionState:
        """End a session; its last state. The summary stays.

        It is still running where QEMU may have begun post-copy: then its relay ends with QEMU.
        """
        return self._session("close", host_messages.SessionReference(session_id))

    def summary(self, session_id: str) -> dict[str, Any] | None:
        """The summary of a relay that has ended, None if it has left none (it was killed)."""
        try:
            data = self._summary(session_id)
        except exception.HostRefused as error:
            if error.kwargs.get("code") == "no-summary":
                return None
            raise
        unpacker = zlib.decompressobj(_GZIP)
        try:
            text = unpacker.decompress(data, host_messages.MAX_SUMMARY_BYTES)
            summary = json.loads(text) if unpacker.eof else None
        except (zlib.error, ValueError, RecursionError) as error:
            raise self._caller.nonsense("summary", f"it is no summary: {error}") from error
        if not isinstance(summary, dict):
            raise self._caller.nonsense("summary", "it is no summary")
        return summary

    def downtime(self, domain: str) -> float | None:
        """Milliseconds for which a guest stood still when it came to the host; None if its libvirt
        does not tell.
        """
        told: host_messages.GuestDowntime = self._caller.call(
            "downtime", host_messages.DowntimeArguments(domain)
        )
        return told.milliseconds

    def agent(self, request: host_messages.AgentRequest) -> Any:
        """The answer of an agent to one request, as JSON gives it, unchecked."""
        answer: host_messages.AgentAnswer = self._caller.call(
            "agent", request, attempts=1, timeout=request.timeout + _PROXY_SECONDS
        )
        try:
            return json.loads(answer.answer)
        except (ValueError, RecursionError) as error:
            raise self._caller.nonsense("agent", "the agent's answer is not JSON") from error

    def save_chunks(self, request: host_messages.SaveChunks) -> host_messages.SavedChunks:
        """Have chunks of a buffer map put into a file on the host."""
        seconds = host_messages.SAVING_SECONDS + request.timeout + _PROXY_SECONDS
        saved: host_messages.SavedChunks = self._caller.call(
            "save_chunks", request, attempts=1, timeout=seconds
        )
        if not request.first < saved.chunks <= request.behind:
            raise self._caller.nonsense("save_chunks", f"it has saved {saved.chunks} chunks")
        return saved

    def _session(self, method: str, arguments: Any) -> SessionState:
        state: SessionState = self._caller.call(method, arguments)
        if state.session_id != arguments.session_id:
            raise self._caller.nonsense(method, "it speaks of another session")
        return state

    def _summary(self, session_id: str) -> bytes:
        data = bytearray()
        while True:
            chunk: host_messages.SummaryChunk = self._caller.call(
                "summary", host_messages.SummaryArguments(session_id, len(data))
            )
            try:
                part = base64.b64decode(chunk.data, validate=True)
            except (binascii.Error, ValueError) as error:
                raise self._caller.nonsense("summary", "the chunk is not base64") from error
            if chunk.offset != len(data) or not part or len(data) + len(part) > chunk.size:
                raise self._caller.nonsense("summary", f"what is at {len(data)} was asked for")
            data += part
            if len(data) == chunk.size:
                return bytes(data)


class HostChannelTransport(Transport):
    """The way to the agent of an instance through the service of the host that it runs on.

    :param channel_path: QEMU's socket of the instance's virtio-serial port, on that host.
    """

    def __init__(self, instance: str, client: HostClient, channel_path: str) -> None:
        self._instance = instance
        self._client = client
        self._path = channel_path

    def call(self, method: str, request_id: str, arguments: dict[str, Any], timeout: float) -> Any:
        request = host_messages.AgentRequest(
            instance=self._instance,
            channel_path=self._path,
            method=method,
            request_id=request_id,
            arguments=json.dumps(arguments),
            timeout=timeout,
        )
        with self._translated():
            return self._client.agent(request)

    def save_chunks(self, map_id: str, chunks: int, file: MapFile, timeout: float) -> MapFile:
        """A `Saver` for a file on that host: what it holds does not cross the broker."""
        request = host_messages.SaveChunks(
            instance=self._instance,
            channel_path=self._path,
            map_id=map_id,
            first=file.chunks,
            behind=chunks,
            max_chunk_bytes=file.max_chunk_bytes,
            buffer_map=file.path,
            offset=file.size,
            timeout=timeout,
            max_bytes=file.max_bytes,
        )
        with self._translated():
            try:
                saved = self._client.save_chunks(request)
            except exception.HostRefused as error:
                if error.kwargs.get("code") == host_messages.LARGE_MAP:
                    raise exception.BufferMapError(reason=str(error)) from error
                raise
        return dataclasses.replace(file, chunks=saved.chunks, size=saved.size)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """What the host answers, or not, as the agent's errors."""
        try:
            yield
        except exception.HostUnreachable as error:
            raise exception.AgentUnreachable(instance=self._instance, reason=str(error)) from error
        except exception.HostRefused as error:
            code = error.kwargs.get("code")
            if code == "agent-unreachable":
                raise exception.AgentUnreachable(
                    instance=self._instance, reason=str(error)
                ) from error
            raise exception.AgentRefused(
                instance=self._instance, reason=str(error), code=code
            ) from error

    def close(self) -> None:
        """Nothing to do: the client belongs to whoever has made it."""
