# SPDX-License-Identifier: Apache-2.0
"""Building the buffer map of one server: its frames in memory joined with their place on volumes.

The frames are searched in chunks. Of each that is a page of a known tablespace little is kept
(where its tablespace has it, its guest pages, part of its LSN); from that the map is made, part by
part, when duplicates are gone. The server runs on meanwhile: frames come, go and change under our
eyes. What is wrong in the map by then is a miss for the migration, never an error.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence

from nova_dmigrate import buffermap, exception, findings
from nova_dmigrate.agent import (
    assembly,
    cancellation,
    filesystem,
    location,
    memory,
    options,
    pacing,
    processes,
    scan,
    storage,
    tablespaces,
)

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MapSummary:
    """What was found on the way to a map.

    ``pool_frames``: frames in memory, in those mappings in which there were pages at all.
    ``candidate_frames``: those that hold pages of known tablespaces. ``mapped_pages``: guest
    pages (4 KiB) in the map. ``dirty_frames``: candidates that are known not to be on the volume
    as they are in memory. ``excluded``: guest pages left out, by reason. ``seconds``: the time
    it took, with what became of the parts meanwhile.
    """

    server: processes.ServerProcess
    page_size: int
    pool_frames: int
    candidate_frames: int
    mapped_pages: int
    dirty_frames: int
    excluded: dict[str, int]
    seconds: float
    findings: tuple[findings.Finding, ...]


class ServerMap:
    """The map of what of ``server``'s buffer pool is on its volumes at the time of iteration.

    It comes in parts, of which only one is in memory at a time if the caller holds no more.
    """

    def __init__(
        self, server: processes.ServerProcess, settings: options.MapOptions | None = None
    ) -> None:
        self._server = server
        self._settings = settings or options.MapOptions()
        self._summary: MapSummary | None = None
        self._cancellation = cancellation.Cancellation()

    def cancel(self) -> None:
        """Have the iteration, in whichever thread, end soon with an AgentError."""
        self._cancellation.cancel()

    @property
    def summary(self) -> MapSummary:
        """Of the last iteration that came to its end."""
        if self._summary is None:
            raise RuntimeError("the map has not been made yet")
        return self._summary

    def __iter__(self) -> Iterator[buffermap.BufferMap]:
        """Make the map, and yield its parts.

        :raises ServerNotFound: if the server has ended.
        :raises PrivilegeError: if the kernel does not let us look.
        :raises AgentError: if it is cancelled.
        """
        began = time.monotonic()
        server, settings = self._server, self._settings
        pace = pacing.Pace(settings.cpu_share, settings.time_limit, self._cancellation)
        notes = _Notes()
        spaces = tablespaces.discover(server, notes.unreadable)
        page_size = tablespaces.common_page_size(spaces)
        table = location.PlaceTable(
            _Locator(server, settings, notes).locate(spaces, page_size, self._cancellation)
        )
        search = scan.Scan(table, page_size, settings, pace, self._cancellation)
        with memory.ProcessMemory(server.pid) as process:
            found = search.run(process)
        mapped = 0
        blocks = location.BlockTable(table, page_size)
        for part in assembly.assemble(found, blocks, search.excluded):
            mapped += part.page_count
            yield part
            del part  # it is large, and the next one is about to be made
            self._cancellation.check()
        if not server.running:
            raise exception.ServerNotFound(reason=f"process {server.pid} has ended")
        self._summary = MapSummary(
            server=server,
            page_size=page_size,
            pool_frames=search.pool_frames,
            candidate_frames=search.candidate_frames,
            mapped_pages=mapped,
            dirty_frames=search.dirty_frames,
            excluded={reason: count for reason, count in sorted(search.excluded.items()) if count},
            seconds=time.monotonic() - began,
            findings=notes.all(search, mapped),
        )
        LOG.info(
            "Mapped %d guest pages of %s in %.2f s (%d frames with pages, excluded: %s)",
            mapped,
            server.datadir,
            self._summary.seconds,
            self._summary.candidate_frames,
            self._summary.excluded,
        )


class _Notes:
    """Collects findings; many files with the same trouble make one."""

    def __init__(self) -> None:
        self._paths: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        self._buffered: list[str] = []

    def storage(self, error: exception.StorageError, path: str) -> None:
        code = str(error.kwargs.get("code", "unsupported-device"))
        self._paths[code, str(error.kwargs.get("reason"))].append(path)

    def unreadable(self, path: str, error: OSError) -> None:
        reason = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM):
            reason += " (the agent needs CAP_DAC_READ_SEARCH)"
        self._paths["unreadable", reason].append(path)

    def buffered(self, path: str) -> None:
        self._buffered.append(path)

    def all(self, search: scan.Scan, mapped: int) -> tuple[findings.Finding, ...]:
        made = []
        for (code, reason), paths in sorted(self._paths.items()):
            text = f"{_named(paths)} cannot be mapped: {reason}"
            made.append(findings.Finding(code, findings.Severity.PROBLEM, text))
        if self._buffered:
            text = (
                f"{_named(self._buffered)} not opened with O_DIRECT (innodb_flush_method): what "
                "was written may be on the volume only later"
            )
            made.append(findings.Finding("not-o-direct", findings.Severity.NOTE, text))
        if not search.candidate_frames:
            text = "no page of a known tablespace was found in the memory of the server"
            made.append(findings.Finding("no-frames", findings.Severity.PROBLEM, text))
        elif not mapped:
            text = "none of the pages in memory can be read from a volume"
            made.append(findings.Finding("nothing-mapped", findings.Severity.PROBLEM, text))
        return tuple(made)


def _named(paths: Sequence[str]) -> str:
    first = sorted(paths)[0]
    return first if len(paths) == 1 else f"{first} and {len(paths) - 1} more"


class _Locator:
    """Finds out where each file lies, or why it is excluded."""

    def __init__(
        self, server: processes.ServerProcess, settings: options.MapOptions, notes: _Notes
    ) -> None:
        self._mounts = filesystem.read_mounts(server.pid)
        self._stack = storage.DeviceStack(settings.volume_names)
        self._settings = settings
        self._notes = notes

    def locate(
        self,
        spaces: Sequence[tablespaces.Tablespace],
        page_size: int,
        cancelled: cancellation.Cancellation,
    ) -> list[location.File]:
        files = []
        places = 0
        for space in tablespaces.consistent(spaces, page_size):
            cancelled.check()
            excluded = space.excluded
            placed: list[storage.Placed] = []
            if excluded is None:
                try:
                    if places + space.pages > location.MAX_PLACES:
                        raise exception.StorageError(
                            path=space.path,
                            reason=f"the tablespaces have more than {location.MAX_PLACES} pages",
                            code="too-many-pages",
                        )
                    placed = self._place(space)
                    places += space.pages
                except exception.StorageError as error:
                    self._notes.storage(error, space.path)
                    excluded = str(error.kwargs.get("code", "unsupported-device"))
            files.append(
                location.File(
                    space_id=space.space_id,
                    first_page=space.first_page,
                    pages=space.pages,
                    full_crc32=space.full_crc32,
                    excluded=excluded,
                    placed=tuple(placed),
                )
            )
        return files

    def _place(self, space: tablespaces.Tablespace) -> list[storage.Placed]:
        filesystem.check_mount(space.path, self._mounts.get(space.device))
        segments = self._stack.segments(space.device)
        try:
            descriptor = os.open(space.location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise exception.StorageError(
                path=space.path, reason=error.strerror, code="unreadable"
            ) from error
        try:
            if space.direct is False:
                self._notes.buffered(space.path)
                if self._settings.sync_buffered:
                    os.fdatasync(descriptor)
            extents = filesystem.file_extents(descriptor, space.path)
        finally:
            os.close(descriptor)
        placed = storage.place(extents, segments)
        if 2 * sum(int(part.length.sum()) for part in placed) < int(extents.length.sum()):
            raise exception.StorageError(
                path=space.path,
                reason="it is not aligned to blocks of 4 KiB of the volume (the file system has "
                "smaller blocks, or its partition begins in between)",
                code="unaligned",
            )
        return placed
