# SPDX-License-Identifier: Apache-2.0
"""Fills the buffer pools again after a restart, hottest pages first, while the databases serve.

A server can load a list by itself, but in the order of its files, and as slowly as its settings for
background work say while clients write; or so fast that the volume has nothing left for clients. So
it gets the list in pieces, as soon as it serves, and what it loads by itself is ended. A piece is
worth a second of the rate that is allowed, or less: what clients leave of the volume, see `turns`.

How far it is, is on disk: an agent that was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception
from nova_dmigrate.agent import (
    cancellation,
    changes,
    flushing,
    hotlist_file,
    hotlist_server,
    ledger,
    processes,
    turns,
)
from nova_dmigrate.agent.database import Database
from nova_dmigrate.agent.hotlist_keeper import Servers
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.fields import checked, integer, number, record, several, text, token

LOG = logging.getLogger(__name__)

_WAIT_SECONDS = 3600.0
_LOOK_SECONDS = 1.0
# A server that answers, but with errors, is asked so often
_ATTEMPTS = 5
_SHORTEST = 1e-3
# Of the pool so much stays free: more would drive out what was loaded before
_FREE = 0.01
_MAX_MESSAGE = 1000
_NO_ACCOUNT = ("login", "privilege", "no-grant")

U64 = NDArray[np.uint64]
_Key = tuple[int, int]  # pid and start


@dataclasses.dataclass(frozen=True)
class Filled:
    """How many pages of which list were loaded in one run of one server.

    ``version``: of the list.
    """

    datadir: str = checked(text(4096))
    pid: int = checked(integer(1, 1 << 32))
    start_time: int = checked(integer(0, 1 << 62))
    version: str = checked(text(128))
    loaded: int = checked(integer(0, 1 << 40))
    total: int = checked(integer(0, 1 << 40))


@dataclasses.dataclass(frozen=True)
class Record:
    """What is on disk. ``begun``: seconds of CLOCK_BOOTTIME, of the boot ``boot_id``."""

    boot_id: str = checked(token())
    begun: float = checked(number(0, 1e10))
    state: messages.WarmUpState = checked(record(messages.WarmUpState))
    filled: tuple[Filled, ...] = checked(several(record(Filled), 64), default=())


class WarmUp:
    """At most one at a time. `request` and `state` are for any thread, `run` for one.

    :param path: where it is noted how far it is.
    :param rate: bytes that a server loads in a second at most, over several seconds.
    """

    def __init__(
        self,
        path: Path,
        servers: Servers,
        connect: changes.Connect,
        borrowed: changes.Borrowed,
        rate: int,
        boot_id: str | None = None,
    ) -> None:
        self._path = path
        self._servers = servers
        self._connect = connect
        self._borrowed = borrowed
        self._rate = rate
        self._boot_id = boot_id or changes.read_boot_id()
        self._lock = threading.Lock()
        # Of this run, by server
        self._attempts: dict[_Key, int] = {}
        self._listed: dict[_Key, int] = {}
        self._failures: dict[_Key, Exception] = {}
        self._remarks: list[str] = []
        self._record = self._new("idle")

    def recover(self) -> None:
        """Take over what an agent that was killed has not finished."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            left = ledger.read_record(Record, self._path)
            if left.boot_id == self._boot_id:
                self._record = left

    @property
    def state(self) -> messages.WarmUpState:
        now = self._record
        if now.state.state not in messages.WARM_UP_UNFINISHED:
            return now.state
        return dataclasses.replace(now.state, seconds=changes.boot_clock() - now.begun)

    @property
    def wanted(self) -> bool:
        """Whether there is something to `run`."""
        return self._record.state.state in messages.WARM_UP_UNFINISHED

    def request(self) -> messages.WarmUpState:
        """Have it done, if it is not under way."""
        with self._lock:
            if not self.wanted:
                self._record = self._new("waiting")
                self._save()
            return self.state

    def run(self, cancelled: cancellation.Cancellation) -> None:
        """Do what was requested, to the end. Its outcome is the state.

        :raises AgentError: if it is cancelled; the next call goes on, unless `stop` is called.
        """
        for known in (self._attempts, self._listed, self._failures):
            known.clear()
        self._remarks.clear()
        try:
            while not self._run(cancelled):
                cancelled.wait(_LOOK_SECONDS)
        except (exception.AgentError, OSError) as error:
            cancelled.check()
            code = getattr(error, "kwargs", {}).get("code", "failed")
            self._end("failed", code, str(error))
            LOG.error("The buffer pools were not filled: %s", error)

    def stop(self, code: str, message: str) -> None:
        """Give up what is not finished."""
        if self.wanted:
            self._end("stopped", code, message)

    def _run(self, cancelled: cancellation.Cancellation) -> bool:
        """Whether all of it is done; if not, it is to be tried again a little later."""
        servers = self._find()
        if not servers:
            if changes.boot_clock() - self._record.begun > _WAIT_SECONDS:
                raise exception.ServerNotFound(
                    reason=f"none serves after {_WAIT_SECONDS:g} s", code="no-server"
                )
            return False
        waited_for = [each for each in servers if not self._settle(each, cancelled)]
        if waited_for:
            return False
        # Of what was tried in vain in a server that has ended since, nothing is left
        for server in servers:
            error = self._failures.get(_key(server))
            if error is not None:
                raise error
        if not any(self._listed.get(_key(server)) for server in servers):
            raise exception.StorageError(
                path=servers[0].datadir, reason="there is no list of hot pages", code="no-list"
            )
        self._end("done", None, "; ".join(self._remarks))
        LOG.info("%d hot pages are in memory again", self._record.state.loaded)
        return True

    def _settle(
        self, server: processes.ServerProcess, cancelled: cancellation.Cancellation
    ) -> bool:
        """Fill one pool, whatever becomes of the others; False if it is to be tried again."""
        key = _key(server)
        if key in self._listed or key in self._failures:
            return True
        try:
            self._listed[key] = self._fill(server, cancelled)
            return True
        except (exception.ServerError, exception.ServerNotFound) as error:
            cancelled.check()
            code = error.kwargs.get("code")
            if code in _NO_ACCOUNT:
                self._give_up(key, self._no_account(error))
                return True
            ended = code == "gone" or isinstance(error, exception.ServerNotFound)
            self._attempts[key] = self._attempts.get(key, 0) + (not ended)
            if self._attempts[key] >= _ATTEMPTS:
                self._give_up(key, error)
                return True
            LOG.warning("The server in %s is waited for: %s", server.datadir, error)
            self._note("waiting", message=str(error))
            return False
        except (exception.StorageError, OSError) as error:
            cancelled.check()
            self._give_up(key, error)
            return True

    def _give_up(self, key: _Key, error: Exception) -> None:
        LOG.warning("Left out: %s", error)
        self._failures[key] = error

    def _find(self) -> list[processes.ServerProcess]:
        """All servers, as soon as all of them serve: none that recovers listens on its socket."""
        try:
            servers = list(self._servers.find())
        except exception.ServerNotFound:
            return []
        return servers if all(each.socket is not None for each in servers) else []

    def _fill(self, server: processes.ServerProcess, cancelled: cancellation.Cancellation) -> int:
        """Fill one pool; the number of pages on its list, 0 if it has none."""
        login = self._servers.login(server)
        if login is None:
            raise exception.ServerError(server=server.datadir, reason="it ends", code="gone")
        with changes.open_server(self._connect, login) as database:
            if not database.may_set_globals():
                raise exception.ServerError(
                    server=login.socket,
                    reason=f"{login.user} may not change settings",
                    code="no-grant",
                )
            place = hotlist_server.place_of(database)
            with hotlist_file.ListDirectory(server, place) as directory:
                directory.recover()
                if directory.inode(directory.name) is None:
                    return 0
                pages = directory.read(directory.name)[: database.pool().total]
                begin = Filled(
                    server.datadir,
                    server.pid,
                    server.start_time,
                    directory.version(),
                    0,
                    pages.size,
                )
                self._load(database, directory, pages, self._resumed(begin), cancelled)
        return pages.size

    def _load(
        self,
        database: Database,
        directory: hotlist_file.ListDirectory,
        pages: U64,
        filled: Filled,
        cancelled: cancellation.Cancellation,
    ) -> None:
        pool = database.pool()
        per_second = max(1, self._rate // pool.page_bytes)
        self._note("running", filled)
        values = _settings(database, per_second)
        with hotlist_server.exchange(database, directory, self._borrowed, values) as name:
            loader = hotlist_server.Loader(database, directory, name, cancelled)
            loader.stop_own()
            turn = turns.Turns(per_second)
            while filled.loaded < pages.size:
                free = hotlist_server.free_pages(database)
                if free <= _FREE * pool.total:
                    self._remarks.append(
                        f"the pool of {filled.datadir} was full with {filled.loaded} of "
                        f"{filled.total} pages of its list"
                    )
                    break
                began, before = time.monotonic(), hotlist_server.pages_read(database)
                part = pages[filled.loaded :][: min(turn.size, free)]
                took = loader.load(part)
                filled = dataclasses.replace(filled, loaded=filled.loaded + part.size)
                self._note("running", filled)
                rested, loaded = time.monotonic(), hotlist_server.pages_read(database)
                cancelled.wait(max(turn.rest(took), began + part.size / per_second - rested))
                reads = hotlist_server.pages_read(database) - loaded
                rest = max(time.monotonic() - rested, _SHORTEST)
                turn.note(part.size, took, reads / rest, (loaded - before) / max(took, _SHORTEST))

    def _resumed(self, begin: Filled) -> Filled:
        """Where to begin: where an earlier agent was, in the same run with the same list."""
        for each in self._record.filled:
            if dataclasses.replace(each, loaded=0) == begin:
                return each
        return begin

    def _no_account(self, error: exception.AgentError) -> exception.ServerError:
        return exception.ServerError(
            server=error.kwargs.get("server"),
            reason=f"{error.kwargs.get('reason')}: without an account that may change settings "
            "(nova-dmigrate-agent grants) the agent does not fill the buffer pool; the server's "
            "own load at its start (innodb_buffer_pool_load_at_startup) takes the same list",
            code=error.kwargs.get("code"),
        )

    # Noting

    def _new(self, state: str) -> Record:
        return Record(self._boot_id, changes.boot_clock(), messages.WarmUpState(state))

    def _note(self, state: str, filled: Filled | None = None, message: str = "") -> None:
        with self._lock:
            others = self._record.filled
            if filled is not None:
                others = tuple(each for each in others if each.datadir != filled.datadir)
                others += (filled,)
            self._record = dataclasses.replace(
                self._record,
                filled=others,
                state=messages.WarmUpState(
                    state=state,
                    loaded=sum(each.loaded for each in others),
                    total=sum(each.total for each in others),
                    message=message[:_MAX_MESSAGE],
                ),
            )
            self._save()

    def _end(self, state: str, code: str | None, message: str) -> None:
        with self._lock:
            self._record = dataclasses.replace(
                self._record,
                state=dataclasses.replace(
                    self._record.state,
                    state=state,
                    code=code,
                    seconds=changes.boot_clock() - self._record.begun,
                    message=message[:_MAX_MESSAGE],
                ),
            )
            self._save()

    def _save(self) -> None:
        try:
            ledger.write_record(self._path, self._record)
        except OSError as error:
            LOG.warning("An agent that comes after this one begins anew: %s", error)


def _key(server: processes.ServerProcess) -> _Key:
    return server.pid, server.start_time


def _settings(database: Database, per_second: int) -> dict[str, str]:
    """What is changed in a server meanwhile."""
    # While clients work a server pauses after twice that many pages of a list
    wanted = per_second // 2 + 1
    limits = database.variables([flushing.CAPACITY, flushing.CAPACITY_MAX])
    return {
        name: str(wanted)
        for name in (flushing.CAPACITY_MAX, flushing.CAPACITY)
        if name in limits and int(limits[name]) < wanted
    }
