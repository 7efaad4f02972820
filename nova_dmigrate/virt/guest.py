# SPDX-License-Identifier: Apache-2.0
"""One domain as Nova's libvirt driver holds it: what the relays' side has to know and to set.

The libvirt module is always Nova's, which may be another one than ours (its tests' one).
"""

import logging
from collections.abc import Callable
from typing import Any

from nova.virt.libvirt import driver as libvirt_driver

from nova_dmigrate import exception
from nova_dmigrate.migration.domain import Domain, parse_domain
from nova_dmigrate.migration.job import Job
from nova_dmigrate.migration.waiting import Question, Setting

LOG = logging.getLogger(__name__)


class NovaGuest:
    """What there is to ask of a domain, and to have done, by the guest's methods as they are now,
    whatever becomes of them later.

    :param guest: a nova.virt.libvirt.guest.Guest.
    :param apart: given a binding in C, it gives one whose calls keep no other thread from its work,
        as those of the guest do not: where Nova has green threads, they all wait for such a call.
    :raises MigrationError: libvirt does not describe it.
    """

    def __init__(self, guest: Any, apart: Callable[[Any], Any] = lambda binding: binding) -> None:
        self._guest = guest
        self._apart = apart
        self._set_limit = guest.migrate_configure_max_downtime
        self._get_job = guest.get_job_info
        self._abort_job = guest.abort_job
        self._job = Question(self._look_at_job)
        self._limit = Setting(self._set_max_downtime)
        self._aborting = Question(self._abort)
        try:
            self.facts: Domain = parse_domain(guest.get_xml_desc())
        except libvirt_driver.libvirt.libvirtError as error:
            raise exception.MigrationError(
                instance=guest.uuid, reason=f"its domain cannot be looked at: {error}"
            ) from error

    def memory_layout(self) -> str:
        """What QEMU's monitor says to ``info mtree -f``.

        :raises MigrationError: if it says nothing.
        """
        import libvirt_qemu  # type: ignore[import-untyped]

        try:
            answer: str = self._apart(libvirt_qemu).qemuMonitorCommand(
                self._guest._domain,
                "info mtree -f",
                libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP,
            )
        except libvirt_driver.libvirt.libvirtError as error:
            raise exception.MigrationError(
                instance=self.facts.name, reason=f"its monitor does not answer: {error}"
            ) from error
        return answer

    def runs_here(self) -> bool:
        """Whether the domain still runs on this host; true if libvirt does not tell."""
        try:
            return bool(self._guest.is_active())
        except libvirt_driver.libvirt.libvirtError as error:
            return bool(error.get_error_code() != libvirt_driver.libvirt.VIR_ERR_NO_DOMAIN)

    # libvirt asks QEMU's monitor without any limit of time: nobody waits for these

    def set_max_downtime(self, milliseconds: int) -> bool:
        """Set QEMU's downtime limit; whether that has been done. To be called until it has."""
        return self._limit.set(milliseconds)

    def _set_max_downtime(self, milliseconds: int) -> bool:
        try:
            self._set_limit(milliseconds)
        except libvirt_driver.libvirt.libvirtError as error:
            LOG.debug("%s: no downtime limit of %d ms: %s", self.facts.name, milliseconds, error)
            return False
        return True

    def abort(self) -> None:
        """Have libvirt end the migration, if there is one, sooner or later."""
        self._aborting.answer()

    def abort_is_over(self, seconds: float) -> bool:
        """Wait so long at most until nothing is being aborted that might be the next migration;
        whether that is so."""
        return self._aborting.wait(seconds)

    def _abort(self) -> None:
        try:
            self._abort_job()
        except libvirt_driver.libvirt.libvirtError as error:
            LOG.info("%s: the migration cannot be aborted: %s", self.facts.name, error)

    def job(self) -> Job | None:
        """How far the migration is; None unless one is under way, or if it is not told in a
        moment."""
        return self._job.answer()

    def _look_at_job(self) -> Job | None:
        try:
            info = self._get_job()
        except libvirt_driver.libvirt.libvirtError:
            return None
        if info.type != libvirt_driver.libvirt.VIR_DOMAIN_JOB_UNBOUNDED:
            return None
        return Job(
            remaining=info.memory_remaining,
            transferred=info.memory_processed,
            total=info.memory_total,
            passes=info.memory_iteration,
            statistics={
                name: value
                for name, value in vars(info).items()
                if value and isinstance(value, (int, float))
            },
        )
