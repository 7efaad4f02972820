# SPDX-License-Identifier: Apache-2.0
"""What a server itself knows of its buffer pool: its dumps and loads of lists of hot pages.

Both are begun by setting a variable, and told of by a sentence in a status variable. A dump has the
pages in the order of the server's LRU list. It does not become the list as it is: a server that
dumps has neither the old nor the new one for a moment, and brings none to the disk.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception
from nova_dmigrate.agent import cancellation, changes, flushing, hotlist, hotlist_file
from nova_dmigrate.agent.database import Database

FILENAME = "innodb_buffer_pool_filename"
DUMP_SHARE = "innodb_buffer_pool_dump_pct"
DUMP = "innodb_buffer_pool_dump_now"
LOAD = "innodb_buffer_pool_load_now"
ABORT = "innodb_buffer_pool_load_abort"
HOME = "innodb_data_home_dir"
INSTANCES = "innodb_buffer_pool_instances"
DUMP_STATUS = "Innodb_buffer_pool_dump_status"
LOAD_STATUS = "Innodb_buffer_pool_load_status"
_FREE_PAGES = "Innodb_buffer_pool_pages_free"
_PAGES_READ = "Innodb_pages_read"

# What is changed for a dump or for loads, in the order in which it can be set
NAMES = (flushing.CAPACITY_MAX, flushing.CAPACITY, DUMP_SHARE, FILENAME)

_ON = "1"
_DUMPED_SUFFIX = "-dump"
_POLL = 0.05
_DUMP_POLL = 0.01
_DUMP_SECONDS = 120.0
# The status tells seconds: two loads that end within one would look like one
_APART = 1.1
_BEGIN_SECONDS = 5.0
# A server that is just going back to sleep may miss the first one
_CALLS = 2
_ABORT_SECONDS = 60.0
# Of the time, at least so many parts are not spent on asking
_UNASKED = 10
# How the sentences begin. "Loading of buffer pool not started" is MySQL's for neither
_LOADING = ("Loading buffer pool", "Loaded")
_DUMPING = ("Dumping buffer pool", "Restricted", "Instance", "Buffer pool")
_LOAD_DONE = "Buffer pool(s) load completed"
_ABORTED = "Buffer pool(s) load aborted"

U64 = NDArray[np.uint64]


def place_of(database: Database) -> hotlist_file.Place:
    """Where the server keeps its list.

    :raises StorageError: if that is no place that can be written to.
    """
    values = database.variables([FILENAME, HOME])
    return hotlist_file.checked(
        values.get(FILENAME, hotlist_file.DEFAULT_NAME), values.get(HOME, "")
    )


def is_loading(database: Database) -> bool:
    """Whether the server loads a list at the moment."""
    return database.status([LOAD_STATUS]).get(LOAD_STATUS, "").startswith(_LOADING)


def free_pages(database: Database) -> int:
    """How many pages of the pool hold nothing yet."""
    return int(database.status([_FREE_PAGES]).get(_FREE_PAGES, 0))


def pages_read(database: Database) -> int:
    """How many pages the server has read so far, for clients and for lists."""
    return int(database.status([_PAGES_READ]).get(_PAGES_READ, 0))


@contextlib.contextmanager
def exchange(
    database: Database,
    directory: hotlist_file.ListDirectory,
    borrowed: changes.Borrowed,
    values: Mapping[str, str],
) -> Iterator[str]:
    """The file that the server dumps to and loads from, within the context.

    That is the transfer file. MariaDB's newer versions let nobody name another file than the list
    itself: there the list is kept under another name meanwhile.

    :param values: of variables that are to be set meanwhile.
    :raises ServerError: if the server refuses.
    :raises StorageError: if the files cannot be changed.
    """
    directory.recover()
    directory.remove(directory.transfer)
    if _may_be_renamed(database):
        try:
            with borrowed.changed(database, {**values, FILENAME: directory.transfer}):
                yield directory.transfer
        finally:
            directory.remove(directory.transfer)
        return
    directory.save()
    try:
        with borrowed.changed(database, values):
            yield directory.name
    finally:
        directory.recover()


def dump(
    database: Database,
    directory: hotlist_file.ListDirectory,
    share: float,
    borrowed: changes.Borrowed,
    cancelled: cancellation.Cancellation,
) -> U64:
    """Have the server tell what is in its pool: the list of ``share`` of the pool.

    :raises ServerError: if it refuses, or fails.
    :raises StorageError: if what it has written cannot be had.
    :raises AgentError: if it is cancelled.
    """
    total = max(1, database.pool().total)
    # Each instance has its share of a dump: what is too long must not be cut at its end
    allowed = min(1.0, share, hotlist.MAX_PAGES / total)
    percent = str(max(1, math.floor(100 * allowed + 1e-6)))
    dumped = directory.transfer + _DUMPED_SUFFIX
    directory.remove(dumped)
    try:
        with exchange(database, directory, borrowed, {DUMP_SHARE: percent}) as name:
            _dump(database, directory, name, cancelled)
            directory.link(name, dumped)
            # At once: until then it may have the list's name
            directory.recover()
        pages = directory.read(dumped)
    finally:
        directory.remove(dumped)
    ordered = hotlist.interleave(pages, _instances(database))
    # MySQL 5.6 can only dump all of its pool
    return ordered[: max(1, int(share * total))]


def _instances(database: Database) -> int:
    """How many lists follow each other in a dump."""
    if database.flavour == "mariadb":
        # Since 10.5 there is one pool. 10.5 shows what somebody has once set all the same
        return 1
    return int(database.variables([INSTANCES]).get(INSTANCES, 1))


def _may_be_renamed(database: Database) -> bool:
    """Whether the server can be told another name for its file: asked with the one that it has."""
    try:
        database.set_global(FILENAME, database.variables([FILENAME])[FILENAME])
    except exception.ServerError as error:
        if error.kwargs.get("code") == "read-only":
            return False
        raise
    return True


def _dump(
    database: Database,
    directory: hotlist_file.ListDirectory,
    name: str,
    cancelled: cancellation.Cancellation,
) -> None:
    before = database.status([DUMP_STATUS]).get(DUMP_STATUS, "")
    inode = directory.inode(name)
    database.set_global(DUMP, _ON)
    began = asked = time.monotonic()
    times = 1
    # The server gives the file its name when it is whole
    while directory.inode(name) in (None, inode):
        status = database.status([DUMP_STATUS]).get(DUMP_STATUS, "")
        now = time.monotonic()
        begun = status != before
        if not begun and now - asked > _BEGIN_SECONDS and times < _CALLS:
            database.set_global(DUMP, _ON)
            asked, times = now, times + 1
        # It may have failed as it has the last time
        failed = not status.startswith(_DUMPING) if begun else now - asked > _BEGIN_SECONDS
        if failed or now - began > _DUMP_SECONDS:
            raise exception.ServerError(
                server=database.login.socket, reason=f"no dump of its pool: {status}", code="dump"
            )
        cancelled.wait(_DUMP_POLL)


class Loader:
    """Has a server load lists, one after the other. For one thread.

    :param name: of the file in that directory that it loads, see `exchange`.
    """

    def __init__(
        self,
        database: Database,
        directory: hotlist_file.ListDirectory,
        name: str,
        cancelled: cancellation.Cancellation,
    ) -> None:
        self._database = database
        self._directory = directory
        self._name = name
        self._cancelled = cancelled
        self._ended = time.monotonic()

    def stop_own(self) -> None:
        """End a load that the server has begun of its own accord.

        :raises ServerError: if it does not end.
        """
        end = time.monotonic() + _ABORT_SECONDS
        while self._status().startswith(_LOADING):
            if time.monotonic() > end:
                raise self._error("its own load does not end")
            self._database.set_global(ABORT, _ON)
            self._cancelled.wait(_POLL)
        self._ended = time.monotonic()

    def load(self, pages: U64) -> float:
        """Have pages loaded; the seconds that it took.

        :raises ServerError: if the server fails.
        :raises StorageError: if the file cannot be written.
        :raises AgentError: if it is cancelled; the load is ended then.
        """
        self._directory.replace(self._name, pages, self._cancelled)
        self._cancelled.wait(self._ended + _APART - time.monotonic())
        before, began = self._status(), time.monotonic()
        try:
            self._begin(before)
            asked = time.monotonic()
            while self._status().startswith(_LOADING):
                # All of a server's status is made for one line of it
                self._cancelled.wait(max(_POLL, _UNASKED * (time.monotonic() - asked)))
                asked = time.monotonic()
        except exception.AgentError as error:
            if not isinstance(error, exception.ServerError):
                self._database.set_global(ABORT, _ON)
            raise
        self._ended = time.monotonic()
        status = self._status()
        if not status.startswith(_LOAD_DONE):
            raise self._error(f"it has loaded nothing: {status}")
        return self._ended - began

    def _begin(self, before: str) -> None:
        """Start a load; returns as soon as the status speaks of it."""
        for _ in range(_CALLS):
            self._database.set_global(LOAD, _ON)
            end = time.monotonic() + _BEGIN_SECONDS
            while time.monotonic() < end:
                if self._status() != before:
                    return
                self._cancelled.wait(_POLL)
        raise self._error("it does not begin to load")

    def _status(self) -> str:
        return self._database.status([LOAD_STATUS]).get(LOAD_STATUS, "")

    def _error(self, reason: str) -> exception.ServerError:
        return exception.ServerError(server=self._database.login.socket, reason=reason, code="load")
