# SPDX-License-Identifier: Apache-2.0
"""The host's side: asks the agent of one instance, and believes nothing that it says."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.buffermap import BufferMap, MapLimits
from nova_dmigrate.rpc import fields, messages
from nova_dmigrate.rpc.caller import Caller
from nova_dmigrate.rpc.transport import Transport

LOG = logging.getLogger(__name__)

_UNKNOWN_MAP = "unknown-map"


@dataclasses.dataclass(frozen=True)
class ClientSettings:
    """``timeout``: seconds for one answer. ``attempts``: how often one request is sent at most,
    ``retry_delay``: seconds between them: an agent that is being restarted needs a moment.

    ``map_timeout``: seconds for building a map, and again for fetching it. ``poll_interval``:
    seconds between questions about a map that is being built. ``chunk_bytes``: size of a map's
    chunks, in bytes; fewer if the limits of the map say so.
    """

    timeout: float = 10.0
    attempts: int = 3
    retry_delay: float = 0.5
    map_timeout: float = 120.0
    poll_interval: float = 0.2
    chunk_bytes: int = 1 << 18


class AgentClient:
    """The agent of one instance. All methods raise AgentUnreachable and AgentRefused.

    :param clock: monotonic seconds; :param sleep: waits that many seconds.
    """

    def __init__(
        self,
        instance: str,
        transport: Transport,
        settings: ClientSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.instance = instance
        self._settings = settings = settings or ClientSettings()
        self._caller = Caller(
            messages.AGENT,
            instance,
            transport,
            settings.timeout,
            settings.attempts,
            settings.retry_delay,
            sleep,
        )
        #: What the agent had to say of the last map that it has built.
        self.map_findings: tuple[messages.Finding, ...] = ()
        self._clock = clock
        self._sleep = sleep

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._caller.close()

    def ping(self) -> messages.Pong:
        result: messages.Pong = self._caller.call("ping", messages.Nothing())
        return result

    def describe(self) -> messages.Description:
        result: messages.Description = self._caller.call("describe", messages.Nothing())
        return result

    def health(self, attempts: int | None = None) -> messages.Health:
        """:param attempts: how often it is asked at most; None for as often as anything."""
        result: messages.Health = self._caller.call("health", messages.Nothing(), attempts)
        return result

    def prepare(
        self, dirty_share: float = 0.01, seconds: float = 30.0, lease_seconds: float = 60.0
    ) -> messages.LeaseState:
        """Start lowering dirty pages. Returns at once; `renew` tells how far it is."""
        arguments = messages.PrepareArguments(dirty_share, seconds, lease_seconds)
        result: messages.LeaseState = self._caller.call("prepare", arguments)
        return result

    def renew(self, lease_id: str, lease_seconds: float = 60.0) -> messages.LeaseState:
        """Keep a preparation alive, and learn how far it is."""
        arguments = messages.RenewArguments(lease_id, lease_seconds)
        result: messages.LeaseState = self._caller.call("renew", arguments)
        return result

    def restore(self, lease_id: str) -> messages.LeaseState:
        """Have all settings restored. Right also when the lease has ended long ago."""
        result: messages.LeaseState = self._caller.call(
            "restore", messages.LeaseArguments(lease_id)
        )
        return result

    def warm_up(self) -> None:
        """Have the buffer pools filled again, hottest pages first. Returns at once.

        Right also before any server serves: the agent waits for them. While it is under way
        already, that goes on.
        """
        self._caller.call("warm_up", messages.Nothing())

    def warm_up_progress(self) -> dict[str, Any]:
        """How far that is: the fields of `messages.WarmUpState`."""
        return fields.to_dict(self._caller.call("warm_up_state", messages.Nothing()))

    def fetch_map(self, limits: MapLimits, wanted: Callable[[], bool] = lambda: True) -> BufferMap:
        """Have a map built, and fetch it.

        :param wanted: asked again and again; when it returns false there is an AgentRefused with
            code ``not-wanted``.

        Chunks are asked for one by one and decoded as they come: no more than one of them is
        under way. A lost answer is asked for again; if the agent has forgotten the map, because
        it was started anew, one more map is asked for.

        :raises BufferMapError: if what comes is no buffer map within ``limits``.
        """
        try:
            return self._fetch_map(limits, wanted)
        except exception.AgentRefused as error:
            if error.kwargs.get("code") != _UNKNOWN_MAP:
                raise
            LOG.info("Instance %s: the agent has lost its buffer map; once more", self.instance)
            return self._fetch_map(limits, wanted)

    def _fetch_map(self, limits: MapLimits, wanted: Callable[[], bool]) -> BufferMap:
        size = min(self._settings.chunk_bytes, limits.max_chunk_bytes, messages.MAX_CHUNK_BYTES)
        state: messages.MapState = self._caller.call("map_begin", messages.MapArguments(size))
        try:
            state = self._wait_for_map(state, wanted)
            self.map_findings = state.findings
            if state.pages > limits.max_pages:
                raise exception.BufferMapError(
                    reason=f"it has {state.pages} pages, allowed are {limits.max_pages}"
                )
            chunks = self._chunks(state, size, wanted)
            return BufferMap.from_chunks(chunks, limits)
        finally:
            # The agent forgets an abandoned map by itself after some time
            with contextlib.suppress(exception.RpcError):
                self._caller.call("map_end", messages.MapReference(state.map_id), attempts=1)

    def _wait_for_map(
        self, state: messages.MapState, wanted: Callable[[], bool]
    ) -> messages.MapState:
        end = self._clock() + self._settings.map_timeout
        reference = messages.MapReference(state.map_id)
        while state.state == "building":
            if self._clock() >= end:
                raise exception.AgentUnreachable(
                    instance=self.instance,
                    reason=f"no buffer map after {self._settings.map_timeout:g} s",
                )
            self._check(wanted)
            self._sleep(self._settings.poll_interval)
            state = self._caller.call("map_state", reference)
            if state.map_id != reference.map_id:
                raise self._caller.nonsense("map_state", "it speaks of another map")
        if state.state == "failed":
            raise exception.AgentRefused(
                instance=self.instance, reason=state.message, code="map-failed"
            )
        return state

    def _check(self, wanted: Callable[[], bool]) -> None:
        if not wanted():
            raise exception.AgentRefused(
                instance=self.instance, reason="its map is not wanted any more", code="not-wanted"
            )

    def _chunks(
        self, state: messages.MapState, size: int, wanted: Callable[[], bool]
    ) -> Iterator[bytes]:
        end = self._clock() + self._settings.map_timeout
        for index in range(state.chunks):
            self._check(wanted)
            if self._clock() >= end:
                raise exception.AgentUnreachable(
                    instance=self.instance,
                    reason=f"{index} of {state.chunks} chunks of the buffer map after "
                    f"{self._settings.map_timeout:g} s",
                )
            chunk = self._caller.call("map_chunk", messages.ChunkArguments(state.map_id, index))
            try:
                data = base64.b64decode(chunk.data, validate=True)
            except (binascii.Error, ValueError) as error:
                raise self._caller.nonsense("map_chunk", "the chunk is not base64") from error
            if chunk.index != index or len(data) > size:
                raise self._caller.nonsense("map_chunk", f"chunk {index} was asked for")
            yield data
