# SPDX-License-Identifier: Apache-2.0
"""The buffer map that is being fetched: built in a thread, then kept as chunks in a file.

The map's arrays are gone once it has been serialised: what an agent keeps of a map is a file
without a name, and where in it each chunk begins. Any chunk can be asked for any number of times.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from nova_dmigrate import exception
from nova_dmigrate.buffermap import BufferMap, VolumeExtents
from nova_dmigrate.findings import Finding
from nova_dmigrate.rpc import messages

LOG = logging.getLogger(__name__)

Builder = Callable[[], tuple[BufferMap, Sequence[Finding]]]

_IDLE_SECONDS = 300.0
_MAX_MESSAGE = 1000


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

    :param build: makes the map and says what was found; raises AgentError or BufferMapError.
    :param directory: where the file is made.
    """

    def __init__(
        self, build: Builder, directory: Path, clock: Callable[[], float] = time.monotonic
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
            built, found = self._build()
            pages = built.page_count
            target.file, target.offsets = self._spool(built, target.chunk_bytes)
            del built
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
            pages=pages,
            size=target.offsets[-1],
            findings=to_messages(found),
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

    def _spool(self, built: BufferMap, chunk_bytes: int) -> tuple[BinaryIO, tuple[int, ...]]:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        offsets = [0]
        file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 - lives with the map
        try:
            for chunk in built.to_chunks(chunk_bytes):
                file.write(chunk)
                offsets.append(offsets[-1] + len(chunk))
            file.flush()
            if len(offsets) - 1 > messages.MAX_CHUNKS:
                raise exception.AgentError(reason="the map has too many chunks of this size")
        except BaseException:
            file.close()
            raise
        return file, tuple(offsets)


def merge(maps: Sequence[BufferMap]) -> BufferMap:
    """One map of those of several servers, which may share volumes.

    Where two maps contradict each other (memory went from one server to another between them),
    only the largest is taken: a smaller map costs time, a wrong one would cost more.
    """
    if len(maps) == 1:
        return maps[0]
    try:
        return BufferMap.build(
            VolumeExtents(
                volume_id=volume.volume_id,
                size=volume.size,
                guest=guest.astype("u8") << 12,
                volume_offset=block.astype("u8") << 12,
                length=block.astype("u8") * 0 + 4096,
            )
            for each in maps
            for volume in each.volumes
            for guest, block in [volume.pages()]
        )
    except exception.BufferMapError as error:
        LOG.warning("The maps of %d servers contradict each other: %s", len(maps), error)
        return max(maps, key=lambda each: each.page_count)


def to_messages(found: Sequence[Finding]) -> tuple[messages.Finding, ...]:
    """Findings as they are told over RPC, no more than fit."""
    return tuple(
        messages.Finding(each.code, each.severity.value, each.message[:_MAX_MESSAGE])
        for each in found[: messages.MAX_FINDINGS]
    )
