# SPDX-License-Identifier: Apache-2.0
"""Which pages of a server are hot, as far as its memory shows from outside.

What is in the pool at one look after the other is used again and again, or it would have made room
for something else. So a page is the hotter the more looks in a row have found it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception
from nova_dmigrate.agent import (
    cancellation,
    hotlist,
    location,
    memory,
    options,
    pacing,
    processes,
    scan,
    tablespaces,
)

# Whose frames are not what the server would read from the file
_LEFT_OUT = ("temporary", "compressed")
_MOST_LOOKS = 255

U64 = NDArray[np.uint64]


class FrameHistory:
    """What was seen in one server's memory, look by look. For one thread.

    :param seconds: that a look may take while the guest's processors are in use.
    """

    def __init__(self, settings: options.MapOptions, seconds: float) -> None:
        self._settings = settings
        self._seconds = seconds
        self._pages: U64 = np.empty(0, np.uint64)
        self._looks = np.empty(0, np.uint8)

    def look(
        self,
        server: processes.ServerProcess,
        share: float,
        cancelled: cancellation.Cancellation,
    ) -> U64:
        """Look once more: the list of the hottest pages, of ``share`` of the pool at most.

        :raises ServerNotFound: if the server has ended.
        :raises PrivilegeError: if the kernel does not let us look.
        :raises AgentError: if it is cancelled.
        """
        found, frames = self._find(server, cancelled)
        self.seen(found)
        return self.hottest(min(hotlist.MAX_PAGES, int(share * frames)))

    def seen(self, found: U64) -> None:
        """Note a look: pages u64 (n,), sorted, each once."""
        looks = np.ones(found.size, np.uint8)
        if self._pages.size and found.size:
            at = np.minimum(np.searchsorted(self._pages, found), self._pages.size - 1)
            again = self._pages[at] == found
            looks[again] += np.minimum(self._looks[at[again]], _MOST_LOOKS - 1)
        self._pages, self._looks = found, looks

    def hottest(self, most: int) -> U64:
        """The list of at most so many pages."""
        order = np.argsort(_MOST_LOOKS - self._looks, kind="stable")[:most]
        hot: U64 = self._pages[order]
        return hot

    def _find(
        self, server: processes.ServerProcess, cancelled: cancellation.Cancellation
    ) -> tuple[U64, int]:
        """The pages that are there, sorted; how many frames there are."""
        pace = pacing.Pace(self._settings.cpu_share, self._seconds, cancelled)
        spaces = tablespaces.discover(server, lambda path, error: None)
        page_size = tablespaces.common_page_size(spaces)
        table = location.PlaceTable(_files(spaces, page_size))
        search = scan.Scan(table, page_size, self._settings, pace, cancelled)
        with memory.ProcessMemory(server.pid) as process:
            found = search.run(process)
        if not server.running:
            raise exception.ServerNotFound(reason=f"process {server.pid} has ended")
        places = [place.astype(np.uint64) for place, _ in found.kept()]
        place = np.unique(np.concatenate(places)) if places else np.empty(0, np.uint64)
        return np.sort(table.pages(place)) if place.size else place, search.pool_frames


def _files(spaces: list[tablespaces.Tablespace], page_size: int) -> list[location.File]:
    files: list[location.File] = []
    places = 0
    for space in tablespaces.consistent(spaces, page_size):
        excluded = space.excluded if space.excluded in _LEFT_OUT else None
        if excluded is None and places + space.pages > location.MAX_PLACES:
            excluded = "too-many-pages"
        if excluded is None:
            places += space.pages
        files.append(
            location.File(
                space_id=space.space_id,
                first_page=space.first_page,
                pages=space.pages,
                full_crc32=space.full_crc32,
                excluded=excluded,
            )
        )
    return files
