# SPDX-License-Identifier: Apache-2.0
"""What can be said about a migration before anything is changed: may it go through the relays?

`examine` looks at the domain and at what is asked for; `hosts_agree` at what both host services
say of themselves. What they find missing is raised as `FallBack`, in the order of the operator's
interest; `volumes_of` names the disks that the destination may read.
"""

from collections.abc import Mapping, Sequence

from nova_dmigrate.migration.domain import Disk, Domain
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.request import AgentTransport, MigrationRequest, Mode
from nova_dmigrate.rpc.channel import PORT_NAME
from nova_dmigrate.rpc.host_messages import HostState
from nova_dmigrate.volumes import VolumeSpec

#: Kinds of disks in the XML, and the driver that reads them.
_DRIVERS = {"block": "block", "file": "block"}


def examine(domain: Domain, request: MigrationRequest) -> None:
    """Check what the domain and the request alone tell.

    :raises FallBack: the migration has to be the ordinary one.
    """
    if request.mode is Mode.ORDINARY:
        raise because(Reason.ASKED, domain.name)
    if domain.host_devices:
        devices = ", ".join(domain.host_devices)
        raise because(Reason.HOST_DEVICES, domain.name, devices=devices)
    if request.agent_transport is AgentTransport.NONE:
        raise because(Reason.NO_AGENT, domain.name)
    if request.agent_transport is AgentTransport.CHANNEL and domain.channel is None:
        raise because(Reason.NO_AGENT_PORT, domain.name, port=PORT_NAME)


def volumes_of(
    domain: Domain, drivers: Sequence[str], elsewhere: Mapping[str, str] | None = None
) -> tuple[VolumeSpec, ...]:
    """The volumes that the destination may read.

    :param drivers: what the destination can read with.
    :param elsewhere: location at the destination of disks that have another one there, by serial.
    :raises FallBack: there is none.
    """
    elsewhere = elsewhere or {}
    found, missing = [], []
    for disk in domain.disks:
        reason = _unreadable(disk, drivers)
        if reason is None:
            location = elsewhere.get(disk.serial, disk.location)
            found.append(VolumeSpec(disk.serial, _DRIVERS[disk.kind], location))
        else:
            missing.append(f"{disk.target} {reason}")
    if not found:
        raise because(Reason.NO_VOLUMES, domain.name, disks="; ".join(missing) or "there are none")
    return tuple(found)


def _unreadable(disk: Disk, drivers: Sequence[str]) -> str | None:
    """Why a disk is not read at the destination; None if it is."""
    driver = _DRIVERS.get(disk.kind)
    if driver is None or driver not in drivers:
        return f"is a {disk.protocol or disk.kind} disk, for which there is no driver"
    if not disk.serial:
        return "has no serial, by which guest and host could name it alike"
    if disk.format != "raw":
        return f"has format {disk.format}, not raw"
    if not disk.direct:
        return "is cached by its host (cache must be none or directsync)"
    return None


def hosts_agree(domain: Domain, source: HostState, destination: HostState) -> None:
    """Check what both host services say of themselves.

    :raises FallBack: the migration has to be the ordinary one.
    """
    for host in (source, destination):
        if host.draining:
            raise because(Reason.HOST_DRAINING, domain.name, host=host.host)
        if host.obstacle:
            raise because(Reason.CONFINED, domain.name, host=host.host, why=host.obstacle)
    if source.tls != destination.tls:
        raise because(Reason.TLS_DIFFERS, domain.name)
    if not set(source.wire_versions) & set(destination.wire_versions):
        raise because(Reason.WIRE_DIFFERS, domain.name)
    if source.socket_directory != destination.socket_directory:
        raise because(
            Reason.SOCKETS_DIFFER,
            domain.name,
            ours=source.socket_directory,
            theirs=destination.socket_directory,
        )
