# SPDX-License-Identifier: Apache-2.0
"""One live migration from begin to end.

Up to the moment at which libvirt is told to migrate, whatever is amiss makes the migration the
ordinary one (`FallBack`). After that it succeeds or fails as one of libvirt's does, and the guest
runs on exactly one side.
"""

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone

from nova_dmigrate import exception
from nova_dmigrate.findings import Finding
from nova_dmigrate.migration import preflight
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.libvirt_guest import Job, LibvirtGuest, Order, RunningMigration
from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.relayed import Guest, Peers, RelayedMigration, Report
from nova_dmigrate.migration.request import MigrationRequest, Mode
from nova_dmigrate.migration.sessions import Terms
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.migration.summary import (
    CANCELLED,
    COMPLETED,
    DMIGRATE,
    FAILED,
    ORDINARY,
    MigrationSummary,
)
from nova_dmigrate.rpc.host_messages import HostState

LOG = logging.getLogger(__name__)

_POLL = 0.25
_CANCELLED = "it was cancelled"


class Migration:
    """Carries out one request. Call :meth:`run` once.

    :param migration_id: names it in files, logs and on the hosts.
    :param on_progress: called when a phase begins, and a few times a second while memory is sent.
    :param cancelled: gives the migration up when it is set; a finished switchover stands.
    """

    def __init__(
        self,
        migration_id: str,
        request: MigrationRequest,
        settings: OrchestrationSettings,
        guest: LibvirtGuest,
        peers: Peers,
        on_progress: Callable[[Progress], None],
        cancelled: threading.Event,
    ) -> None:
        self._id = migration_id
        self._request = request
        self._settings = settings
        self._guest = guest
        self._peers = peers
        self._on_progress = on_progress
        self._instance = request.instance or guest.facts.uuid
        self._phases = _Phases()
        self._findings: tuple[Finding, ...] = ()
        self._mapping_s: float | None = None
        self._without_volumes: exception.FallBack | None = None
        self._relays: dict[str, Report] = {}
        self._relay_failure: str | None = None
        self._job: Job | None = None
        self._cancelled = cancelled

    def run(self) -> MigrationSummary:
        """Migrate; how it went. Failures are told in the summary, not raised.

        :raises MigrationError: relays were required, and the migration would be the ordinary one:
            nothing was done.
        """
        began = datetime.now(timezone.utc)
        fallback: exception.FallBack | None = None
        error: str | None = None
        try:
            error = self._run_relayed()
            if error is not None and self._may_retry():
                fallback = because(Reason.RELAY_FAILED, self._instance, error=error)
        except exception.FallBack as reason:
            fallback = reason
        except exception.MigrationCancelled as cancelled:
            error = str(cancelled.kwargs["reason"])
        if fallback is not None:
            if self._request.mode is Mode.REQUIRED:
                raise fallback
            LOG.info("%s; the migration is the ordinary one", fallback)
            error = self._run_ordinary()
        summary = self._summary(began, fallback, error)
        LOG.info("Instance %s: %s", self._instance, summary.sentence())
        return summary

    # The two ways

    def _run_relayed(self) -> str | None:
        """Migrate through relays; why libvirt failed, None if it has not.

        :raises FallBack: before libvirt was asked for anything.
        """
        self._enter("checking")
        guest, request, settings = self._guest, self._request, self._settings
        preflight.examine(guest.facts, request)
        source, destination = self._ask_hosts()
        preflight.hosts_agree(guest.facts, source, destination)
        subject = Guest(
            memory=guest.facts.memory,
            volumes=preflight.volumes_of(guest.facts, destination.drivers),
            layout=guest.memory_layout,
            runs_here=lambda: guest.runs_here,
        )
        relayed = RelayedMigration(
            self._id,
            self._instance,
            subject,
            self._peers,
            settings,
            self._terms(source, destination),
            source.socket_directory,
            self._downtime_limit() or guest.max_downtime_ms,
            enter=self._enter,
            map_first=request.mode is Mode.REQUIRED,
        )
        try:
            with relayed:
                return self._migrate_relayed(relayed)
        finally:
            self._relays, self._relay_failure = relayed.reports, relayed.failure

    def _run_ordinary(self) -> str | None:
        """Migrate as libvirt does; why it failed, None if it has not."""
        request = self._request
        if self._cancelled.is_set():
            return _CANCELLED
        self._phases.enter("migrating")
        running = self._guest.migrate(
            Order(
                request.destination_uri,
                uri=f"tcp:{request.migration_address}" if request.migration_address else None,
                bandwidth=request.network_bandwidth,
                auto_converge=request.auto_converge,
                post_copy=request.post_copy,
                tls=request.tls,
            )
        )
        limit = self._downtime_limit()
        limited = limit is None
        while not self._over(running):
            if not limited and self._job is not None and limit is not None:
                limited = self._guest.set_max_downtime(limit)
            self._report({}, limit if limited else None)
        self._phases.enter("ended")
        return running.error

    # Its steps

    def _ask_hosts(self) -> tuple[HostState, HostState]:
        patience = self._settings.host_timeout
        try:
            return self._peers.source.hello(patience), self._peers.destination.hello(patience)
        except exception.HostUnreachable as error:
            raise because(Reason.HOST_UNREACHABLE, self._instance, error=error) from error
        except exception.HostRefused as error:
            raise because(Reason.HOST_REFUSED, self._instance, error=error) from error

    def _terms(self, source: HostState, destination: HostState) -> Terms:
        request, wait = self._request, self._request.wait_seconds
        return Terms(
            source.host if source.tls else None,
            destination.host if source.tls else None,
            request.migration_address,
            request.network_bandwidth,
            request.volume_bandwidth,
            self._settings.queue_time if wait is None else wait,
        )

    def _migrate_relayed(self, relayed: RelayedMigration) -> str | None:
        request = self._request
        self._enter("migrating")
        # QEMU itself is not capped: the relays are, and only what goes over the network counts
        running = self._guest.migrate(
            Order(
                request.destination_uri,
                uri=relayed.uri,
                auto_converge=request.auto_converge,
                post_copy=request.post_copy,
            )
        )
        while not self._over(running):
            told = relayed.follow(self._guest.set_max_downtime if self._job is not None else None)
            if relayed.converging and self._phases.current == "migrating":
                self._phases.enter("converging")
            self._report(told, relayed.applied_downtime_limit)
        self._phases.enter("ended")
        self._findings = relayed.findings
        self._mapping_s = relayed.mapping_seconds
        if running.error is None:
            self._without_volumes = relayed.without_volumes()
        return running.error

    def _over(self, running: RunningMigration) -> bool:
        """Wait a moment; whether libvirt is done."""
        if running.wait(_POLL):
            return True
        self._job = self._guest.job() or self._job
        if self._cancelled.is_set():
            self._guest.abort()
        return False

    def _enter(self, phase: str) -> None:
        """The next phase begins, unless the migration was cancelled.

        :raises MigrationCancelled: it was.
        """
        if self._cancelled.is_set():
            raise exception.MigrationCancelled(instance=self._instance, reason=_CANCELLED)
        self._phases.enter(phase)
        self._report({})

    def _may_retry(self) -> bool:
        """Whether a migration that has failed was the relays' failure, and nothing is lost."""
        return bool(
            self._settings.retry_ordinary
            and self._request.mode is Mode.AUTO
            and not self._cancelled.is_set()
            and self._relay_failure
            and self._guest.runs_here
        )

    def _downtime_limit(self) -> int | None:
        """The limit that was asked for, in milliseconds; None to keep libvirt's."""
        return self._request.max_downtime_ms or self._settings.max_downtime_ms or None

    # What is told

    def _report(self, told: Report, max_downtime_ms: int | None = None) -> None:
        job = self._job or Job()
        self._on_progress(
            Progress(
                phase=self._phases.current,
                elapsed=self._phases.elapsed,
                guest_bytes=told.get("guest_bytes", job.transferred),
                wire_bytes=told.get("wire_bytes", job.transferred),
                volume_bytes=told.get("volume_bytes", 0),
                ram_bytes=told.get("ram_bytes", job.total),
                mapped_pages=told.get("mapped_pages", 0),
                network_rate=told.get("wire_rate", 0.0),
                volume_rate=told.get("volume_rate", 0.0),
                remaining_bytes=self._job.remaining if self._job else None,
                unresolved=told.get("unresolved_pages", 0),
                misses=sum(told.get("misses", {}).values()),
                passes=told.get("passes", job.passes),
                max_downtime_ms=max_downtime_ms,
            )
        )

    def _summary(
        self, began: datetime, fallback: exception.FallBack | None, error: str | None
    ) -> MigrationSummary:
        source = self._relays.get("source", {}) if fallback is None else {}
        destination = self._relays.get("destination", {}) if fallback is None else {}
        job = self._guest.completed_job() or self._job or Job()
        reason = fallback or self._without_volumes
        state = COMPLETED if error is None else CANCELLED if self._cancelled.is_set() else FAILED
        return MigrationSummary(
            id=self._id,
            instance=self._instance,
            domain=self._guest.facts.name,
            source=self._request.source_host or "?",
            destination=self._request.destination_host or self._request.destination_uri,
            mode=DMIGRATE if fallback is None else ORDINARY,
            fallback_reason=None if reason is None else str(reason.kwargs["code"]),
            fallback_message=None if reason is None else str(reason.kwargs["reason"]),
            state=state,
            error=error,
            started=began.isoformat(timespec="seconds"),
            total_s=self._phases.elapsed,
            downtime_ms=job.downtime_ms,
            guest_bytes=source.get("guest_bytes", job.transferred),
            wire_bytes=source.get("wire_bytes", job.transferred),
            saved_bytes=source.get("saved_bytes", 0),
            volume_bytes=source.get("volume_bytes", 0),
            pages_referenced=source.get("referenced_pages", 0),
            misses=sum(source.get("misses", {}).values()),
            mapped_pages=source.get("mapped_pages", 0),
            mapping_s=None if fallback is not None else self._mapping_s,
            phases=self._phases.seconds(),
            findings=self._findings,
            libvirt=job.statistics,
            series={
                role: tuple(relay["series"])
                for role, relay in (("source", source), ("destination", destination))
                if relay.get("series")
            },
        )


class _Phases:
    """Seconds by phase. The phase "ended" takes none."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._ended: float | None = None
        self._since = self._began
        self._seconds: dict[str, float] = {}
        self.current = "checking"

    def enter(self, phase: str) -> None:
        now = time.monotonic()
        if self.current != "ended":
            self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self.current, self._since = phase, now
        self._ended = now if phase == "ended" else None

    @property
    def elapsed(self) -> float:
        return (self._ended or time.monotonic()) - self._began

    def seconds(self) -> dict[str, float]:
        return {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}
