# SPDX-License-Identifier: Apache-2.0
"""What is noted of one migration while it goes on, and the summary made of it."""

import time
from datetime import datetime, timezone

from nova_dmigrate import exception
from nova_dmigrate.findings import Finding
from nova_dmigrate.migration.database_series import DatabaseSample
from nova_dmigrate.migration.job import Job, JobSeries
from nova_dmigrate.migration.relayed import RelayedMigration, Report
from nova_dmigrate.migration.summary import DMIGRATE, ORDINARY, MigrationSummary, Row


class Account:
    """One migration's account, begun with it.

    :param migration_id: as `summary.new_id` makes it.
    :param instance: UUID; :param domain: libvirt's name of it.
    :param source: the host that it is on; :param destination: the host that it is to go to.
    :ivar relay_failure: why a relay has failed, if one has.
    """

    def __init__(
        self, migration_id: str, instance: str, domain: str, source: str, destination: str
    ) -> None:
        self._id = migration_id
        self._instance = instance
        self._domain = domain
        self._source = source
        self._destination = destination
        self._began = datetime.now(timezone.utc)
        self._findings: tuple[Finding, ...] = ()
        self._mapping_s: float | None = None
        self._completed = False
        self._without_volumes: exception.FallBack | None = None
        self._relays: dict[str, Report] = {}
        self._database: tuple[DatabaseSample, ...] = ()
        self._jobs = JobSeries()
        self.phases = Phases()
        self.relay_failure: str | None = None

    @property
    def worth_another_try(self) -> bool:
        """Whether a migration that has failed may well succeed without the relays: one of them has
        failed, or the source's QEMU had not sent anything yet.
        """
        sent = self._relays.get("source", {}).get("guest_bytes")
        return self.relay_failure is not None or sent == 0

    def note_map(self, relayed: RelayedMigration, completed: bool) -> None:
        """libvirt is done: when the buffer map was there.

        :param completed: the guest has moved.
        """
        self._mapping_s = relayed.mapping_seconds
        self._completed = completed

    def note_relays(self, relayed: RelayedMigration) -> None:
        """It has been left: what its relays have told, what became of the buffer map and of the
        volumes, and the database meanwhile.
        """
        self._relays, self.relay_failure = relayed.reports, relayed.failure
        self._findings = relayed.findings
        if self._completed:
            self._without_volumes = relayed.without_volumes()
        self._database = relayed.database_samples

    def note_job(self, job: Job) -> None:
        """How far the ordinary migration is."""
        self._jobs.note(self.phases.elapsed, job)

    def summary(
        self, state: str, error: str | None, fallback: exception.FallBack | None, job: Job
    ) -> MigrationSummary:
        """The whole of it.

        :param state: as in the summary; :param error: why it has not completed.
        :param fallback: why it was the ordinary migration in the end; None if it was not.
        :param job: the last that libvirt has told.
        """
        relays = self._relays if fallback is None else {}
        source, destination = relays.get("source", {}), relays.get("destination", {})
        reason = fallback or self._without_volumes
        return MigrationSummary(
            id=self._id,
            instance=self._instance,
            domain=self._domain,
            source=self._source,
            destination=self._destination,
            mode=DMIGRATE if fallback is None else ORDINARY,
            fallback_reason=None if reason is None else str(reason.kwargs["code"]),
            fallback_message=None if reason is None else str(reason.kwargs["reason"]),
            state=state,
            error=error,
            started=self._began.isoformat(timespec="seconds"),
            total_s=self.phases.elapsed,
            downtime_ms=destination.get("downtime_ms", job.downtime_ms),
            guest_bytes=source.get("guest_bytes", job.transferred),
            wire_bytes=source.get("wire_bytes", job.transferred),
            saved_bytes=source.get("saved_bytes", 0),
            volume_bytes=source.get("volume_bytes", 0),
            pages_referenced=source.get("referenced_pages", 0),
            misses=sum(source.get("misses", {}).values()),
            mapped_pages=source.get("mapped_pages", 0),
            mapping_s=None if fallback is not None else self._mapping_s,
            phases=self.phases.seconds(),
            findings=self._findings,
            libvirt=job.statistics,
            series=self._series() if fallback is None else {"libvirt": tuple(self._jobs.rows)},
        )

    def _series(self) -> dict[str, tuple[Row, ...]]:
        relays = {
            role: tuple(relay["series"])
            for role, relay in self._relays.items()
            if relay.get("series")
        }
        rows = tuple(
            {
                "t": round(each.moment - self.phases.began, 3),
                "commits": each.commits,
                "queries": each.queries,
                "latency_ms": each.latency_ms,
            }
            for each in self._database
        )
        return {**relays, "database": rows} if rows else relays


class Phases:
    """Seconds by phase. The phase "ended" takes none.

    :ivar began: monotonic seconds.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._ended: float | None = None
        self._since = self.began
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
        return (self._ended or time.monotonic()) - self.began

    def seconds(self) -> dict[str, float]:
        return {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}
