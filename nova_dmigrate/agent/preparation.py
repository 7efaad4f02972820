# SPDX-License-Identifier: Apache-2.0
"""Lowers the share of dirty pages before a migration, and puts back every setting afterwards.

Whatever happens: the requester vanishes (the lease ends), the agent is killed (the ledger is on
disk before the first change), the server is restarted (its settings are its own again, nothing is
put back), somebody else changes a setting meanwhile (theirs stays). Only when the ledger itself
is lost can nothing be put back; that is told, and nothing is prepared, until somebody has seen
to it: values that we have lowered would be taken for the server's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence

from nova_dmigrate import exception
from nova_dmigrate.agent import changes, flushing, ledger
from nova_dmigrate.agent.database import Database, Login
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.rpc import messages

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparationSettings:
    """``max_flush_bytes``: the most that a server is asked to write in a second, unless its own
    settings allow more. ``max_lease_seconds``: the longest lease. ``max_seconds``: the longest that
    settings are held, however often the lease is renewed or taken over.
    """

    max_flush_bytes: int = 200 << 20
    max_lease_seconds: float = 600.0
    max_seconds: float = 7200.0


class Preparation:
    """The one preparation that a guest has at a time. For several threads.

    A new one takes over from another that is still held: its requester has probably gone, and
    what was changed is remembered with the values that were there at first.

    :param logins: the servers that run now.
    :param login: how to reach the server at a socket, whether it can be found or not.
    :param connect: makes the connection to a server; raises ServerError.
    """

    def __init__(
        self,
        file: ledger.LedgerFile,
        logins: Callable[[], Sequence[Login]],
        login: Callable[[str], Login],
        connect: Callable[[Login], Database],
        settings: PreparationSettings | None = None,
        clock: Callable[[], float] = changes.boot_clock,
        boot_id: str | None = None,
    ) -> None:
        self._file = file
        self._logins = logins
        self._login = login
        self._connect = connect
        self._settings = settings or PreparationSettings()
        self._clock = clock
        self._boot_id = boot_id or changes.read_boot_id()
        self._lock = threading.Lock()
        self._held: ledger.Ledger | None = None
        self._trouble = ""
        self._closed = False

    def recover(self) -> None:
        """Take over what an agent that was killed has left.

        Its lease goes on. What it had not finished is put back at the next `tick`.
        """
        with self._lock:
            left = self._file.load()
            if left is not None and left.boot_id != self._boot_id:
                LOG.info("The guest was restarted since the last preparation: nothing to restore")
                self._file.remove()
                left = None
            if left is not None:
                LOG.info("Took over preparation %s of an earlier agent", left.lease_id)
                if not all(entry.applied for entry in left.entries):
                    left = dataclasses.replace(left, deadline=0.0)
            self._held = left

    def prepare(self, arguments: messages.PrepareArguments) -> messages.LeaseState:
        """Change the settings so that the servers write their dirty pages. Returns at once.

        :raises ServerNotFound: if there is no server.
        What one server refuses is no trouble of the others: it is as before, and told.

        :raises ServerError: if none can be asked, or all refuse; all is as before then.
        :raises AgentError: with code ``lost-ledger`` while an earlier one cannot be put back, with
            code ``stopping`` when the agent is about to end.
        """
        with self._lock:
            if self._closed:
                raise exception.AgentError(reason="it is being stopped", code="stopping")
            self._check_lost()
            self._end_if_due()
            databases, failures = self._open_all()
            try:
                return self._prepare(arguments, databases, failures)
            finally:
                for database in databases:
                    database.close()

    def renew(self, lease_id: str, seconds: float) -> messages.LeaseState:
        """Prolong a lease, and tell how far the preparation is.

        :raises AgentError: with code ``unknown-lease`` if it is not, or not any more, held.
        """
        with self._lock:
            held = self._held
            if held is None or held.lease_id != lease_id or self._clock() >= held.deadline:
                raise exception.AgentError(
                    reason=f"lease {lease_id} is not held (any more)", code="unknown-lease"
                )
            deadline = self._deadline(seconds, held.ends)
            self._held = dataclasses.replace(held, deadline=deadline)
            self._file.save(self._held)
            return self._state(self._held)

    def restore(self, lease_id: str | None = None) -> messages.LeaseState:
        """Put everything back; of a lease that is not held nothing is left to do.

        :param lease_id: None for whatever is held.
        :raises AgentError: with code ``lost-ledger`` if it is not known what was changed.
        """
        with self._lock:
            held = self._held
            if held is None or lease_id not in (None, held.lease_id):
                self._check_lost()
                return _idle(lease_id or "none", "nothing of this lease is changed")
            self._restore()
            return self._state(held) if self._held else _idle(held.lease_id, "restored")

    def tick(self) -> None:
        """End a lease that has run out. To be called about once a second."""
        with self._lock:
            self._end_if_due()

    def close(self) -> None:
        """Put everything back, and refuse to prepare from now on."""
        with self._lock:
            self._closed = True
            if self._held is not None:
                self._restore()

    def findings(self) -> list[Finding]:
        """What the operator has to put right by hand."""
        lost = self._file.lost()
        if not lost:
            return []
        return [Finding("lost-ledger", Severity.PROBLEM, changes.loss(lost, flushing.ORDER))]

    @property
    def active(self) -> bool:
        """Whether a setting may still be ours."""
        return self._held is not None

    def _check_lost(self) -> None:
        for found in self.findings():
            raise exception.AgentError(reason=found.message, code=found.code)

    # Preparing

    def _open_all(self) -> tuple[list[Database], list[exception.ServerError]]:
        databases: list[Database] = []
        failures: list[exception.ServerError] = []
        for login in self._logins():
            with _noted(failures):
                databases.append(self._open(login))
        if not databases:
            raise failures[0] if failures else exception.ServerNotFound(reason="none runs here")
        return databases, failures

    def _open(self, login: Login) -> Database:
        return changes.open_server(self._connect, login)

    def _prepare(
        self,
        arguments: messages.PrepareArguments,
        databases: Sequence[Database],
        failures: list[exception.ServerError],
    ) -> messages.LeaseState:
        plans: list[tuple[Database, ledger.Entry]] = []
        for database in databases:
            with _noted(failures):
                plans.append((database, self._plan(database, arguments.seconds)))
        if not plans:
            raise failures[-1]
        planned = {entry.socket for _, entry in plans}
        # A server that cannot be reached now keeps its entry: it is restored when it can be
        kept = [entry for entry in self._entries() if entry.socket not in planned]
        now = self._clock()
        ends = now + self._settings.max_seconds
        if self._held is not None and now < self._held.deadline:
            # Taking over a lease makes it no longer than renewing it
            ends = self._held.ends
        self._held = ledger.make(
            boot_id=self._boot_id,
            lease_id=uuid.uuid4().hex,
            deadline=self._deadline(arguments.lease_seconds, ends),
            ends=ends,
            flush_until=now + arguments.seconds,
            dirty_share=arguments.dirty_share,
            entries=(*kept, *(entry for _, entry in plans)),
        )
        self._trouble = ""
        try:
            self._file.save(self._held)
            applied: list[ledger.Entry] = []
            left: list[ledger.Entry] = []
            for database, entry in plans:
                with _noted(failures):
                    applied.append(changes.apply(database, entry))
                    continue
                if self._restore_server(entry) is not None:
                    left.append(entry)
            if not applied:
                raise failures[-1]
            self._held = dataclasses.replace(self._held, entries=(*kept, *left, *applied))
            self._file.save(self._held)
        except (exception.ServerError, OSError):
            self._restore()
            raise
        return self._state(self._held, "; ".join(str(error) for error in failures))

    def _entries(self) -> tuple[ledger.Entry, ...]:
        return self._held.entries if self._held is not None else ()

    def _plan(self, database: Database, seconds: float) -> ledger.Entry:
        """What to change in one server; what is changed already keeps its original value."""
        identity = changes.identify(database, self._clock())
        current = database.variables(flushing.ORDER)
        originals = dict(current)
        ours = {}
        for change in self._held_changes(database, identity):
            shown = current.get(change.name)
            if shown is not None and flushing.equal(shown, change.ours):
                originals[change.name] = change.original
                ours[change.name] = change.ours
        pool = database.pool()
        # What needs no change by itself any more, but has one, keeps it until the end
        ours.update(flushing.plan(originals, pool, seconds, self._settings.max_flush_bytes))
        return ledger.Entry(
            socket=database.login.socket,
            identity=identity,
            applied=False,
            changes=tuple(
                ledger.Change(name, originals[name], ours[name])
                for name in flushing.ORDER
                if name in ours
            ),
        )

    def _held_changes(
        self, database: Database, identity: ledger.Identity
    ) -> tuple[ledger.Change, ...]:
        """What is changed already in this run of a server."""
        for entry in self._entries():
            if entry.socket == database.login.socket and changes.same_run(entry.identity, identity):
                return entry.changes
        return ()

    def _deadline(self, seconds: float, ends: float) -> float:
        return min(self._clock() + min(seconds, self._settings.max_lease_seconds), ends)

    # Restoring

    def _end_if_due(self) -> None:
        if self._held is not None and self._clock() >= self._held.deadline:
            if not self._trouble:
                LOG.info("Lease %s has ended: settings are restored", self._held.lease_id)
            self._restore()

    def _restore(self) -> None:
        """Put back what can be; what cannot be now stays in the ledger for the next attempt."""
        assert self._held is not None
        left, reasons = [], []
        for entry in self._held.entries:
            reason = self._restore_server(entry)
            if reason is not None:
                left.append(entry)
                reasons.append(reason)
        trouble = "; ".join(reasons)
        if trouble and trouble != self._trouble:
            LOG.error("Settings cannot be restored yet, it is tried again: %s", trouble)
        self._trouble = trouble
        if not left:
            self._file.remove()
            self._held = None
            return
        # Whoever renews this lease now is too late
        self._held = dataclasses.replace(self._held, deadline=0.0, entries=tuple(left))
        self._file.save(self._held)

    def _restore_server(self, entry: ledger.Entry) -> str | None:
        """None when nothing in that server is ours any more, else why it still is."""
        return changes.restore(entry, self._connect, self._login(entry.socket), self._clock())

    # Telling

    def _state(self, held: ledger.Ledger, message: str = "") -> messages.LeaseState:
        now = self._clock()
        share, problem = self._dirty_share(held)
        reached = share <= held.dirty_share
        if now >= held.deadline or self._trouble:
            state = "restoring"
        else:
            state = "ready" if reached or now >= held.flush_until else "flushing"
        return messages.LeaseState(
            lease_id=held.lease_id,
            state=state,
            reached=reached,
            dirty_share=share,
            remaining=max(0.0, held.deadline - now),
            message="; ".join(filter(None, (message, problem, self._trouble)))[:1000],
        )

    def _dirty_share(self, held: ledger.Ledger) -> tuple[float, str]:
        """Share of dirty pages over all prepared servers, 1 where that cannot be asked."""
        dirty = data = 0
        problems = []
        for entry in held.entries:
            try:
                database = self._open(self._login(entry.socket))
                try:
                    pool = database.pool()
                finally:
                    database.close()
            except (exception.ServerError, OSError) as error:
                problems.append(str(error))
                continue
            dirty += pool.dirty
            data += pool.data
        if problems:
            return 1.0, "; ".join(problems)
        return (min(1.0, dirty / data) if data else 0.0), ""


@contextlib.contextmanager
def _noted(failures: list[exception.ServerError]) -> Iterator[None]:
    """Go on with the other servers when one fails."""
    try:
        yield
    except exception.ServerError as error:
        LOG.warning("Not prepared: %s", error)
        failures.append(error)


def _idle(lease_id: str, message: str) -> messages.LeaseState:
    return messages.LeaseState(lease_id, "idle", True, 0.0, 0.0, message)
