# SPDX-License-Identifier: Apache-2.0
"""The host's side: asks the agent of one instance, and believes nothing that it says."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.buffermap import MapLimits, put_chunk
from nova_dmigrate.rpc import fields, messages
from nova_dmigrate.rpc.caller import Caller
from nova_dmigrate.rpc.transport import Transport

LOG = logging.getLogger(__name__)

_UNKNOWN_MAP = "unknown-map"
#: Codes of a host that cannot put chunks into that file, though others may.
_NO_SAVER = ("version", "map-file", "map-not-allowed")


@dataclasses.dataclass(frozen=True)
class ClientSettings:
    """``timeout``: seconds for one answer. ``attempts``: how often one request is sent at most,
    ``retry_delay``: seconds between them: an agent that is being restarted needs a moment.

    ``map_timeout``: seconds for building a map, and again for fetching it, in which what belongs to
    it is sent as often as it takes. ``poll_interval``: seconds between questions about a map that
    is being built. ``chunk_bytes``: size of a map's chunks, in bytes; fewer if the limits of the
    map say so.
    """

    timeout: float = 10.0
    attempts: int = 3
    retry_delay: float = 0.5
    map_timeout: float = 120.0
    poll_interval: float = 0.2
    chunk_bytes: int = 1 << 18


@dataclasses.dataclass(frozen=True)
class MapFile:
    """The file of a map that is being fetched: ``chunks`` of it are there, with ``size`` bytes;
    what is behind them does not count. ``max_chunk_bytes``: of each chunk; ``max_bytes``: that it
    may have at most.
    """

    path: str
    max_chunk_bytes: int
    chunks: int = 0
    size: int = 0
    max_bytes: int = MapLimits().max_bytes

    def behind(self, size: int) -> MapFile:
        """When one more chunk is there, which makes ``size`` bytes of all."""
        return dataclasses.replace(self, chunks=self.chunks + 1, size=size)


#: Puts at least one more chunk of a map into its file, given the map's identifier, the number of
#: its chunks, and the seconds that the agent has for each; what is in the file then. Raises as
#: `save_map` does, and AgentRefused with code ``version``, ``map-file`` or ``map-not-allowed``
#: if it cannot do that, or cannot write that file.
Saver = Callable[[str, int, MapFile, float], MapFile]


class AgentClient:
    """The agent of one instance. All methods raise AgentUnreachable and AgentRefused.

    :param clock: monotonic seconds; :param sleep: waits that many seconds.
    :param saver: puts chunks into a file; None for this client itself, one by one.
    """

    def __init__(
        self,
        instance: str,
        transport: Transport,
        settings: ClientSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        saver: Saver | None = None,
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
        self._saver = saver
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

    def save_map(
        self, path: Path, limits: MapLimits, wanted: Callable[[], bool] = lambda: True
    ) -> messages.MapState:
        """Have a map built, and its chunks put into the file that `BufferMap.load` reads, which
        looks at what they hold; here only their number and size is looked at.

        :param wanted: asked again and again; when it returns false there is an AgentRefused with
            code ``not-wanted``.

        No more than one chunk is under way. Once the map is begun, a lost answer is asked for again
        as long as there is time: whatever is on the way to the agent may be started anew meanwhile.
        If the agent has forgotten the map, because it was started anew itself, one more map is
        asked for. After any error there is no file.

        :raises BufferMapError: if there would be more than ``limits`` allow.
        :raises OSError: the file cannot be written.
        """
        try:
            return self._save_map(path, limits, wanted)
        except exception.AgentRefused as error:
            if error.kwargs.get("code") != _UNKNOWN_MAP:
                raise
            LOG.info("Instance %s: the agent has lost its buffer map; once more", self.instance)
            return self._save_map(path, limits, wanted)

    def chunk(
        self,
        map_id: str,
        index: int,
        max_bytes: int,
        patient: Callable[[], bool] = lambda: False,
    ) -> bytes:
        """One chunk of a map that is ready.

        :param patient: whether it is asked for again after all attempts.
        """
        arguments = messages.ChunkArguments(map_id, index)
        answer = self._caller.call("map_chunk", arguments, patient=patient)
        try:
            data = base64.b64decode(answer.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise self._caller.nonsense("map_chunk", "the chunk is not base64") from error
        if answer.index != index or len(data) > max_bytes:
            raise self._caller.nonsense("map_chunk", f"chunk {index} was asked for")
        return data

    def _save_map(
        self, path: Path, limits: MapLimits, wanted: Callable[[], bool]
    ) -> messages.MapState:
        size = min(self._settings.chunk_bytes, limits.max_chunk_bytes, messages.MAX_CHUNK_BYTES)
        # An agent that has never answered is not waited for
        state: messages.MapState = self._caller.call("map_begin", messages.MapArguments(size))
        try:
            state = self._wait_for_map(state, self._patience(wanted))
            if state.pages > limits.max_pages:
                raise exception.BufferMapError(
                    reason=f"it has {state.pages} pages, allowed are {limits.max_pages}"
                )
            with _new_file(path) as descriptor:
                file = MapFile(str(path), size, max_bytes=limits.max_bytes)
                self._save_chunks(state, file, descriptor, self._patience(wanted))
            return state
        finally:
            # The agent forgets an abandoned map by itself after some time
            with contextlib.suppress(exception.RpcError):
                self._caller.call("map_end", messages.MapReference(state.map_id), attempts=1)

    def _patience(self, wanted: Callable[[], bool]) -> Callable[[], bool]:
        """Tells whether there is time left for what begins now; raises AgentRefused when it is not
        wanted any more.
        """
        end = self._clock() + self._settings.map_timeout

        def patient() -> bool:
            if not wanted():
                raise exception.AgentRefused(
                    instance=self.instance,
                    reason="its map is not wanted any more",
                    code="not-wanted",
                )
            return self._clock() < end

        return patient

    def _wait_for_map(
        self, state: messages.MapState, patient: Callable[[], bool]
    ) -> messages.MapState:
        reference = messages.MapReference(state.map_id)
        while state.state == "building":
            if not patient():
                raise exception.AgentUnreachable(
                    instance=self.instance,
                    reason=f"no buffer map after {self._settings.map_timeout:g} s",
                )
            self._sleep(self._settings.poll_interval)
            state = self._caller.call("map_state", reference, patient=patient)
            if state.map_id != reference.map_id:
                raise self._caller.nonsense("map_state", "it speaks of another map")
        if state.state == "failed":
            raise exception.AgentRefused(
                instance=self.instance, reason=state.message, code="map-failed"
            )
        return state

    def _save_chunks(
        self,
        state: messages.MapState,
        file: MapFile,
        descriptor: int,
        patient: Callable[[], bool],
    ) -> None:
        while file.chunks < state.chunks:
            if not patient():
                raise exception.AgentUnreachable(
                    instance=self.instance,
                    reason=f"{file.chunks} of {state.chunks} chunks of the buffer map after "
                    f"{self._settings.map_timeout:g} s",
                )
            file = self._save_more(state, file, descriptor, patient)
            if file.size > file.max_bytes:
                raise exception.BufferMapError(
                    reason=f"{file.chunks} of {state.chunks} chunks have {file.size} bytes already"
                )

    def _save_more(
        self,
        state: messages.MapState,
        file: MapFile,
        descriptor: int,
        patient: Callable[[], bool],
    ) -> MapFile:
        if (saver := self._saver) is not None:
            try:
                return self._caller.insist(
                    "save_chunks",
                    lambda: saver(state.map_id, state.chunks, file, self._settings.timeout),
                    patient=patient,
                )
            except exception.AgentRefused as error:
                if error.kwargs.get("code") not in _NO_SAVER:
                    raise
                LOG.info("Instance %s: chunks come one by one: %s", self.instance, error)
                self._saver = None
        data = self.chunk(state.map_id, file.chunks, file.max_chunk_bytes, patient)
        return file.behind(put_chunk(descriptor, file.size, data))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """A descriptor of an empty file that only its owner may read; gone after an error."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield descriptor
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
