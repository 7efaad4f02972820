# SPDX-License-Identifier: Apache-2.0
"""Keeps a recent list of hot pages beside the data of each server, for the day that its guest dies.

The server loads it at its next start, and `warm_up` after an evacuation. A server that is starting,
recovering or ending is left alone, and so is the directory of one that does not run. A list of a
pool that is still cold never takes the place of one that was made when it was warm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception
from nova_dmigrate.agent import (
    cancellation,
    changes,
    hotlist_file,
    hotlist_frames,
    hotlist_server,
    options,
    processes,
)
from nova_dmigrate.agent.database import Database, Login

LOG = logging.getLogger(__name__)

# A shorter list than that share of the present one is of a pool that is being filled ...
_COLD = 0.5
# ... and so is one of a server that has not run for an interval, nor so many seconds: its pool has
# what crash recovery has read
_YOUNG_SECONDS = 300.0
# The shorter one is taken if the server has run for so many intervals, or seconds, all the same
_SETTLED_INTERVALS, _SETTLED_SECONDS = 10, 3600.0
_SOON = 30.0
# So often servers are looked for
_FIND_SECONDS = 5.0
# Without an account the memory is looked at instead
_NO_ACCOUNT = ("login", "privilege")

U64 = NDArray[np.uint64]
_Key = tuple[int, int]  # pid and start


@dataclasses.dataclass(frozen=True)
class ListSettings:
    """``interval``: seconds from one list to the next, 0 for none at all. ``share``: of the buffer
    pool's pages, that the list has at most.
    """

    interval: float = 0.0
    share: float = 0.9


class Servers(Protocol):
    """The servers of this guest, and how to reach them: `service.Servers`."""

    def find(self) -> Sequence[processes.ServerProcess]: ...

    def login(self, server: processes.ServerProcess) -> Login | None: ...

    def login_at(self, socket: str) -> Login: ...


class Keeper:
    """The lists of all servers. For one thread."""

    def __init__(
        self,
        servers: Servers,
        connect: changes.Connect,
        borrowed: changes.Borrowed,
        settings: ListSettings,
        mapping: options.MapOptions,
    ) -> None:
        self._servers = servers
        self._connect = connect
        self._borrowed = borrowed
        self._settings = settings
        # What has changed since it was written is as hot as the rest
        self._mapping = dataclasses.replace(mapping, include_dirty=True)
        self._find_next = 0.0
        self._next: dict[_Key, float] = {}
        self._histories: dict[_Key, hotlist_frames.FrameHistory] = {}
        self._told: dict[_Key, str] = {}

    def keep(self, cancelled: cancellation.Cancellation) -> None:
        """Make the lists that are due. Troubles are logged, once each.

        :raises AgentError: if it is cancelled.
        """
        if not self._settings.interval or time.monotonic() < self._find_next:
            return
        self._find_next = time.monotonic() + min(_FIND_SECONDS, self._settings.interval)
        try:
            servers = self._servers.find()
        except exception.AgentError:
            servers = []
        keys = {_key(server) for server in servers}
        for known in (self._next, self._histories, self._told):
            for gone in set(known) - keys:
                del known[gone]
        for server in servers:
            key = _key(server)
            if server.socket is None or time.monotonic() < self._next.get(key, 0.0):
                continue
            self._next[key] = time.monotonic() + self._settings.interval
            try:
                self._keep(server, cancelled)
                self._told.pop(key, None)
            except (exception.AgentError, OSError) as error:
                cancelled.check()
                if self._told.get(key) != str(error):
                    LOG.warning("No list of hot pages of %s: %s", server.datadir, error)
                self._told[key] = str(error)

    def _keep(self, server: processes.ServerProcess, cancelled: cancellation.Cancellation) -> None:
        with self._opened(server) as database:
            place = (
                hotlist_file.place_of(server)
                if database is None
                else hotlist_server.place_of(database)
            )
            with hotlist_file.ListDirectory(server, place) as directory:
                directory.recover()
                left = self._time_left(server, directory)
                if left > 0:
                    self._next[_key(server)] = time.monotonic() + left
                    return
                began = time.monotonic()
                pages = self._collect(server, database, directory, cancelled)
                if pages is None or not self._is_better(server, pages, directory):
                    soon = min(_SOON, self._settings.interval)
                    self._next[_key(server)] = time.monotonic() + soon
                    return
                directory.check_room(pages.size)
                directory.replace(
                    directory.name, pages, cancelled, lambda: self._still_serves(server)
                )
        LOG.info(
            "Listed %d hot pages of %s in %.1f s, as told by %s",
            pages.size,
            server.datadir,
            time.monotonic() - began,
            "its memory" if database is None else "the server",
        )

    def _time_left(
        self, server: processes.ServerProcess, directory: hotlist_file.ListDirectory
    ) -> float:
        age = directory.age()
        if age is None:
            return 0.0
        grown = min(self._settings.interval, _YOUNG_SECONDS) - _running_for(server)
        return max(grown, self._settings.interval - age if age >= 0 else 0.0)

    @contextlib.contextmanager
    def _opened(self, server: processes.ServerProcess) -> Iterator[Database | None]:
        """A connection that may ask for a dump, None if this account may not.

        :raises ServerError: if the server does not answer.
        """
        login = self._servers.login(server)
        database: Database | None = None
        if login is not None:
            try:
                database = changes.open_server(self._connect, login)
                if not database.may_set_globals():
                    database.close()
                    database = None
            except exception.ServerError as error:
                if error.kwargs.get("code") not in _NO_ACCOUNT:
                    raise
        try:
            yield database
        finally:
            if database is not None:
                database.close()

    def _collect(
        self,
        server: processes.ServerProcess,
        database: Database | None,
        directory: hotlist_file.ListDirectory,
        cancelled: cancellation.Cancellation,
    ) -> U64 | None:
        """The list, None if this is not the time for one."""
        share = self._settings.share
        if database is not None:
            if hotlist_server.is_loading(database):
                return None
            directory.check_room(int(share * database.pool().total))
            return hotlist_server.dump(database, directory, share, self._borrowed, cancelled)
        history = self._histories.setdefault(
            _key(server),
            hotlist_frames.FrameHistory(self._mapping, self._settings.interval / 2),
        )
        return history.look(server, share, cancelled)

    def _is_better(
        self,
        server: processes.ServerProcess,
        pages: U64,
        directory: hotlist_file.ListDirectory,
    ) -> bool:
        if not pages.size:
            return False
        settled = max(_SETTLED_INTERVALS * self._settings.interval, _SETTLED_SECONDS)
        return _running_for(server) > settled or pages.size >= _COLD * directory.lines()

    def _still_serves(self, server: processes.ServerProcess) -> bool:
        """Whether it neither has ended nor is about to: the first thing to go is its socket."""
        try:
            return any(
                _key(each) == _key(server) and each.socket is not None
                for each in self._servers.find()
            )
        except exception.AgentError:
            return False


def _running_for(server: processes.ServerProcess) -> float:
    return changes.boot_clock() - server.start_time / os.sysconf("SC_CLK_TCK")


def _key(server: processes.ServerProcess) -> _Key:
    return server.pid, server.start_time
