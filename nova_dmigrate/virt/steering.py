# SPDX-License-Identifier: Apache-2.0
"""The one guest that Nova's operation and Nova's monitor have, made to do what relays need.

Nova's operation calls its ``migrate``. Nova's monitor asks it for the job's state, sets its
downtime limit, aborts it, pauses it, or has it switched to post-copy.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest

from nova_dmigrate.migration.relayed import RelayedMigration


class Steering:
    """What is changed of one guest while libvirt migrates it, and what is noted of it.

    :param guest: a nova.virt.libvirt.guest.Guest.
    :param begin: called before libvirt is asked to migrate; what it raises Nova's operation raises.
    :param cancelled: set when Nova's monitor has the migration aborted.
    :ivar post_copy: whether a switch to post-copy was asked for, after which the guest may run at
        the destination.
    :ivar paused: whether the guest was paused so that the migration comes to its end.
    """

    def __init__(self, guest: Any, begin: Callable[[], None], cancelled: threading.Event) -> None:
        self._guest = guest
        self._begin = begin
        self._cancelled = cancelled
        self.post_copy = False
        self.paused = False

    @contextlib.contextmanager
    def through(
        self,
        relayed: RelayedMigration | None,
        doubt: Callable[[], str | None] = lambda: None,
    ) -> Iterator[None]:
        """Meanwhile the guest migrates through these relays, or as Nova has it without any.

        :param doubt: tells why the guest must not be switched to post-copy now; None if it may.
        """
        changes = self._changes(relayed, doubt)
        vars(self._guest).update(changes)
        try:
            yield
        finally:
            for name in changes:
                del vars(self._guest)[name]

    def pretend(self, job: str) -> None:
        """Have Nova's monitor see a job that has ended so. There has been none."""
        kind = getattr(libvirt_driver.libvirt, job)
        self._guest.get_job_info = lambda: libvirt_guest.JobInfo(type=kind)

    def _changes(
        self, relayed: RelayedMigration | None, doubt: Callable[[], str | None]
    ) -> dict[str, Any]:
        """Methods by name, in the place of the guest's own."""
        guest, libvirt = self._guest, libvirt_driver.libvirt
        own_migrate, own_abort = guest.migrate, guest.abort_job
        own_job_info, own_post_copy = guest.get_job_info, guest.migrate_start_postcopy
        own_pause = guest.pause

        def migrate(*arguments: Any, **options: Any) -> None:
            self._begin()
            if relayed is not None:
                options = rerouted(options, relayed.uri)
            own_migrate(*arguments, **options)

        def get_job_info() -> Any:
            info = own_job_info()
            # So libvirt tells of a job that it still cleans up after. It may not be the last one,
            # and at the first such word the monitor would put back what the next one needs. What
            # has become of it all, the monitor sees when the operation is over
            unsuccessful = (libvirt.VIR_DOMAIN_JOB_FAILED, libvirt.VIR_DOMAIN_JOB_CANCELLED)
            if info.type in unsuccessful and not self._cancelled.is_set():
                info.type = libvirt.VIR_DOMAIN_JOB_NONE
            return info

        def abort_job() -> None:
            self._cancelled.set()
            own_abort()

        def start_post_copy() -> None:
            why = doubt()
            if why is not None:
                # The guest would stand still here, and perhaps never run there. Nova tells the
                # reason, and goes on without
                raise libvirt.libvirtError(f"not through relays that may have failed: {why}")
            self.post_copy = True
            try:
                own_post_copy()
            except libvirt.libvirtError:
                self.post_copy = False
                raise

        def pause() -> None:
            self.paused = True
            try:
                own_pause()
            except Exception:
                self.paused = False
                raise

        changes: dict[str, Any] = {
            "migrate": migrate,
            "get_job_info": get_job_info,
            "abort_job": abort_job,
            "pause": pause,
            "migrate_start_postcopy": start_post_copy,
        }
        if relayed is not None:

            def set_limit(milliseconds: int) -> None:
                relayed.downtime_limit = milliseconds

            changes["migrate_configure_max_downtime"] = set_limit
        return changes


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
