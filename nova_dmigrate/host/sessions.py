# SPDX-License-Identifier: Apache-2.0
"""The sessions of a host: queued, running, ended; kept by leases, and over restarts of the service.

A thread looks after them a few times a second. What it, or a request, has to wait for (a relay's
answer, a relay's end) is waited for without the lock.
"""

import contextlib
import ipaddress
import json
import logging
import math
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.host.capacity import Claim, Limits, Rates, shares, shortage
from nova_dmigrate.host.relays import (
    Identity,
    RelayFiles,
    RelayProcess,
    Report,
    read_events,
    read_summary,
)
from nova_dmigrate.host.store import Record, Store
from nova_dmigrate.rpc.host_messages import FINAL, MAX_PROGRESS, SessionState
from nova_dmigrate.stream.format import POSTCOPY_STARTED

LOG = logging.getLogger(__name__)

_TICK = 0.1
_PRUNE_INTERVAL = 3600.0
#: Seconds for a relay's answer.
_ASK_TIMEOUT = 1.0
#: Seconds that a relay which was started may take to be ready.
_START_PATIENCE = 60.0
#: Seconds for the last steps of a relay that has delivered, or that has just lost its QEMU.
_ENDING_PATIENCE = 2.0
#: Seconds from SIGTERM to SIGKILL.
_TERM_PATIENCE = 3.0
_MAX_MESSAGE = 1000
#: Stages in which a relay has nothing to finish.
_IDLE_STAGES = ("preparing", "waiting", "connected")


@dataclass(frozen=True)
class SessionSettings:
    """Seconds, days.

    :ivar command: what starts a relay.
    :ivar address: where others reach a relay that listens everywhere.
    :ivar owner: user and group of what QEMU has to reach, -1 for the service's own.
    """

    command: Sequence[str]
    limits: Limits
    address: str
    queue_timeout: float = 300.0
    max_lease: float = 60.0
    summary_days: float = 30.0
    owner: tuple[int, int] = (-1, -1)


class _Session:
    """A record, and what is known of it only while the service runs."""

    def __init__(self, record: Record, files: RelayFiles) -> None:
        now = time.monotonic()
        self.record = record
        self.files = files
        self.process: RelayProcess | None = None
        self.lease_end = now + record.lease_seconds
        self.queue_end = now + record.wait_seconds
        self.start_end = now + _START_PATIENCE
        self.kill_at: float | None = None
        self.ready = False
        self.rates: Rates | None = None
        self.progress: Report = {}

    @property
    def active(self) -> bool:
        return self.record.state in ("starting", "running")

    @property
    def claim(self) -> Claim:
        caps = Rates(self.record.network_bandwidth, self.record.volume_bandwidth)
        return Claim(self.record.session_id, self.record.role, caps)


class Sessions:
    """All sessions of a host. Methods may be called by any thread."""

    def __init__(self, settings: SessionSettings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._lock = threading.RLock()
        # The limits of running relays are changed by one thread at a time
        self._limiting = threading.Lock()
        self._sessions: dict[str, _Session] = {}
        self._draining = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sessions", daemon=True)

    # The life of the service

    def start(self) -> None:
        """Take over what an earlier service has left, and look after it from now on.

        Each session gets a new lease: whoever wants it has time to say so.
        """
        with self._lock:
            for record in self._store.load():
                session = _Session(record, self._store.files(record.session_id))
                self._sessions[record.session_id] = session
                if session.active:
                    self._adopt(session)
        self._thread.start()

    def drain(self) -> None:
        """Take no new session, and give up those that are queued."""
        with self._lock:
            self._draining = True
            for session in self._queue():
                self._finish(session, "failed", "the host service is being stopped")

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
            return len(self._queue())

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
                return self._state(known)
            if any(each.record.socket == record.socket for each in self._sessions.values()):
                raise exception.RequestRefused(
                    reason=f"{record.socket} belongs to another session", code="in-use"
                )
            if self._draining:
                raise exception.RequestRefused(
                    reason="the host service is being stopped", code="draining"
                )
            record.lease_seconds = min(record.lease_seconds, self._settings.max_lease)
            record.wait_seconds = min(record.wait_seconds, self._settings.queue_timeout)
            session = _Session(record, self._store.files(record.session_id))
            try:
                self._store.save(record)
                self._make_directory(record)
            except OSError as error:
                self._remove(session)
                raise exception.RequestRefused(
                    reason=f"its state cannot be kept: {error}", code="no-state"
                ) from error
            self._sessions[record.session_id] = session
            self._serve_queue()
            return self._state(session)

    def session(self, session_id: str) -> SessionState:
        """How far a session is.

        :raises RequestRefused: there is no such session.
        """
        session = self._find(session_id)
        self._ask_progress(session)
        with self._lock:
            return self._state(session)

    def renew(self, session_id: str, lease_seconds: float) -> SessionState:
        """The same, and keep the session.

        :raises RequestRefused: there is no such session.
        """
        with self._lock:
            session = self._find(session_id)
            lease_seconds = min(lease_seconds, self._settings.max_lease)
            session.lease_end = time.monotonic() + lease_seconds
            if lease_seconds != session.record.lease_seconds:
                session.record.lease_seconds = lease_seconds
                self._save(session)
        return self.session(session_id)

    def use_map(self, session_id: str, buffer_map: str, memory_layout: str) -> SessionState:
        """Have the relay load a map that has come only now.

        :raises RequestRefused: there is no such session, or its relay takes none.
        """
        session = self._find(session_id)
        answer = None
        process = session.process
        if process is not None and session.record.role == "source":
            answer = process.ask(
                "map", _ASK_TIMEOUT, buffer_map=buffer_map, memory_layout=memory_layout
            )
        if answer is None:
            raise exception.RequestRefused(reason="the relay takes no map", code="no-relay")
        with self._lock:
            return self._state(session)

    def close(self, session_id: str) -> SessionState:
        """End a session and remove what belongs to it; its last state.

        :raises RequestRefused: there is no such session.
        """
        session = self._find(session_id)
        process = session.process
        if process is not None and session.active:
            self._ask_progress(session)
            if session.progress and session.progress.get("stage") not in _IDLE_STAGES:
                process.wait(_ENDING_PATIENCE)
            self._end(process)
        with self._lock:
            if session.record.state == "queued":
                self._finish(session, "cancelled", "the session was closed")
            self._look(session)
            state = self._state(session)
            self._forget(session)
        return state

    # Looking after them

    def _run(self) -> None:
        pruned = float("-inf")
        while not self._stopped.wait(_TICK):
            try:
                self._tick()
                if time.monotonic() > pruned + _PRUNE_INTERVAL:
                    pruned = time.monotonic()
                    self._store.prune(self._settings.summary_days)
            except Exception:
                LOG.exception("Unexpected error while looking after the sessions")

    def _tick(self) -> None:
        now = time.monotonic()
        with self._lock:
            for session in list(self._sessions.values()):
                self._look(session)
                self._enforce(session, now)
            self._serve_queue()
        self._limit()

    def _look(self, session: _Session) -> None:
        """Learn what has become of the relay. With the lock held."""
        if not session.active:
            return
        # In this order: what it has told at its end is in the file when it is gone
        alive = session.process is not None and session.process.alive()
        events = read_events(session.files.events)
        record = session.record
        for event in events:
            if event.get("event") == "ready":
                session.ready = True
                if "port" in event:
                    record.host, record.port = self._reachable(event["host"]), event["port"]
        if not alive:
            self._settle(session, events)

    def _reachable(self, host: str) -> str:
        """Where others reach a relay that listens on ``host``."""
        return self._settings.address if ipaddress.ip_address(host).is_unspecified else host

    def _settle(self, session: _Session, events: Sequence[Report]) -> None:
        """The relay is gone: how has it ended?"""
        summary = read_summary(session.files.summary)
        told = summary or next((each for each in events if each.get("event") == "end"), None)
        session.progress = summary or {}
        state, reason = "failed", "the relay was killed"
        if told is not None and told.get("state") in FINAL:
            state, reason = told["state"], told.get("reason") or ""
        self._finish(session, state, str(reason))

    def _enforce(self, session: _Session, now: float) -> None:
        """Leases, time limits. With the lock held."""
        record = session.record
        if session.kill_at is not None:
            if now > session.kill_at and session.process is not None:
                session.process.signal(signal.SIGKILL)
        elif record.state == "queued":
            if now > session.lease_end:
                self._finish(session, "cancelled", "nobody has asked for it any more")
            elif now > session.queue_end:
                self._finish(session, "failed", f"no room in time: {record.message}")
        elif session.active and now > session.lease_end:
            if not self._in_post_copy(session):
                LOG.warning(
                    "Instance %s: the %s relay is ended, nobody has asked for it any more",
                    record.instance,
                    record.role,
                )
                self._terminate(session, now)
        elif record.state == "starting" and now > session.start_end:
            self._terminate(session, now)
        if not session.active and now > session.lease_end:
            self._forget(session)

    def _terminate(self, session: _Session, now: float) -> None:
        if session.process is not None:
            session.process.signal(signal.SIGTERM)
            session.kill_at = now + _TERM_PATIENCE

    def _in_post_copy(self, session: _Session) -> bool:
        """Whether the guest already runs at the destination and needs the relay to go on."""
        answer = session.process.ask("progress", _ASK_TIMEOUT) if session.process else None
        return answer is not None and str(answer.get("pass_through")).startswith(POSTCOPY_STARTED)

    def _serve_queue(self) -> None:
        """Start what there is room for, each role in the order of its queue. With the lock held."""
        blocked = set()
        for session in self._queue():
            record = session.record
            running = [each.record.role for each in self._sessions.values() if each.active]
            lack = shortage(self._settings.limits, running, record.role)
            if lack is None and record.role not in blocked:
                self._spawn(session)
            else:
                record.message = lack or "others wait in front of it"
                blocked.add(record.role)

    def _queue(self) -> list[_Session]:
        queued = [each for each in self._sessions.values() if each.record.state == "queued"]
        return sorted(queued, key=lambda each: each.record.created)

    # Relays

    def _spawn(self, session: _Session) -> None:
        record = session.record
        description, record.description = record.description, None
        record.state, record.message = "starting", ""
        session.start_end = time.monotonic() + _START_PATIENCE

        def note(identity: Identity) -> None:
            record.pid, record.started = identity.pid, identity.started
            self._store.save(record)

        try:
            session.process = RelayProcess.spawn(
                self._settings.command, description or {}, session.files, note
            )
        except OSError as error:
            self._finish(session, "failed", f"the relay cannot be started: {error}")
            return
        LOG.info(
            "Instance %s: %s relay of migration %s started, process %s",
            record.instance,
            record.role,
            record.migration_id,
            record.pid,
        )

    def _adopt(self, session: _Session) -> None:
        identity = session.record.identity
        if identity is not None:
            session.process = RelayProcess.adopt(identity, session.files)
        if session.process is not None:
            LOG.info(
                "Instance %s: the %s relay, process %s, is taken over",
                session.record.instance,
                session.record.role,
                session.record.pid,
            )
        self._look(session)

    def _limit(self) -> None:
        """Give each relay that is ready its share, and declare those running that have it."""
        with self._limiting:
            with self._lock:
                ready = [each for each in self._sessions.values() if each.active and each.ready]
                rates = shares(self._settings.limits, [each.claim for each in ready])
                changed = [
                    (each, rates[each.record.session_id])
                    for each in ready
                    if each.rates != rates[each.record.session_id]
                ]
            # Less for some first: together they must not have more than there is
            for session, wanted in sorted(changed, key=lambda pair: _is_more(*pair)):
                process = session.process
                if process is None or not process.alive():
                    continue
                answer = process.ask(
                    "limit",
                    _ASK_TIMEOUT,
                    network_bandwidth=wanted.network,
                    volume_bandwidth=wanted.volume,
                )
                if answer is None:
                    # It is ending, or does nothing at all; the next tick tries again
                    continue
                with self._lock:
                    session.rates = wanted
                    if session.record.state == "starting":
                        self._declare_running(session)

    def _declare_running(self, session: _Session) -> None:
        record = session.record
        if record.role == "source":
            try:
                self._give_to_qemu(Path(record.socket))
            except OSError as error:
                LOG.error("QEMU may not be able to connect to %s: %s", record.socket, error)
        record.state = "running"
        self._save(session)

    def _ask_progress(self, session: _Session) -> None:
        process = session.process
        if process is not None and session.record.state == "running":
            answer = process.ask("progress", _ASK_TIMEOUT)
            if answer is not None:
                session.progress = answer
        with self._lock:
            self._look(session)

    def _end(self, process: RelayProcess) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            process.signal(number)
            if process.wait(_TERM_PATIENCE):
                return

    # Endings

    def _finish(self, session: _Session, state: str, message: str) -> None:
        record = session.record
        record.state, record.message = state, message[:_MAX_MESSAGE]
        record.description = None
        session.kill_at = None
        if session.process is not None:
            session.process.bury()
            session.process = None
        LOG.info(
            "Instance %s: %s session %s: %s%s",
            record.instance,
            record.role,
            record.session_id,
            state,
            f", {message}" if message else "",
        )
        self._save(session)

    def _forget(self, session: _Session) -> None:
        """Remove a session that has ended, with all its files but the summary."""
        if session.active:
            # Not even SIGKILL has ended it: it hangs in the kernel, and is looked after further
            return
        self._sessions.pop(session.record.session_id, None)
        self._remove(session)

    def _remove(self, session: _Session) -> None:
        record = session.record
        try:
            self._store.remove(record)
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.lstat(record.socket).st_mode):
                    os.unlink(record.socket)
            if record.directory is not None:
                shutil.rmtree(record.directory, ignore_errors=True)
        except OSError as error:
            LOG.error("Files of session %s stay behind: %s", record.session_id, error)

    def _save(self, session: _Session) -> None:
        try:
            self._store.save(session.record)
        except OSError as error:
            LOG.error("The state of session %s is not kept: %s", session.record.session_id, error)

    # QEMU

    def _make_directory(self, record: Record) -> None:
        """A directory of its own, in which QEMU can make or find its socket."""
        if record.directory is None:
            return
        path = Path(record.directory)
        path.mkdir(mode=0o700, exist_ok=True)
        if self._settings.owner != (-1, -1):
            # What is made there belongs to QEMU's group, whoever makes it
            path.chmod(0o2770)
            self._give_to_qemu(path)

    def _give_to_qemu(self, path: Path) -> None:
        if self._settings.owner != (-1, -1):
            os.chown(path, *self._settings.owner, follow_symlinks=False)

    # What is told

    def _find(self, session_id: str) -> _Session:
        with self._lock:
            session = self._sessions.get(session_id)
        if session is None:
            raise exception.RequestRefused(
                reason=f"there is no session {session_id}", code="unknown-session"
            )
        return session

    def _state(self, session: _Session) -> SessionState:
        record = session.record
        queue = [each for each in self._queue() if each.record.role == record.role]
        progress = json.dumps(session.progress) if session.progress else ""
        running = record.state == "running"
        return SessionState(
            session_id=record.session_id,
            migration_id=record.migration_id,
            instance=record.instance,
            role=record.role,
            state=record.state,
            message=record.message,
            host=record.host if running else None,
            port=record.port if running else None,
            queue_position=queue.index(session) + 1 if session in queue else 0,
            lease_remaining=max(0.0, round(session.lease_end - time.monotonic(), 1)),
            progress=progress if len(progress) <= MAX_PROGRESS else "",
            summary_path=str(session.files.summary),
        )


def _is_more(session: _Session, wanted: Rates) -> bool:
    """Whether a relay gets more than it has."""
    if session.rates is None:
        return True
    pairs = (
        (session.rates.network, wanted.network),
        (session.rates.volume, wanted.volume),
    )
    return any((new or math.inf) > (old or math.inf) for old, new in pairs)
