# SPDX-License-Identifier: Apache-2.0
"""The buffer map that is being fetched: built in a thread, and kept as chunks in a file.

Each part of the map is gone once it has been serialised: what an agent keeps of a map is a file
without a name, and where in it each chunk begins. Any chunk can be asked for any number of times.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from nova_dmigrate import exception
from nova_dmigrate.agent import cancellation, mapper
from nova_dmigrate.buffermap import BufferMap, parts_to_chunks
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.rpc import messages

LOG = logging.getLogger(__name__)

_IDLE_SECONDS = 300.0
_MAX_MESSAGE = 1000


class GuestMap:
    """The map of all servers of a guest, in parts, which is made as they are asked for.

    At the end there are also ``pages``, the guest pages of each volume, and ``findings``. Pages
    that several servers had, one after the other, are counted for each of them. A server that
    cannot be mapped, or ends meanwhile, is a finding, and the map goes on with the next one.
    """

    def __init__(self, servers: Sequence[mapper.ServerMap]) -> None:
        self._servers = servers
        self._cancellation = cancellation.Cancellation()
        self.pages: collections.Counter[str] = collections.Counter()
        self.findings: list[Finding] = []

    def __iter__(self) -> Iterator[BufferMap]:
        """To be asked for once.

        :raises AgentError: as `mapper.ServerMap` does, if no server can be mapped; also once it is
            cancelled.
        """
        failures: list[Exception] = []
        for server in self._servers:
            try:
                yield from self._parts(server)
            except (exception.AgentError, OSError) as error:
                self._cancellation.check()
                LOG.warning("A server is left out of the map: %s", error)
                failures.append(error)
                self.findings.append(Finding("no-map", Severity.PROBLEM, str(error)))
        if failures and len(failures) == len(self._servers):
            raise failures[0]

    def _parts(self, server: mapper.ServerMap) -> Iterator[BufferMap]:
        self._cancellation.check()
        for part in server:
            self._cancellation.check()
            for volume in part.volumes:
                self.pages[volume.volume_id] += volume.page_count
                del volume
            yield part
            del part  # it is large, and the next one is about to be made
        self.findings += server.summary.findings

    def cancel(self) -> None:
        """Have the iteration, in whichever thread, end soon with an AgentError."""
        self._cancellation.cancel()
        for server in self._servers:
            server.cancel()

    def run(self) -> None:
        """Make the map for what is said about it; the map itself is not kept."""
        collections.deque(self, maxlen=0)


@dataclasses.dataclass
class _Map:
    """One map, from the request to its end. Changed by the building thread alone.

    But for ``wanted``, and ``built`` while it is being built, which the store's lock guards.
    """

    state: messages.MapState
    chunk_bytes: int
    used: float
    begun: bool = False
    wanted: bool = True
    built: GuestMap | None = None
    file: BinaryIO | None = None
    offsets: tuple[int, ...] = ()


class MapStore:
    """At most one map at a time; a new one takes the place of the last.

    There is one building thread at most. A map that is asked for while a cancelled one comes to
    its end waits for that: meanwhile it is "building" as well.

    :param build: begins a map; raises AgentError.
    :param directory: where the file is made.
    """

    def __init__(
        self,
        build: Callable[[], GuestMap],
        directory: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._build = build
        self._directory = directory
        self._clock = clock
        self._lock = threading.Lock()
        self._map: _Map | None = None
        self._working = False

    def begin(self, chunk_bytes: int) -> messages.MapState:
        """Begin to build a map; returns at once.

        While one is being built, that one is answered for: it will be as new as another.
        """
        with self._lock:
            current = self._map
            if current is not None and current.state.state == "building":
                if current.chunk_bytes != chunk_bytes:
                    raise exception.AgentError(
                        reason="a map with chunks of another size is being built", code="busy"
                    )
                return current.state
            state = messages.MapState(uuid.uuid4().hex, "building", 0, 0, 0, 0.0, "")
            if not self._working:
                threading.Thread(target=self._work, name="map", daemon=True).start()
                self._working = True
            self._map = _Map(state, chunk_bytes, self._clock())
            return state

    def state(self, map_id: str) -> messages.MapState:
        return self._find(map_id).state

    def chunk(self, map_id: str, index: int) -> messages.Chunk:
        """One chunk. Asking again gives the same."""
        found = self._find(map_id)
        if found.file is None or index >= len(found.offsets) - 1:
            raise exception.AgentError(
                reason=f"the map has {found.state.chunks} chunks, {index} is asked for",
                code="no-chunk",
            )
        begin, end = found.offsets[index], found.offsets[index + 1]
        data = os.pread(found.file.fileno(), end - begin, begin)
        return messages.Chunk(index, base64.b64encode(data).decode("ascii"))

    def end(self, map_id: str) -> messages.Done:
        """Forget a map; if it is being built, cancel that."""
        with self._lock:
            current = self._map
            if current is not None and current.state.map_id == map_id:
                self._map = None
                current.wanted = False
                if current.built is not None:
                    current.built.cancel()
        return messages.Done()

    def tick(self) -> None:
        """Forget a map that nobody asks for any more."""
        with self._lock:
            current = self._map
            if current is None or current.state.state == "building":
                return
            if self._clock() - current.used > _IDLE_SECONDS:
                LOG.info("Buffer map %s was abandoned", current.state.map_id)
                self._map = None

    def _find(self, map_id: str) -> _Map:
        with self._lock:
            current = self._map
            if current is None or current.state.map_id != map_id:
                raise exception.AgentError(
                    reason=f"there is no map {map_id} (any more)", code="unknown-map"
                )
            current.used = self._clock()
            return current

    def _work(self) -> None:
        """Build what is wanted, one map after the other, until there is nothing to build."""
        while True:
            with self._lock:
                target = self._map
                if target is None or target.begun:
                    self._working = False
                    return
                target.begun = True
            self._make(target)
            del target  # its file goes with it

    def _make(self, target: _Map) -> None:
        began = time.monotonic()
        try:
            built = self._build()
            self._set_built(target, built)
            try:
                target.file, target.offsets = self._spool(built, target.chunk_bytes)
            finally:
                self._set_built(target, None)
        except Exception as error:  # noqa: BLE001 - the requester waits for an answer
            if not isinstance(error, exception.DMigrateError):
                LOG.exception("The buffer map cannot be built")
            self._finish(target, began, state="failed", message=str(error)[:_MAX_MESSAGE])
            return
        self._finish(
            target,
            began,
            state="ready",
            chunks=len(target.offsets) - 1,
            pages=sum(built.pages.values()),
            size=target.offsets[-1],
            findings=to_messages(built.findings),
        )

    def _set_built(self, target: _Map, built: GuestMap | None) -> None:
        """Note what is to be cancelled when the map is not wanted any more."""
        with self._lock:
            target.built = built
            if built is not None and not target.wanted:
                built.cancel()

    def _finish(self, target: _Map, began: float, **values: object) -> None:
        target.used = self._clock()
        target.state = dataclasses.replace(
            target.state,
            seconds=time.monotonic() - began,
            **values,  # type: ignore[arg-type]
        )
        LOG.info(
            "Buffer map %s: %s, %d pages in %d chunks, %.2f s %s",
            target.state.map_id,
            target.state.state,
            target.state.pages,
            target.state.chunks,
            target.state.seconds,
            target.state.message,
        )

    def _spool(self, built: GuestMap, chunk_bytes: int) -> tuple[BinaryIO, tuple[int, ...]]:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        offsets = [0]
        file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 - lives with the map
        try:
            for chunk in parts_to_chunks(built, chunk_bytes):
                file.write(chunk)
                offsets.append(offsets[-1] + len(chunk))
            file.flush()
            if len(offsets) - 1 > messages.MAX_CHUNKS:
                raise exception.AgentError(reason="the map has too many chunks of this size")
        except BaseException:
            file.close()
            raise
        return file, tuple(offsets)


def to_messages(found: Sequence[Finding]) -> tuple[messages.Finding, ...]:
    """Findings as they are told over RPC, no more than fit."""
    return tuple(
        messages.Finding(each.code, each.severity.value, each.message[:_MAX_MESSAGE])
        for each in found[: messages.MAX_FINDINGS]
    )
