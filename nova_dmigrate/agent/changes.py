# SPDX-License-Identifier: Apache-2.0
"""Changing settings of a server, and putting them back.

What is changed is in a ledger on disk before it is done. Put back is what is still ours, in the run
of the server in which it was changed: after a restart its settings are its own again, and what
somebody else has set meanwhile stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.agent import flushing, ledger, processes
from nova_dmigrate.agent.database import Database, Login
from nova_dmigrate.findings import Finding, Severity

LOG = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Uptime is in whole seconds, and follows the wall clock
_BEGAN_TOLERANCE = 30.0

# Makes a connection; raises ServerError
Connect = Callable[[Login], Database]


def boot_clock() -> float:
    """Seconds since boot, also those in which the guest was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_boot_id() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()


def open_server(connect: Connect, login: Login) -> Database:
    """A connection.

    :raises ServerError: if there is none, whatever the reason.
    """
    try:
        return connect(login)
    except OSError as error:
        raise exception.ServerError(server=login.socket, reason=str(error), code="gone") from error


def identify(database: Database, now: float) -> ledger.Identity:
    """Which run of a server it is. ``now``: of `boot_clock`."""
    if database.pid is not None:
        try:
            started = processes.read_start_time(database.pid)
            return ledger.Identity(pid=database.pid, start_time=started)
        except (OSError, ValueError):
            pass
    uptime = float(database.status(["Uptime"]).get("Uptime", 0))
    return ledger.Identity(began=now - uptime)


def same_run(one: ledger.Identity, other: ledger.Identity) -> bool:
    if one.pid is not None or other.pid is not None:
        return (one.pid, one.start_time) == (other.pid, other.start_time)
    return abs((one.began or 0) - (other.began or 0)) < _BEGAN_TOLERANCE


def apply(database: Database, entry: ledger.Entry) -> ledger.Entry:
    """Make the changes; the entry with the values that the server shows then."""
    for change in entry.changes:
        database.set_global(change.name, change.ours)
    shown = database.variables([change.name for change in entry.changes])
    return dataclasses.replace(
        entry,
        applied=True,
        changes=tuple(
            dataclasses.replace(change, ours=shown.get(change.name, change.ours))
            for change in entry.changes
        ),
    )


def restore(entry: ledger.Entry, connect: Connect, login: Login, now: float) -> str | None:
    """None when nothing in that server is ours any more, else why it still is.

    :param now: of `boot_clock`.
    """
    try:
        database = open_server(connect, login)
    except exception.ServerError as error:
        if entry.identity.pid is not None and not _runs(entry.identity):
            LOG.info("%s has ended: nothing to restore", entry.socket)
            return None
        return str(error)
    try:
        if not same_run(entry.identity, identify(database, now)):
            LOG.info("%s was restarted: its settings are its own again", entry.socket)
            return None
        current = database.variables([change.name for change in entry.changes])
        for change in reversed(entry.changes):
            _put_back(database, change, current.get(change.name), entry.applied)
    except (exception.ServerError, OSError) as error:
        return str(error)
    finally:
        database.close()
    LOG.info("%s: settings restored", entry.socket)
    return None


def loss(files: Sequence[Path], names: Sequence[str]) -> str:
    """What to do about ledgers that cannot be read. ``names``: of variables they may speak of."""
    return (
        "the note of what an earlier agent has changed cannot be read, so that nothing of it "
        f"can be put back. See to {', '.join(names)} of the database servers (they are "
        f"right after a restart of the server), then remove {', '.join(map(str, files))}"
    )


class Borrowed:
    """Settings that are another's for one piece of work at a time. For several threads.

    :param names: the variables, in the order in which they can be set.
    :param login: how to reach the server at a socket, whether it can be found or not.
    """

    def __init__(
        self,
        file: ledger.LedgerFile,
        names: Sequence[str],
        login: Callable[[str], Login],
        connect: Connect,
        boot_id: str | None = None,
    ) -> None:
        self._file = file
        self._names = names
        self._login = login
        self._connect = connect
        self._boot_id = boot_id or read_boot_id()
        self._lock = threading.Lock()
        self._held: ledger.Ledger | None = None

    def recover(self) -> None:
        """Put back what an agent that was killed has left, or try to."""
        with self._lock:
            self._held = self._file.load()
            if self._held is not None and self._held.boot_id != self._boot_id:
                self._file.remove()
                self._held = None
            self._put_back()

    def put_back(self) -> str | None:
        """Put back what is not yet; None when nothing is left to do, else why there is."""
        with self._lock:
            return self._put_back()

    def findings(self) -> list[Finding]:
        """What the operator has to put right by hand."""
        lost = self._file.lost()
        return [Finding("lost-ledger", Severity.PROBLEM, loss(lost, self._names))] if lost else []

    @contextlib.contextmanager
    def changed(self, database: Database, values: Mapping[str, str]) -> Iterator[None]:
        """Set variables, those that the server has, for the duration of the context.

        :raises ServerError: if the server refuses; all is as before then.
        :raises AgentError: with code ``lost-ledger`` or ``not-restored`` while an earlier change
            is not put back.
        """
        with self._lock:
            self._begin(database, values)
        try:
            yield
        finally:
            reason = self.put_back()
            if reason is not None:
                LOG.warning("Settings cannot be restored yet, it is tried again: %s", reason)

    def _begin(self, database: Database, values: Mapping[str, str]) -> None:
        for found in self.findings():
            raise exception.AgentError(reason=found.message, code=found.code)
        reason = self._put_back()
        if reason is not None:
            raise exception.AgentError(
                reason=f"earlier changes are not put back yet: {reason}", code="not-restored"
            )
        originals = database.variables(list(values))
        entry = ledger.Entry(
            socket=database.login.socket,
            identity=identify(database, boot_clock()),
            applied=False,
            changes=tuple(
                ledger.Change(name, originals[name], values[name])
                for name in self._names
                if name in originals and not flushing.equal(originals[name], values[name])
            ),
        )
        self._save(entry)
        try:
            self._save(apply(database, entry))
        except BaseException:
            self._put_back()
            raise

    def _save(self, entry: ledger.Entry) -> None:
        self._held = ledger.make(
            boot_id=self._boot_id,
            lease_id="borrowed",
            deadline=0.0,
            ends=0.0,
            flush_until=0.0,
            dirty_share=0.0,
            entries=(entry,),
        )
        self._file.save(self._held)

    def _put_back(self) -> str | None:
        if self._held is None:
            return None
        for entry in self._held.entries:
            reason = restore(entry, self._connect, self._login(entry.socket), boot_clock())
            if reason is not None:
                return reason
        self._file.remove()
        self._held = None
        return None


def _put_back(database: Database, change: ledger.Change, current: str | None, exact: bool) -> None:
    """Put one setting back, unless it is not ours.

    :param exact: the value that is ours is known for certain; else any but the original is.
    """
    if current is None or flushing.equal(current, change.original):
        return
    if exact and not flushing.equal(current, change.ours):
        LOG.warning(
            "%s: %s is now %s, which is not what the agent has set (%s): it stays",
            database.login.socket,
            change.name,
            current,
            change.ours,
        )
        return
    database.set_global(change.name, change.original)


def _runs(identity: ledger.Identity) -> bool:
    try:
        return processes.read_start_time(identity.pid or 0) == identity.start_time
    except (OSError, ValueError):
        return False
