# SPDX-License-Identifier: Apache-2.0
"""What the host's service has to know of its libvirt: the disks of a running domain, for which it
vouches, how long one stood still that has come, and versions.
"""

from nova_dmigrate.migration import preflight
from nova_dmigrate.migration.libvirt_guest import LibvirtGuest, hypervisor_of
from nova_dmigrate.volumes import DRIVERS, VolumeSpec


def disks(connect: str, name: str) -> tuple[VolumeSpec, ...]:
    """Those that relays could read, where this host has them.

    :param connect: URI of this host's libvirt. :param name: the domain's name or UUID.
    :raises MigrationError: libvirt does not tell, there is no such domain, or it has none.
    """
    with LibvirtGuest(connect, name) as guest:
        return preflight.volumes_of(guest.facts, tuple(DRIVERS))


def downtime(connect: str, name: str) -> float | None:
    """Milliseconds for which a domain stood still when it came here; None if libvirt does not tell.

    :param connect: URI of this host's libvirt. :param name: the domain's name or UUID.
    :raises MigrationError: libvirt cannot be reached, or there is no such domain.
    """
    with LibvirtGuest(connect, name) as guest:
        job = guest.completed_job()
        return None if job is None else job.downtime_ms


def versions(connect: str) -> tuple[int, int | None]:
    """libvirt's and QEMU's, numbered as libvirt does; None for another hypervisor.

    :param connect: URI of this host's libvirt, which gets all the time that it wants.
    :raises HypervisorError: it cannot be reached, or does not tell.
    """
    found = hypervisor_of(connect, patience=None)
    return found.libvirt_version, found.version if found.kind == "QEMU" else None
