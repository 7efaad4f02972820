# SPDX-License-Identifier: Apache-2.0
"""One live migration through the relays, around Nova's own operation.

Nova's operation is run with a guest that is changed (`steering`), in a thread beside which Nova's
monitor runs; a third one looks after the relays (`following`). Where they fail, Nova's operation is
run once more, with the guest almost as it was.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.migration import leftovers
from nova_dmigrate.migration.account import Account
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.job import Job
from nova_dmigrate.migration.relayed import RelayedMigration
from nova_dmigrate.migration.summary import (
    CANCELLED,
    COMPLETED,
    FAILED,
    MigrationSummary,
    new_id,
)
from nova_dmigrate.virt.following import HungRelays, followed
from nova_dmigrate.virt.guest import NovaGuest
from nova_dmigrate.virt.policy import Policy
from nova_dmigrate.virt.preparing import Order, Prepared, prepare
from nova_dmigrate.virt.steering import Steering

LOG = logging.getLogger(__name__)

#: Seconds for libvirt to have done with an abort when the migration has ended.
_ABORT_PATIENCE = 20.0
_CANCELLED = "it was cancelled"

Operation = Callable[[], None]


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
        self._guest: NovaGuest | None = None
        self._job: Job | None = None
        self._put_back: int | None = None
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._begun = False
        self._steering = Steering(order.guest, self._begin, self._cancelled)

    def run(self, operation: Operation, disks: Sequence[str] = ()) -> None:
        """Migrate, or have the monitor told why not. What ``operation`` raises is raised here, too.

        :param operation: Nova's own.
        :param disks: local disks that it copies along.
        """
        try:
            try:
                prepared = self._prepare(disks)
            except exception.FallBack as reason:
                self._run_ordinary(operation, reason)
            else:
                self._run_relayed(operation, prepared)
        except exception.MigrationCancelled:
            self._steering.pretend("VIR_DOMAIN_JOB_CANCELLED")
            self._tell(CANCELLED, _CANCELLED)

    def cancel(self) -> bool:
        """Give up what has not begun; whether it had not.

        What libvirt has begun is only noted to be unwanted: it is for the caller to abort it.
        """
        with self._lock:
            self._cancelled.set()
            return not self._begun

    # The two ways

    def _run_relayed(self, operation: Operation, relays: Prepared) -> None:
        uuid = self._order.instance.uuid
        hung = HungRelays(
            uuid,
            relays.relayed,
            relays.guest,
            relays.settings.stall_timeout,
            leave=lambda: self._end(relays),
        )
        failure: Exception | None = None
        try:
            look = functools.partial(self._look_at, relays, hung)
            with self._steered(relays.relayed, look, hung.doubt):
                operation()
        except exception.MigrationCancelled:
            self._leave(relays, completed=False)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, Nova's own way deals with it
            failure = error
        self._leave(relays, completed=failure is None)
        if failure is None:
            self._tell(COMPLETED)
            return
        failed = self._account.relay_failure
        if self._may_retry(relays):
            reason = because(Reason.RELAY_FAILED, uuid, error=failed or failure)
            # Nova, which has set it once, does not know that QEMU was held back
            self._put_back = relays.relayed.downtime_limit
            self._run_ordinary(operation, reason)
            return
        self._tell(self._state_of_failure(), f"{failed} ({failure})" if failed else str(failure))
        # As where it is refused: a server that relays have done no harm to is not broken
        if failed is None or not self._unharmed(relays.guest):
            raise failure

    def _run_ordinary(self, operation: Operation, reason: exception.FallBack) -> None:
        if self._order.policy is Policy.REQUIRED:
            self._refuse(reason)
            return
        LOG.info("%s; the migration is the ordinary one", reason)
        self._begin()
        try:
            with self._steered(None, self._look):
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
        self._steering.pretend("VIR_DOMAIN_JOB_FAILED")
        self._tell(FAILED, f"required, but {reason.kwargs['reason']}")

    # Before libvirt is asked for anything

    def _prepare(self, disks: Sequence[str]) -> Prepared:
        """Relays that are ready.

        :raises FallBack: the migration has to be the ordinary one.
        :raises MigrationCancelled: it was cancelled.
        """
        instance = self._order.instance.uuid
        try:
            config = self._configuration()
            guest = self._guest = NovaGuest(self._order.guest, self._order.apart)
            return prepare(self._id, self._order, guest, disks, config, self._enter)
        except (exception.FallBack, exception.MigrationCancelled):
            raise
        except exception.ConfigurationError as error:
            raise because(Reason.CONFIGURATION, instance, error=error) from error
        except Exception as error:
            # Nothing of ours may keep a server from being migrated as it always was
            LOG.exception("Instance %s: the relays cannot be prepared", instance)
            why = f"{type(error).__name__}: {error}"
            raise because(Reason.UNEXPECTED, instance, error=why) from error

    def _enter(self, phase: str) -> None:
        """The next step of the preparation begins.

        :raises MigrationCancelled: it was cancelled.
        """
        if self._cancelled.is_set():
            raise self._cancellation()
        self._account.phases.enter(phase)

    def _begin(self) -> None:
        """libvirt is asked to migrate now.

        :raises MigrationCancelled: it was cancelled before. Libvirt, if it was asked to abort
            already, had nothing to abort then.
        """
        with self._lock:
            if self._cancelled.is_set():
                raise self._cancellation()
            self._begun = True
        self._account.phases.enter("migrating")

    def _cancellation(self) -> exception.MigrationCancelled:
        return exception.MigrationCancelled(instance=self._order.instance.uuid, reason=_CANCELLED)

    # While libvirt migrates

    @contextlib.contextmanager
    def _steered(
        self,
        relayed: RelayedMigration | None,
        look: Callable[[], None],
        doubt: Callable[[], str | None] = lambda: None,
    ) -> Iterator[None]:
        """The guest does what the relays need, if there are any, and is looked after."""
        steered = self._steering.through(relayed, doubt)
        try:
            with steered, followed(self._order.instance.uuid, look):
                yield
        finally:
            self._account.phases.enter("ended")

    def _look(self) -> None:
        """How far the ordinary migration is."""
        guest = self._guest
        if guest is None:
            return
        job = self._note_job(guest)
        if job is not None:
            self._account.note_job(job)
            if self._put_back is not None and guest.set_max_downtime(self._put_back):
                self._put_back = None

    def _look_at(self, relays: Prepared, hung: HungRelays) -> None:
        """How far the migration through relays is, and what they need of it."""
        relayed, guest = relays.relayed, relays.guest
        job = self._note_job(guest)
        relayed.follow(None if job is None else guest.set_max_downtime)
        if relayed.converging and self._account.phases.current == "migrating":
            self._account.phases.enter("converging")
        if not self._steering.post_copy:
            hung.look(job)

    def _note_job(self, guest: NovaGuest) -> Job | None:
        job = guest.job()
        self._job = job or self._job
        return job

    # The end

    def _leave(self, relays: Prepared, completed: bool) -> None:
        """Give up the relays, and note what they and the buffer map have come to."""
        self._account.note_map(relays.relayed, completed)
        self._end(relays)
        self._account.note_relays(relays.relayed)

    def _end(self, relays: Prepared) -> None:
        """Have the relays ended. The guest is where it is, so nothing of this may fail."""
        try:
            relays.ends.close()
        except Exception:  # noqa: BLE001
            LOG.exception("Instance %s: the relays are left alone", self._order.instance.uuid)

    def _may_retry(self, relays: Prepared) -> bool:
        """Whether a migration that has failed was the relays' failure, or never began, and nothing
        is lost.

        Not with a guest that Nova has paused to force the end: what is paused when a migration
        begins stays so at the destination. Nova lets it go on when the migration has failed.
        """
        if not (
            relays.settings.retry_ordinary
            and self._order.policy is Policy.PREFERRED
            and self._account.worth_another_try
            and not self._steering.paused
            and self._unharmed(relays.guest)
        ):
            return False
        with self._lock:
            # Until the next one begins, whoever cancels has nothing that libvirt could abort
            self._begun = self._cancelled.is_set()
            return not self._begun

    def _unharmed(self, guest: NovaGuest) -> bool:
        """Whether the guest runs as if nothing had been, and will go on doing so."""
        return bool(
            not self._cancelled.is_set()
            and not self._steering.post_copy
            and guest.abort_is_over(_ABORT_PATIENCE)
            and guest.runs_here()
        )

    def _state_of_failure(self) -> str:
        return CANCELLED if self._cancelled.is_set() else FAILED

    def _tell(
        self, state: str, error: str | None = None, fallback: exception.FallBack | None = None
    ) -> None:
        if self._account.phases.current != "ended":
            self._account.phases.enter("ended")
        self._tell_all(self._account.summary(state, error, fallback, self._job or Job()))
