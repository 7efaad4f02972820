# SPDX-License-Identifier: Apache-2.0
"""One session: what is recorded of it, its relay, and its times.

Nobody else changes its state. That happens with the lock of `Sessions` held; what has to be waited
for (a relay's answer, a relay's end) is waited for without it, in the methods that say so.
"""

import ipaddress
import json
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from nova_dmigrate.host.capacity import Claim, Limits, Load, Rates
from nova_dmigrate.host.qemu_files import QemuFiles
from nova_dmigrate.host.relays import (
    Identity,
    RelayProcess,
    Report,
    has_told_kept,
    read_events,
    read_summary,
)
from nova_dmigrate.host.store import Record, Store
from nova_dmigrate.host.totals import Totals
from nova_dmigrate.retention import Retention
from nova_dmigrate.rpc.host_messages import FINAL, MAX_PROGRESS, NO_ROOM, SessionState

LOG = logging.getLogger(__name__)

#: Seconds for a relay's answer, and for one that decides about its end.
_ASK_TIMEOUT = 1.0
_LAST_ASK_TIMEOUT = 5.0
#: Seconds that a relay which was started may take to be ready.
_START_PATIENCE = 60.0
#: Seconds for the last steps of a relay that has delivered, or that has just lost its QEMU.
_ENDING_PATIENCE = 2.0
#: Seconds from SIGTERM to SIGKILL.
_TERM_PATIENCE = 3.0
_MAX_MESSAGE = 1000
_KEPT = "it ends with QEMU alone: post-copy may have begun"
#: Stages in which a relay has nothing to finish.
_IDLE_STAGES = ("preparing", "waiting", "connected")


@dataclass(frozen=True)
class SessionSettings:
    """Seconds.

    :ivar command: what starts a relay.
    :ivar address: where others reach a relay that listens everywhere.
    :ivar owner: user and group of what QEMU has to reach, -1 for the service's own.
    """

    command: Sequence[str]
    limits: Limits
    address: str
    queue_timeout: float = 300.0
    max_lease: float = 60.0
    summaries: Retention = Retention(count=1000, days=30)
    owner: tuple[int, int] = (-1, -1)


class Session:
    """A record, and what is known of its relay only while the service runs.

    :param totals: get what it has done when it has ended.
    :ivar progress: what the relay has told of itself last; at its end that is its summary.
    :ivar rates: the caps that the relay has taken; None before it has taken any.
    """

    def __init__(
        self,
        record: Record,
        settings: SessionSettings,
        store: Store,
        qemu_files: QemuFiles,
        totals: Totals,
    ) -> None:
        self.record = record
        self._settings = settings
        self._store = store
        self._qemu_files = qemu_files
        self._totals = totals
        self._files = store.files(record.session_id)
        self._process: RelayProcess | None = None
        self._ready = False
        self.progress: Report = {}
        now = time.monotonic()
        self._lease_end = now + record.lease_seconds
        self._queue_end = now + record.wait_seconds
        self._start_end = now + _START_PATIENCE
        self._carries = False
        self._kill_at: float | None = None
        self.rates: Rates | None = None

    @property
    def queued(self) -> bool:
        return self.record.state == "queued"

    @property
    def active(self) -> bool:
        """Whether its relay runs."""
        return self.record.state in ("starting", "running")

    @property
    def ready(self) -> bool:
        """Whether its relay runs and can be asked."""
        return self.active and self._ready

    @property
    def claim(self) -> Claim:
        caps = Rates(self.record.network_bandwidth, self.record.volume_bandwidth)
        return Claim(self.record.session_id, self.record.role, caps)

    @property
    def load(self) -> Load:
        """What it takes of the host's memory."""
        return Load(self.record.role, self.record.guest_memory)

    def lapsed(self, now: float, seen: float) -> bool:
        """Whether nobody has asked for it for as long as was agreed, though that was possible.

        :param seen: when it was possible last.
        """
        return now > self._lease_end and seen > self._lease_end

    def told(self, queue_position: int) -> SessionState:
        """How far it is."""
        record = self.record
        progress = json.dumps(self.progress) if self.progress else ""
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
            queue_position=queue_position,
            lease_remaining=max(0.0, round(self._lease_end - time.monotonic(), 1)),
            progress=progress if len(progress) <= MAX_PROGRESS else "",
            summary_path=str(self._files.summary),
        )

    # Its beginning

    def keep(self) -> None:
        """Have it on disk, and QEMU's directory for it.

        :raises OSError: that is not possible.
        """
        self._store.save(self.record)
        self._qemu_files.make_directory(self.record)

    def start(self) -> None:
        """Start the relay: there is room for it."""
        record = self.record
        description, record.description = record.description, None
        record.state, record.message = "starting", ""
        self._start_end = time.monotonic() + _START_PATIENCE

        def note(identity: Identity) -> None:
            record.pid, record.started = identity.pid, identity.started
            self._store.save(record)

        try:
            self._process = RelayProcess.spawn(
                self._settings.command, description or {}, self._files, note
            )
        except OSError as error:
            self.finish("failed", f"the relay cannot be started: {error}")
            return
        LOG.info(
            "Instance %s: %s relay of migration %s started, process %s",
            record.instance,
            record.role,
            record.migration_id,
            record.pid,
        )

    def adopt(self) -> None:
        """Take over the relay that an earlier service has started."""
        if not self.active:
            return
        record = self.record
        if record.identity is not None:
            self._process = RelayProcess.adopt(record.identity, self._files)
        if self._process is not None:
            LOG.info(
                "Instance %s: the %s relay, process %s, is taken over",
                record.instance,
                record.role,
                record.pid,
            )
        self.look()

    def limited(self, rates: Rates) -> None:
        """The relay has taken these caps; with its first ones it is declared running."""
        self.rates = rates
        record = self.record
        if record.state != "starting":
            return
        if record.role == "source":
            try:
                self._qemu_files.give_socket(record)
            except OSError as error:
                LOG.error("QEMU may not be able to connect to %s: %s", record.socket, error)
        record.state = "running"
        self._save()

    # Meanwhile

    def renew(self, lease_seconds: float) -> None:
        """Somebody has asked for it."""
        lease_seconds = min(lease_seconds, self._settings.max_lease)
        self._lease_end = time.monotonic() + lease_seconds
        if lease_seconds != self.record.lease_seconds:
            self.record.lease_seconds = lease_seconds
            self._save()

    def look(self) -> None:
        """Learn what has become of the relay."""
        if not self.active:
            return
        # In this order: what it has told at its end is in the file when it is gone
        alive = self._process is not None and self._process.alive()
        events = read_events(self._files.events)
        for event in events:
            if event.get("event") == "ready":
                self._ready = True
                if "port" in event:
                    self.record.host = self._reachable(event["host"])
                    self.record.port = event["port"]
            elif event.get("event") == "kept" and not self.record.kept:
                self.record.kept, self.record.message = True, _KEPT
                self._save()
        if not alive:
            self._settle(events)

    def hold(self, now: float) -> None:
        """Its lease begins now: so far there was no need, or no way, to ask for it."""
        self._lease_end = max(self._lease_end, now + self.record.lease_seconds)

    def enforce(self, now: float, lapsed: bool) -> None:
        """Leases, time limits."""
        record = self.record
        if self._kill_at is not None:
            if now > self._kill_at and self._process is not None and not self._kept():
                self._process.signal(signal.SIGKILL)
        elif self.queued:
            if lapsed:
                self.finish("cancelled", "nobody has asked for it any more")
            elif now > self._queue_end:
                self.finish("failed", f"{NO_ROOM}: {record.message}")
        elif self.active and lapsed:
            if self._carries or self._kept():
                self.hold(now)
            else:
                LOG.warning(
                    "Instance %s: the %s relay is ended, nobody has asked for it any more",
                    record.instance,
                    record.role,
                )
                self._terminate(now)
        elif record.state == "starting" and now > self._start_end:
            self._terminate(now)

    # What is waited for, without the lock

    def ask_progress(self) -> None:
        """Have the relay tell how far it is."""
        self._ask_progress(_ASK_TIMEOUT)

    def ask_whether_it_carries(self) -> None:
        """Find out whether a migration is under way that its lease must not end.

        At the destination it is not ended as long as its source relay goes on: that one's host
        decides. Both leases are the same requester's, and who cannot ask here may well do so there.
        """
        answered = self.record.role == "destination" and self._ask_progress(_LAST_ASK_TIMEOUT)
        self._carries = answered and self.progress.get("stage") not in _IDLE_STAGES

    def _ask_progress(self, timeout: float) -> bool:
        process = self._process
        if process is None or self.record.state != "running":
            return False
        answer = process.ask("progress", timeout)
        if answer is not None:
            self.progress = answer
        return answer is not None

    def offer_map(self, buffer_map: str, memory_layout: str) -> bool:
        """Whether the relay loads a map that has come only now."""
        process = self._process
        if process is None or self.record.role != "source":
            return False
        answer = process.ask(
            "map", _ASK_TIMEOUT, buffer_map=buffer_map, memory_layout=memory_layout
        )
        return answer is not None

    def limit(self, rates: Rates) -> bool:
        """Whether the relay takes these caps. One that is ending does not, nor one that hangs."""
        process = self._process
        if process is None or not process.alive():
            return False
        answer = process.ask(
            "limit",
            _ASK_TIMEOUT,
            network_bandwidth=rates.network,
            volume_bandwidth=rates.volume,
        )
        return answer is not None

    def end(self) -> None:
        """End the relay, whatever it does, but for one that only QEMU may end."""
        process = self._process
        if process is None or not self.active:
            return
        self.ask_progress()
        if self.progress and self.progress.get("stage") not in _IDLE_STAGES:
            process.wait(_ENDING_PATIENCE)
        for number in (signal.SIGTERM, signal.SIGKILL):
            # Each time: one that does not heed SIGTERM has told why
            if self._kept():
                LOG.warning(
                    "Instance %s: the %s relay goes on: %s",
                    self.record.instance,
                    self.record.role,
                    _KEPT,
                )
                return
            process.signal(number)
            if process.wait(_TERM_PATIENCE):
                return

    # Its end

    def finish(self, state: str, message: str) -> None:
        """It has ended. Its record, and its files, are still there."""
        record = self.record
        record.state, record.message = state, message[:_MAX_MESSAGE]
        record.description = None
        self._kill_at = None
        self._totals.ended[record.role, state] += 1
        if self._process is not None:
            self._process.bury()
            self._process = None
        LOG.info(
            "Instance %s: %s session %s: %s%s",
            record.instance,
            record.role,
            record.session_id,
            state,
            f", {message}" if message else "",
        )
        self._save()

    def remove(self) -> None:
        """Remove its record, and all its files but the summary."""
        try:
            self._store.remove(self.record)
            self._qemu_files.remove(self.record)
        except OSError as error:
            LOG.error("Files of session %s stay behind: %s", self.record.session_id, error)

    def _settle(self, events: Sequence[Report]) -> None:
        """The relay is gone: how has it ended?"""
        summary = read_summary(self._files.summary)
        told = summary or next((each for each in events if each.get("event") == "end"), None)
        self._totals.add(self.record.role, summary or self.progress)
        self.progress = summary or {}
        state, reason = "failed", "the relay was killed"
        if told is not None and told.get("state") in FINAL:
            state, reason = told["state"], told.get("reason") or ""
        self.finish(state, str(reason))

    def _terminate(self, now: float) -> None:
        if self._process is not None:
            self._process.signal(signal.SIGTERM)
            self._kill_at = now + _TERM_PATIENCE

    def _kept(self) -> bool:
        """Whether only QEMU may end the relay: the guest may run at the destination by now, and is
        lost without it. That does not depend on an answer of the relay, which may hang.
        """
        return self.record.kept or has_told_kept(self._files.events)

    def _reachable(self, host: str) -> str:
        """Where others reach a relay that listens on ``host``."""
        return self._settings.address if ipaddress.ip_address(host).is_unspecified else host

    def _save(self) -> None:
        try:
            self._store.save(self.record)
        except OSError as error:
            LOG.error("The state of session %s is not kept: %s", self.record.session_id, error)
