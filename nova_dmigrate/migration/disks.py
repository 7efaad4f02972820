# SPDX-License-Identifier: Apache-2.0
"""The disks of a running domain, for the host's service, which vouches for them."""

from nova_dmigrate.migration import preflight
from nova_dmigrate.migration.libvirt_guest import LibvirtGuest
from nova_dmigrate.volumes import DRIVERS, VolumeSpec


def of_domain(connect: str, name: str) -> tuple[VolumeSpec, ...]:
    """Those that relays could read, where this host has them.

    :param connect: URI of this host's libvirt. :param name: the domain's name or UUID.
    :raises MigrationError: libvirt does not tell, there is no such domain, or it has none.
    """
    with LibvirtGuest(connect, name) as guest:
        return preflight.volumes_of(guest.facts, tuple(DRIVERS))
