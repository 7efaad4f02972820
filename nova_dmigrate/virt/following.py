# SPDX-License-Identifier: Apache-2.0
"""What is looked after while libvirt migrates, in a thread beside Nova's operation and monitor."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from nova_dmigrate.migration import stall
from nova_dmigrate.migration.job import Job
from nova_dmigrate.migration.relayed import RelayedMigration
from nova_dmigrate.virt.guest import NovaGuest

LOG = logging.getLogger(__name__)

_POLL = 0.25  # seconds


@contextlib.contextmanager
def followed(instance: str, look: Callable[[], None]) -> Iterator[None]:
    """Meanwhile ``look`` is called a few times a second. What it raises is logged.

    :param instance: UUID.
    """
    over = threading.Event()

    def follow() -> None:
        while not over.wait(_POLL):
            try:
                look()
            except Exception:  # noqa: BLE001 - the migration goes on in any case
                LOG.exception("Instance %s cannot be followed", instance)

    follower = threading.Thread(target=follow, name="dmigrate-follow", daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()


class HungRelays:
    """Sees that relays that hang do not hold a migration for ever.

    :param instance: UUID.
    :param stall_timeout: the relays' own, in seconds.
    :param leave: has the relays ended, called if libvirt's job does not end for them, perhaps more
        than once.
    """

    def __init__(
        self,
        instance: str,
        relayed: RelayedMigration,
        guest: NovaGuest,
        stall_timeout: float,
        leave: Callable[[], None],
    ) -> None:
        self._instance = instance
        self._relayed = relayed
        self._guest = guest
        self._leave = leave
        self._stall = stall.Stall(stall_timeout)
        self._given_up: float | None = None

    def look(self, job: Job | None) -> None:
        """End what will not go on; to be called several times a second, though not any more when
        the guest may run at the destination.

        :param job: what libvirt tells at this moment; None if nothing.
        """
        why = self._stall.reason(job, self._relayed.failure, self._relayed.silence)
        if why is None:
            return
        self._relayed.give_up(why)
        now = time.monotonic()
        if self._given_up is None:
            LOG.warning("Instance %s: %s; the migration is aborted", self._instance, why)
            self._given_up = now
        self._guest.abort()
        if now > self._given_up + stall.HUNG_PATIENCE:
            self._leave()

    def doubt(self) -> str | None:
        """Why these relays may not bring to its end what is begun now; None if they should."""
        return self._relayed.failure or self._stall.doubt()
