# SPDX-License-Identifier: Apache-2.0
"""All sessions of a host: who asks for them, who waits, who is looked after; over restarts, too.

A thread looks after them a few times a second.
"""

import collections
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from nova_dmigrate import exception
from nova_dmigrate.host import turns
from nova_dmigrate.host.bandwidth import Bandwidth
from nova_dmigrate.host.capacity import Limits, Load, shortage
from nova_dmigrate.host.qemu_files import QemuFiles
from nova_dmigrate.host.session import Session, SessionSettings
from nova_dmigrate.host.store import Record, Store
from nova_dmigrate.host.totals import Totals
from nova_dmigrate.rpc.host_messages import DRAINING, RELAY_BUSY, STOPPING, SessionState

LOG = logging.getLogger(__name__)

_TICK = 0.1
_PRUNE_INTERVAL = 3600.0
#: Seconds after which a service that could not be asked counts as one that nobody can ask.
_OUTAGE = 6.0


@dataclass(frozen=True)
class Figures:
    """A moment of a host.

    :ivar sessions: how many there are, by role and state.
    :ivar totals: of sessions that have ended and of those that have not.
    """

    sessions: collections.Counter[tuple[str, str]]
    totals: Totals
    limits: Limits
    draining: bool


class Sessions:
    """The sessions by their identifiers, and the lock for them and all that they are. Methods may
    be called by any thread.

    :param seen: tells when the service could be asked last, in monotonic seconds.
    """

    def __init__(
        self, settings: SessionSettings, store: Store, seen: Callable[[], float] = lambda: math.inf
    ) -> None:
        self._settings = settings
        self._seen = seen
        self._store = store
        self._lock = threading.RLock()
        self._sessions: dict[str, Session] = {}
        self._qemu_files = QemuFiles(settings.owner)
        self._bandwidth = Bandwidth(settings.limits, self._lock)
        self._totals = Totals()
        self._draining = False
        self._prune_at = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sessions", daemon=True)

    # The life of the service

    def start(self) -> None:
        """Take over what an earlier service has left, and look after it from now on.

        Each session gets a new lease: whoever wants it has time to say so.
        """
        with self._lock:
            for record in self._store.load():
                self._sessions[record.session_id] = session = self._session(record)
                session.adopt()
        self._thread.start()

    def drain(self) -> None:
        """Take no new session, and give up those that are queued."""
        with self._lock:
            self._draining = True
            for session in turns.queue(self._sessions.values()):
                session.finish("failed", STOPPING)

    def wait_until_idle(self, seconds: float, hurry: Callable[[], bool]) -> bool:
        """Wait until no relay runs; whether that was so within ``seconds``, or before ``hurry``."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end and not hurry():
            time.sleep(_TICK)
        return not self.running

    def stop(self) -> None:
        """Look after the sessions no more. Their relays go on."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def running(self) -> int:
        """How many relays run."""
        with self._lock:
            return sum(session.active for session in self._sessions.values())

    @property
    def queued(self) -> int:
        """How many wait."""
        with self._lock:
            return len(turns.queue(self._sessions.values()))

    def figures(self) -> Figures:
        """How many there are, and what they have done."""
        with self._lock:
            sessions = list(self._sessions.values())
            totals = self._totals.copy()
            for session in sessions:
                if session.active:
                    totals.add(session.record.role, session.progress)
            return Figures(
                collections.Counter((each.record.role, each.record.state) for each in sessions),
                totals,
                self._settings.limits,
                self._draining,
            )

    # Requests

    def open(self, record: Record) -> SessionState:
        """Begin a session, or find the one that an earlier request for the same has begun.

        :raises RequestRefused: the host takes none, or the identifier belongs to another one.
        """
        with self._lock:
            known = self._sessions.get(record.session_id)
            if known is not None:
                if (known.record.migration_id, known.record.role) != (
                    record.migration_id,
                    record.role,
                ):
                    raise exception.RequestRefused(
                        reason="there is another session of that identifier", code="in-use"
                    )
                return self._told(known)
            # A directory goes with its session, whatever is in it
            place = record.directory or record.socket
            if any(place in each.record.places for each in self._sessions.values()):
                raise exception.RequestRefused(
                    reason=f"{place} belongs to another session", code="in-use"
                )
            lack = shortage(self._settings.limits, (), Load(record.role, record.guest_memory))
            if lack is not None:
                raise exception.RequestRefused(
                    reason=f"there is never room for that guest: {lack}", code="no-memory"
                )
            if self._draining:
                raise exception.RequestRefused(reason=STOPPING, code=DRAINING)
            record.lease_seconds = min(record.lease_seconds, self._settings.max_lease)
            record.wait_seconds = min(record.wait_seconds, self._settings.queue_timeout)
            session = self._session(record)
            try:
                session.keep()
            except OSError as error:
                session.remove()
                raise exception.RequestRefused(
                    reason=f"its state cannot be kept: {error}", code="no-state"
                ) from error
            self._sessions[record.session_id] = session
            self._serve_queue()
            return self._told(session)

    def session(self, session_id: str) -> SessionState:
        """How far a session is.

        :raises RequestRefused: there is no such session.
        """
        session = self._find(session_id)
        session.ask_progress()
        with self._lock:
            session.look()
            return self._told(session)

    def renew(self, session_id: str, lease_seconds: float) -> SessionState:
        """The same, and keep the session.

        :raises RequestRefused: there is no such session.
        """
        with self._lock:
            self._find(session_id).renew(lease_seconds)
        return self.session(session_id)

    def use_map(self, session_id: str, buffer_map: str, memory_layout: str) -> SessionState:
        """Have the relay load a map that has come only now.

        :raises RequestRefused: there is no such session, or its relay takes none, or has not
            answered yet.
        """
        session = self._find(session_id)
        if not session.offer_map(buffer_map, memory_layout):
            with self._lock:
                session.look()
                if session.active and session.record.role == "source":
                    raise exception.RequestRefused(
                        reason="the relay does not answer", code=RELAY_BUSY
                    )
            raise exception.RequestRefused(reason="the relay takes no map", code="no-relay")
        with self._lock:
            return self._told(session)

    def close(self, session_id: str) -> SessionState:
        """End a session and remove what belongs to it; its last state.

        One whose relay only QEMU may end runs on, and is removed when that has ended.

        :raises RequestRefused: there is no such session.
        """
        session = self._find(session_id)
        with self._lock:
            # First: it may be its turn at any moment, and there would be a relay to end
            if session.queued:
                session.finish("cancelled", "the session was closed")
        session.end()
        with self._lock:
            session.look()
            state = self._told(session)
            self._forget(session)
        return state

    # Looking after them

    def _run(self) -> None:
        while not self._stopped.wait(_TICK):
            try:
                self._tick()
                if time.monotonic() >= self._prune_at:
                    self._prune_at = time.monotonic() + _PRUNE_INTERVAL
                    self._store.prune(self._settings.summaries)
            except Exception:
                LOG.exception("Unexpected error while looking after the sessions")

    def _tick(self) -> None:
        now, seen = time.monotonic(), self._seen()
        with self._lock:
            sessions = list(self._sessions.values())
            if now > seen + _OUTAGE:
                for session in sessions:
                    session.hold(now)
            lapsed = [session for session in sessions if session.lapsed(now, seen)]
        for session in lapsed:
            session.ask_whether_it_carries()
        with self._lock:
            for session in sessions:
                session.look()
                # It may have been renewed meanwhile
                has_lapsed = session in lapsed and session.lapsed(now, seen)
                session.enforce(now, has_lapsed)
                if has_lapsed:
                    self._forget(session)
            self._serve_queue()
        self._bandwidth.share(self._sessions.values())

    def _serve_queue(self) -> None:
        turns.serve(self._sessions.values(), self._settings.limits)

    def _forget(self, session: Session) -> None:
        """Remove a session that has ended."""
        # If not even SIGKILL has ended its relay, that hangs in the kernel, and is looked after
        if not session.active:
            self._sessions.pop(session.record.session_id, None)
            session.remove()
            # There is one more summary now
            self._prune_at = time.monotonic()

    # By identifier

    def _session(self, record: Record) -> Session:
        return Session(record, self._settings, self._store, self._qemu_files, self._totals)

    def _find(self, session_id: str) -> Session:
        with self._lock:
            session = self._sessions.get(session_id)
        if session is None:
            raise exception.RequestRefused(
                reason=f"there is no session {session_id}", code="unknown-session"
            )
        return session

    def _told(self, session: Session) -> SessionState:
        return session.told(turns.position(session, self._sessions.values()))
