# SPDX-License-Identifier: Apache-2.0
"""One live migration from begin to end.

Up to the moment at which libvirt is told to migrate, whatever is amiss makes the migration the
ordinary one (`FallBack`). After that it succeeds or fails as one of libvirt's does, and the guest
runs on exactly one side. What hangs on the way, a relay or a QEMU, does not hold it for ever.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from nova_dmigrate import exception
from nova_dmigrate.migration import leftovers, preflight, stall
from nova_dmigrate.migration.account import Account
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.job import Job
from nova_dmigrate.migration.libvirt_guest import LibvirtGuest, Order, RunningMigration
from nova_dmigrate.migration.peers import ask_host, terms_of
from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.relayed import Guest, Peers, RelayedMigration, Report
from nova_dmigrate.migration.request import MigrationRequest, Mode
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.migration.summary import CANCELLED, COMPLETED, FAILED, MigrationSummary

LOG = logging.getLogger(__name__)

_POLL = 0.25
_CANCELLED = "it was cancelled"
#: Seconds for libvirt to end what was cancelled.
_CANCEL_PATIENCE = 60.0
#: Seconds for libvirt to see that the relays are gone.
_LAST_PATIENCE = 20.0


class Migration:
    """Carries out one request. Call :meth:`run` once.

    :param migration_id: names it in files, logs and on the hosts.
    :param peers: opens the ways to the services and to the agent, which only relays need.
    :param on_progress: called when a phase begins, and a few times a second while memory is sent.
    :param cancelled: gives the migration up when it is set; a finished switchover stands.
    """

    def __init__(
        self,
        migration_id: str,
        request: MigrationRequest,
        settings: OrchestrationSettings,
        guest: LibvirtGuest,
        peers: Callable[[], AbstractContextManager[Peers]],
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
        self._account = Account(
            migration_id,
            self._instance,
            guest.facts.name,
            request.source_host or "?",
            request.destination_host or request.destination_uri,
        )
        self._phases = self._account.phases
        self._job: Job | None = None
        self._job_now: Job | None = None
        self._running: RunningMigration | None = None
        self._given_up: float | None = None
        self._cancelled = cancelled

    def run(self) -> MigrationSummary:
        """Migrate; how it went. Failures are told in the summary, not raised.

        :raises MigrationError: relays were required, and the migration would be the ordinary one:
            nothing was done.
        """
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
        summary = self._summary(fallback, error)
        LOG.info("Instance %s: %s", self._instance, summary.sentence())
        return summary

    # The two ways

    def _run_relayed(self) -> str | None:
        """Migrate through relays; why libvirt failed, None if it has not.

        :raises FallBack: before libvirt was asked for anything.
        """
        with contextlib.ExitStack() as stack:
            relayed = self._prepare(stack)
            ends = stack.pop_all()
        try:
            running, hung = self._migrate_relayed(relayed)
        finally:
            self._leave(ends)
        # Perhaps it was a relay that kept it from its end
        if running.wait(_LAST_PATIENCE) and running.error is not None and hung is not None:
            return f"{hung} ({running.error})"
        return running.error

    def _prepare(self, stack: contextlib.ExitStack) -> RelayedMigration:
        """Relays that are ready, until the stack is closed.

        :raises FallBack: the migration has to be the ordinary one.
        :raises MigrationCancelled: it was cancelled.
        """
        try:
            return self._open(stack)
        except (exception.FallBack, exception.MigrationCancelled):
            raise
        except exception.ConfigurationError as error:
            raise because(Reason.CONFIGURATION, self._instance, error=error) from error
        except Exception as error:
            # Nothing of ours may keep a guest from being migrated as it always was
            LOG.exception("Instance %s: the relays cannot be prepared", self._instance)
            why = f"{type(error).__name__}: {error}"
            raise because(Reason.UNEXPECTED, self._instance, error=why) from error

    def _open(self, stack: contextlib.ExitStack) -> RelayedMigration:
        self._enter("checking")
        guest, request, settings = self._guest, self._request, self._settings
        preflight.examine(guest.facts, request)
        here = f"host {request.source_host}"
        preflight.libvirt_can(guest.libvirt_version, here, guest.facts.name)
        peers = stack.enter_context(self._peers())
        source, destination = (
            ask_host(host, self._instance, settings.host_timeout, lambda: self._enter("checking"))
            for host in (peers.source, peers.destination)
        )
        preflight.hosts_agree(guest.facts, source, destination)
        preflight.encrypted_as_well(guest.facts, request.tls, source)
        subject = Guest(
            memory=guest.facts.memory,
            volumes=preflight.volumes_of(guest.facts, destination.drivers),
            layout=guest.memory_layout,
            runs_here=lambda: guest.runs_here,
            domain=guest.facts.uuid,
        )
        relayed = RelayedMigration(
            self._id,
            self._instance,
            subject,
            peers,
            settings,
            terms_of(request, settings, source, destination),
            source.socket_directory,
            self._downtime_limit() or guest.max_downtime(lambda: self._enter("checking")),
            enter=self._enter,
            map_first=request.mode is Mode.REQUIRED,
        )
        stack.callback(self._account.note_relays, relayed)
        return stack.enter_context(relayed)

    def _leave(self, ends: contextlib.ExitStack) -> None:
        """Give up the relays. The guest is where it is, so nothing of this may fail."""
        try:
            ends.close()
        except Exception:
            LOG.exception("Instance %s: the relays are left alone", self._instance)

    def _run_ordinary(self) -> str | None:
        """Migrate as libvirt does; why it failed, None if it has not."""
        end = time.monotonic() + leftovers.PATIENCE
        while not self._cancelled.is_set():
            error = self._try_ordinary()
            if error is None or not leftovers.in_the_way(error):
                return error
            if time.monotonic() > end:
                return leftovers.still_there(error)
            LOG.info("Instance %s: the destination has to clean up: %s", self._instance, error)
            self._phases.enter("waiting")
            self._report({})
            self._cancelled.wait(leftovers.PAUSE)
        return _CANCELLED

    def _try_ordinary(self) -> str | None:
        request = self._request
        self._job = None
        self._phases.enter("migrating")
        running = self._begin(
            Order(
                request.destination_uri,
                uri=_tcp(request.migration_address) if request.migration_address else None,
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
            if self._job is not None:
                self._account.note_job(self._job)
            self._report({}, limit if limited else None)
        self._phases.enter("ended")
        return running.error

    # Its steps

    def _migrate_relayed(self, relayed: RelayedMigration) -> tuple[RunningMigration, str | None]:
        """libvirt's migration, which has come to its end or will not; and why it was given up, if a
        relay hangs.
        """
        request = self._request
        self._enter("migrating")
        # QEMU itself is not capped: the relays are, and only what goes over the network counts
        running = self._begin(
            Order(
                request.destination_uri,
                uri=relayed.uri,
                auto_converge=request.auto_converge,
                post_copy=request.post_copy,
            )
        )
        watch = stall.Stall(self._settings.stall_timeout)
        hung: str | None = None
        while not self._over(running):
            told = relayed.follow(self._guest.set_max_downtime if self._job is not None else None)
            if relayed.converging and self._phases.current == "migrating":
                self._phases.enter("converging")
            self._report(told, relayed.applied_downtime_limit)
            why = watch.reason(self._job_now, relayed.failure, relayed.silence)
            if why is not None:
                hung = why
                relayed.give_up(why)
                if self._aborted_in_vain(stall.HUNG_PATIENCE):
                    break
        self._phases.enter("ended")
        self._account.note_map(relayed, completed=running.error is None)
        return running, hung

    def _begin(self, order: Order) -> RunningMigration:
        self._given_up = None
        self._running = self._guest.migrate(order)
        return self._running

    def _over(self, running: RunningMigration) -> bool:
        """Wait a moment; whether libvirt is done, or does not end what was cancelled."""
        if running.wait(_POLL):
            return True
        self._job_now = self._guest.job()
        self._job = self._job_now or self._job
        return self._cancelled.is_set() and self._aborted_in_vain(_CANCEL_PATIENCE)

    def _aborted_in_vain(self, patience: float) -> bool:
        """Have libvirt end it; whether it has not done so for so many seconds.

        A switchover stands: post-copy has all the time that it takes.
        """
        if not self._guest.runs_here:
            return False
        self._guest.abort()
        now = time.monotonic()
        if self._given_up is None:
            LOG.info("Instance %s: the migration is aborted", self._instance)
            self._given_up = now
        return now > self._given_up + patience

    @property
    def _ended(self) -> bool:
        """Whether there is nothing that libvirt still carries out."""
        return self._running is None or self._running.wait(0)

    def _enter(self, phase: str) -> None:
        """The next phase begins, unless the migration was cancelled.

        :raises MigrationCancelled: it was.
        """
        if self._cancelled.is_set():
            raise exception.MigrationCancelled(instance=self._instance, reason=_CANCELLED)
        self._phases.enter(phase)
        self._report({})

    def _may_retry(self) -> bool:
        """Whether a migration that has failed was the relays' failure, or never began, and nothing
        is lost."""
        return bool(
            self._settings.retry_ordinary
            and self._request.mode is Mode.AUTO
            and not self._cancelled.is_set()
            and self._ended
            and self._account.worth_another_try
            and self._guest.runs_here
        )

    def _downtime_limit(self) -> int | None:
        """The limit that was asked for, in milliseconds; None to keep libvirt's."""
        # No request asks for 0, which is the configuration's word for None
        return self._request.max_downtime_ms or self._settings.max_downtime_ms or None

    # What is told

    def _report(self, told: Report, max_downtime_ms: int | None = None) -> None:
        job = self._job or Job()
        progress = Progress(
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
        try:
            self._on_progress(progress)
        except Exception:
            # A display that is gone (a closed pipe) must not end a migration that is under way
            LOG.exception("Instance %s: progress is not shown any more", self._instance)
            self._on_progress = lambda progress: None

    def _summary(self, fallback: exception.FallBack | None, error: str | None) -> MigrationSummary:
        # One that has not completed may have an earlier one before it, in which the guest came here
        completed = self._guest.completed_job() if error is None else None
        job = completed or self._job or Job()
        cancelled = self._cancelled.is_set() and self._ended
        state = COMPLETED if error is None else CANCELLED if cancelled else FAILED
        return self._account.summary(state, error, fallback, job)


def _tcp(address: str) -> str:
    """The way of libvirt's own stream to a name or an address."""
    return f"tcp:[{address}]" if ":" in address else f"tcp:{address}"
