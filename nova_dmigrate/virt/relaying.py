# SPDX-License-Identifier: Apache-2.0
"""One live migration through the relays, around Nova's own operation.

Nova's operation builds the destination's XML and calls ``guest.migrate``; Nova's monitor has the
same guest, asks it for the job's state, sets its downtime limit, aborts or pauses it. So all that
is changed is that one guest: it migrates to the source relay's socket, and takes a downtime limit
as the one that counts once the bulk is resolved.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.migration import leftovers, preflight
from nova_dmigrate.migration.account import Account
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.job import Job
from nova_dmigrate.migration.peers import ask_host, open_peers, settings_from, terms_of
from nova_dmigrate.migration.relayed import Guest, RelayedMigration
from nova_dmigrate.migration.summary import (
    CANCELLED,
    COMPLETED,
    FAILED,
    MigrationSummary,
    new_id,
)
from nova_dmigrate.virt import conditions, volumes
from nova_dmigrate.virt.guest import NovaGuest
from nova_dmigrate.virt.policy import Policy

LOG = logging.getLogger(__name__)

_POLL = 0.25  # seconds
_CANCELLED = "it was cancelled"

Operation = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Order:
    """What Nova wants of one live migration.

    :ivar instance: a nova.objects.Instance; :ivar guest: its nova.virt.libvirt.guest.Guest, the
        one that Nova's monitor has.
    :ivar flags: of virDomainMigrateToURI3, as Nova has them.
    :ivar destination: the host's name.
    :ivar migrate_data: a nova.objects.LibvirtLiveMigrateData, filled by the destination.
    :ivar bandwidth: the most that goes over the network, in bytes a second; 0 for no cap.
    :ivar downtime_limit: QEMU's, in milliseconds, until Nova sets one.
    """

    instance: Any
    guest: Any
    policy: Policy
    flags: int
    destination: str
    migrate_data: Any
    bandwidth: int
    downtime_limit: int


class Relaying:
    """Carries out one order. Call :meth:`run` once; the others may be called meanwhile.

    :param configuration: loads nova-dmigrate's own; may raise ConfigurationError.
    :param tell: is given the summary. Must not raise.
    """

    def __init__(
        self,
        order: Order,
        configuration: Callable[[], cfg.ConfigOpts],
        tell: Callable[[MigrationSummary], None],
    ) -> None:
        self._order = order
        self._configuration = configuration
        self._tell_all = tell
        self._id = new_id()
        instance = order.instance
        self._account = Account(
            self._id, instance.uuid, instance.name, instance.host, order.destination
        )
        self._ends = contextlib.ExitStack()
        self._guest: NovaGuest | None = None
        self._job: Job | None = None
        self._retry = False
        self._post_copy = False
        self._put_back: int | None = None
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._begun = False

    def run(self, operation: Operation, disks: Sequence[str] = ()) -> None:
        """Migrate, or have the monitor told why not. What ``operation`` raises is raised here, too.

        :param operation: Nova's own.
        :param disks: local disks that it copies along.
        """
        try:
            try:
                relayed = self._prepare(disks)
            except exception.FallBack as reason:
                self._run_ordinary(operation, reason)
            else:
                self._run_relayed(operation, relayed)
        except exception.MigrationCancelled:
            self._pretend("VIR_DOMAIN_JOB_CANCELLED")
            self._tell(CANCELLED, _CANCELLED)

    def cancel(self) -> bool:
        """Give up what has not begun; whether it had not.

        What libvirt has begun is only noted to be unwanted: it is for the caller to abort it.
        """
        with self._lock:
            self._cancelled.set()
            return not self._begun

    # The two ways

    def _run_relayed(self, operation: Operation, relayed: RelayedMigration) -> None:
        failure: Exception | None = None
        try:
            with self._steered(relayed):
                operation()
        except exception.MigrationCancelled:
            self._leave(relayed, completed=False)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, Nova's own way deals with it
            failure = error
        self._leave(relayed, completed=failure is None)
        if failure is None:
            self._tell(COMPLETED)
        elif self._may_retry():
            why = self._account.relay_failure or str(failure)
            reason = because(Reason.RELAY_FAILED, self._order.instance.uuid, error=why)
            # Nova, which has set it once, does not know that QEMU was held back
            self._put_back = relayed.downtime_limit
            self._run_ordinary(operation, reason)
        else:
            self._tell(self._state_of_failure(), str(failure))
            raise failure

    def _run_ordinary(self, operation: Operation, reason: exception.FallBack) -> None:
        if self._order.policy is Policy.REQUIRED:
            self._refuse(reason)
            return
        LOG.info("%s; the migration is the ordinary one", reason)
        self._begin()
        try:
            with self._steered(None):
                self._operate(operation)
        except exception.MigrationCancelled:
            raise
        except Exception as error:
            self._tell(self._state_of_failure(), str(error), reason)
            raise
        self._tell(COMPLETED, None, reason)

    def _operate(self, operation: Operation) -> None:
        """Nova's operation; anew while the destination has to clean up what the relays' attempt has
        left there.

        :raises MigrationCancelled: it was cancelled meanwhile.
        """
        end = time.monotonic() + leftovers.PATIENCE
        while True:
            try:
                return operation()
            except Exception as error:
                if not leftovers.in_the_way(str(error)) or time.monotonic() > end:
                    raise
                LOG.info("The destination has to clean up: %s", error)
            if self._cancelled.wait(leftovers.PAUSE):
                raise self._cancellation()

    def _refuse(self, reason: exception.FallBack) -> None:
        """The migration fails; nothing has been done to the guest.

        Nothing is raised: Nova would take the server for broken. A job that has failed is what it
        rolls back.
        """
        LOG.error("%s; without the relays it is not migrated (policy: required)", reason)
        self._pretend("VIR_DOMAIN_JOB_FAILED")
        self._tell(FAILED, f"required, but {reason.kwargs['reason']}")

    # Before libvirt is asked for anything

    def _prepare(self, disks: Sequence[str]) -> RelayedMigration:
        """Relays that are ready.

        :raises FallBack: the migration has to be the ordinary one.
        :raises MigrationCancelled: it was cancelled.
        """
        instance = self._order.instance.uuid
        try:
            with contextlib.ExitStack() as stack:
                relayed = self._open(stack, conditions.NovasWay(self._order.flags, disks))
                self._ends = stack.pop_all()
                return relayed
        except (exception.FallBack, exception.MigrationCancelled):
            raise
        except exception.ConfigurationError as error:
            raise because(Reason.CONFIGURATION, instance, error=error) from error
        except Exception as error:
            # Nothing of ours may keep a server from being migrated as it always was
            LOG.exception("Instance %s: the relays cannot be prepared", instance)
            why = f"{type(error).__name__}: {error}"
            raise because(Reason.UNEXPECTED, instance, error=why) from error

    def _open(self, stack: contextlib.ExitStack, way: conditions.NovasWay) -> RelayedMigration:
        order, config = self._order, self._configuration()
        self._enter("checking")
        settings = settings_from(config)
        self._retry = settings.retry_ordinary
        guest = self._guest = NovaGuest(order.guest)
        request = conditions.request_for(
            guest.facts,
            order.policy,
            config,
            order.instance.host,
            order.destination,
            volumes.address_in(order.migrate_data),
            order.bandwidth,
        )
        conditions.examine(guest.facts, way, request)
        uuid = order.instance.uuid
        peers = stack.enter_context(
            open_peers(request, config, settings, uuid, guest.facts.channel)
        )
        source, destination = (
            ask_host(host, uuid, settings.host_timeout, lambda: self._enter("checking"))
            for host in (peers.source, peers.destination)
        )
        preflight.hosts_agree(guest.facts, source, destination)
        preflight.encrypted_as_well(guest.facts, way.tls, source)
        subject = Guest(
            memory=guest.facts.memory,
            volumes=preflight.volumes_of(
                guest.facts, destination.drivers, volumes.of_destination(order.migrate_data)
            ),
            layout=guest.memory_layout,
            runs_here=guest.runs_here,
            connected=True,
        )
        relayed = RelayedMigration(
            self._id,
            uuid,
            subject,
            peers,
            settings,
            terms_of(request, settings, source, destination),
            source.socket_directory,
            order.downtime_limit,
            enter=self._enter,
            map_first=order.policy is Policy.REQUIRED,
        )
        return stack.enter_context(relayed)

    def _enter(self, phase: str) -> None:
        """The next step of the preparation begins.

        :raises MigrationCancelled: it was cancelled.
        """
        if self._cancelled.is_set():
            raise self._cancellation()
        self._account.phases.enter(phase)

    def _begin(self) -> None:
        """libvirt is asked to migrate now.

        :raises MigrationCancelled: it was cancelled before.
        """
        with self._lock:
            if self._cancelled.is_set() and not self._begun:
                raise self._cancellation()
            self._begun = True
        self._account.phases.enter("migrating")

    def _cancellation(self) -> exception.MigrationCancelled:
        return exception.MigrationCancelled(instance=self._order.instance.uuid, reason=_CANCELLED)

    # While libvirt migrates

    @contextlib.contextmanager
    def _steered(self, relayed: RelayedMigration | None) -> Iterator[None]:
        """The guest does what the relays need, if there are any, and is looked after."""
        guest, over = self._order.guest, threading.Event()
        original = {name: getattr(guest, name) for name in ("migrate", *_NOTED)}

        def migrate(*arguments: Any, **options: Any) -> None:
            self._begin()
            if relayed is not None:
                options = rerouted(options, relayed.uri)
            original["migrate"](*arguments, **options)

        def set_limit(milliseconds: int) -> None:
            if relayed is not None:
                relayed.downtime_limit = milliseconds

        def abort_job() -> None:
            self._cancelled.set()
            original["abort_job"]()

        def start_post_copy() -> None:
            original["migrate_start_postcopy"]()
            self._post_copy = True

        changes: dict[str, Any] = {
            "migrate": migrate,
            "abort_job": abort_job,
            "migrate_start_postcopy": start_post_copy,
        }
        if relayed is not None:
            changes["migrate_configure_max_downtime"] = set_limit
        follower = threading.Thread(
            target=self._follow, args=(relayed, over), name="dmigrate-follow", daemon=True
        )
        vars(guest).update(changes)
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()
            self._account.phases.enter("ended")
            for name in changes:
                del vars(guest)[name]

    def _follow(self, relayed: RelayedMigration | None, over: threading.Event) -> None:
        """Look after the migration until it is over: the thread of this name."""
        while not over.wait(_POLL):
            try:
                self._look(relayed)
            except Exception:  # noqa: BLE001 - the migration goes on in any case
                LOG.exception("Instance %s cannot be followed", self._order.instance.uuid)

    def _look(self, relayed: RelayedMigration | None) -> None:
        guest, phases = self._guest, self._account.phases
        if guest is None:
            return
        job = guest.job()
        self._job = job or self._job
        if relayed is not None:
            relayed.follow(None if job is None else guest.set_max_downtime)
            if relayed.converging and phases.current == "migrating":
                phases.enter("converging")
        elif job is not None:
            self._account.note_job(job)
            if self._put_back is not None and guest.set_max_downtime(self._put_back):
                self._put_back = None

    # The end

    def _leave(self, relayed: RelayedMigration, completed: bool) -> None:
        """Give up the relays. The guest is where it is, so nothing of this may fail."""
        try:
            self._account.note_map(relayed, completed)
            self._ends.close()
        except Exception:  # noqa: BLE001
            LOG.exception("Instance %s: the relays are left alone", self._order.instance.uuid)
        self._account.note_relays(relayed)

    def _may_retry(self) -> bool:
        """Whether a migration that has failed was the relays' failure, or never began, and nothing
        is lost."""
        return bool(
            self._retry
            and self._order.policy is Policy.PREFERRED
            and not self._cancelled.is_set()
            and not self._post_copy
            and self._account.worth_another_try
            and self._guest is not None
            and self._guest.runs_here()
        )

    def _state_of_failure(self) -> str:
        return CANCELLED if self._cancelled.is_set() else FAILED

    def _pretend(self, job: str) -> None:
        """Have Nova's monitor see a job that has ended so. There has been none."""
        kind = getattr(libvirt_driver.libvirt, job)
        self._order.guest.get_job_info = lambda: libvirt_guest.JobInfo(type=kind)

    def _tell(
        self, state: str, error: str | None = None, fallback: exception.FallBack | None = None
    ) -> None:
        if self._account.phases.current != "ended":
            self._account.phases.enter("ended")
        self._tell_all(self._account.summary(state, error, fallback, self._job or Job()))


#: What else of a guest Nova's monitor calls that has to be noted.
_NOTED = ("abort_job", "migrate_start_postcopy")


def rerouted(options: dict[str, Any], uri: str) -> dict[str, Any]:
    """Nova's options for ``guest.migrate`` with the source relay as the destination of the stream.

    The relays keep the cap of the bandwidth, of which only what goes over the network counts, and
    they encrypt; QEMU's own encryption and further connections would hide pages from them.
    """
    libvirt = libvirt_driver.libvirt
    hidden = libvirt.VIR_MIGRATE_TLS | getattr(libvirt, "VIR_MIGRATE_PARALLEL", 0)
    changed = dict(options, migrate_uri=uri, bandwidth=0, flags=options["flags"] & ~hidden)
    if "parallel" in options:
        changed["parallel"] = 0
    return changed
