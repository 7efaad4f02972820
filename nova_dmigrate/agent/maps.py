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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from nova_dmigrate import exception
from nova_dmigrate.agent import mapper
from nova_dmigrate.buffermap import BufferMap, parts_to_chunks
from nova_dmigrate.findings import Finding
from nova_dmigrate.rpc import messages

LOG = logging.getLogger(__name__)

_IDLE_SECONDS = 300.0
_MAX_MESSAGE = 1000


class GuestMap:
    """The map of all servers of a guest, in parts, which is made as they are asked for.

    At the end there are also ``pages``, the guest pages of each volume, and ``findings``. Pages
    that several servers had, one after the other, are counted for each of them.
    """

    def __init__(self, servers: Iterable[mapper.ServerMap]) -> None:
        self._servers = servers
        self.pages: collections.Counter[str] = collections.Counter()
        self.findings: list[Finding] = []

    def __iter__(self) -> Iterator[BufferMap]:
        """To be asked for once.

        :raises AgentError: as `mapper.ServerMap` does.
        """
        for server in self._servers:
            for part in server:
                for volume in part.volumes:
                    self.pages[volume.volume_id] += volume.page_count
                    del volume
                yield part
                del part  # it is large, and the next one is about to be made
            self.findings += server.summary.findings

    def run(self) -> None:
        """Make the map for what is said about it; the map itself is not kept."""
        collections.deque(self, maxlen=0)


@dataclasses.dataclass
class _Map:
    """One map, from the request to its end. Changed by its building thread alone."""

    state: messages.MapState
    chunk_bytes: int
    used: float
    file: BinaryIO | None = None
    offsets: tuple[int, ...] = ()


class MapStore:
    """At most one map at a time; a new one takes the place of the last.

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
            self._map = _Map(state, chunk_bytes, self._clock())
            threading.Thread(target=self._make, args=(self._map,), name="map", daemon=True).start()
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
        """Forget a map. One that is being built is thrown away when it is ready."""
        with self._lock:
            if self._map is not None and self._map.state.map_id == map_id:
                self._map = None
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

    def _make(self, target: _Map) -> None:
        began = time.monotonic()
        try:
            built = self._build()
            target.file, target.offsets = self._spool(built, target.chunk_bytes)
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
