# SPDX-License-Identifier: Apache-2.0
"""What can be said about a migration before anything is changed: may it go through the relays?

`examine` looks at the domain and at what is asked for; `hosts_agree` at what both host services
say of themselves. What they find missing is raised as `FallBack`, in the order of the operator's
interest; `volumes_of` names the disks that the destination may read. Who wants to know all that is
amiss has the same from `domain_obstacles`, `host_obstacles`, `pair_obstacles` and `disks_of`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from nova_dmigrate import exception
from nova_dmigrate.migration.domain import Disk, Domain
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.request import AgentTransport, MigrationRequest, Mode
from nova_dmigrate.rpc.channel import PORT_NAME
from nova_dmigrate.rpc.host_messages import HostState
from nova_dmigrate.volumes import IMAGE_DRIVERS, ImageLocation, VolumeSpec
from nova_dmigrate.volumes.iscsi_unit import SCHEME

#: libvirt from which on the migration's URI may be unix:PATH.
_UNIX_SOCKETS = 6_008_000
#: The oldest QEMU that is tried, numbered as libvirt does.
_OLDEST_QEMU = 7_002_000
#: Kinds of disks in the XML, or protocols of network disks, and the driver that reads them.
_DRIVERS = {"block": "block", "file": "block", "iscsi": "iscsi", "rbd": "rbd"}
#: Formats of devices and files that are not raw, and the driver that reads them.
_FORMAT_DRIVERS = {"qcow2": "nbd"}
#: What of drivers reads it where it is encrypted by QEMU, and in what formats.
_ENCRYPTED, _ENCRYPTED_FORMATS = ("block", "iscsi"), ("raw", "qcow2")


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """What the destination has of a disk.

    :ivar location: where it has it.
    :ivar obstacle: why it cannot be read there, as the rest of a sentence about the disk.
    """

    location: str = ""
    obstacle: str = ""


_NOT_THERE = Elsewhere(obstacle="is no volume that the destination has connected")

#: Why the migration has to be the ordinary one, one reason after the other.
Obstacles = Iterator[exception.FallBack]


def examine(domain: Domain, request: MigrationRequest) -> None:
    """Check what the domain and the request alone tell.

    :raises FallBack: the migration has to be the ordinary one.
    """
    _expect_none(domain_obstacles(domain, request))


def domain_obstacles(domain: Domain, request: MigrationRequest) -> Obstacles:
    """What the domain and the request alone tell against relays."""
    if request.mode is Mode.ORDINARY:
        yield because(Reason.ASKED, domain.name)
    if domain.host_devices:
        devices = ", ".join(domain.host_devices)
        yield because(Reason.HOST_DEVICES, domain.name, devices=devices)
    if request.agent_transport is AgentTransport.NONE:
        yield because(Reason.NO_AGENT, domain.name)
    if request.agent_transport is AgentTransport.CHANNEL and domain.channel is None:
        yield because(Reason.NO_AGENT_PORT, domain.name, port=PORT_NAME)


def volumes_of(
    domain: Domain, drivers: Sequence[str], elsewhere: Mapping[str, Elsewhere] | None = None
) -> tuple[VolumeSpec, ...]:
    """The volumes that the destination may read.

    :param drivers: what the destination can read with.
    :param elsewhere: all that the destination has, by the disk's serial; None if it has the disks
        where the source has them.
    :raises FallBack: there is none.
    """
    found, missing = [], []
    for disk, volume in disks_of(domain, drivers, elsewhere):
        if isinstance(volume, VolumeSpec):
            found.append(volume)
        else:
            missing.append(f"{disk.target} {volume}")
    if not found:
        raise because(Reason.NO_VOLUMES, domain.name, disks="; ".join(missing) or "there are none")
    return tuple(found)


def disks_of(
    domain: Domain, drivers: Sequence[str], elsewhere: Mapping[str, Elsewhere] | None = None
) -> Iterator[tuple[Disk, VolumeSpec | str]]:
    """All disks: each with the volume that the destination may read, or with the reason why it may
    not, as the rest of a sentence about the disk. Parameters as of `volumes_of`.
    """
    for disk in domain.disks:
        there = Elsewhere(disk.location)
        if elsewhere is not None:
            there = elsewhere.get(disk.serial, _NOT_THERE)
        # Of what others have connected it is not told in what format they have it
        driver = _driver(disk, raw_only=elsewhere is not None)
        obstacle = _unreadable(disk, driver, drivers) or there.obstacle
        if driver is None or obstacle:
            yield disk, obstacle
        else:
            location = there.location
            if driver in IMAGE_DRIVERS:
                location = _image(disk, location)
            yield disk, VolumeSpec(disk.serial, driver, location)


def _driver(disk: Disk, raw_only: bool) -> str | None:
    """Name of the driver for a disk; None if there is none."""
    driver = _DRIVERS.get(disk.protocol or disk.kind)
    if disk.encrypted:
        known = driver in _ENCRYPTED and disk.format in _ENCRYPTED_FORMATS and disk.key
        driver = "luks" if known and not (disk.protocol and disk.format == "qcow2") else None
    elif disk.format != "raw" and driver is not None:
        driver = None if disk.protocol else _FORMAT_DRIVERS.get(disk.format)
    return None if raw_only and driver in IMAGE_DRIVERS else driver


def _image(disk: Disk, location: str) -> str:
    """:param location: where the destination has it."""
    luks = disk.encrypted and disk.format == "raw"
    return str(ImageLocation("luks" if luks else disk.format, location, disk.key))


def _unreadable(disk: Disk, driver: str | None, drivers: Sequence[str]) -> str | None:
    """Why a disk is not read at the destination; None if it is."""
    lacking = driver is None or driver not in drivers
    if disk.protocol == "iscsi" and not disk.location.startswith(SCHEME):
        return "is an iSCSI unit that is not reached by its address alone"
    if lacking and disk.encrypted:
        return "is encrypted by QEMU, with a key that relays are not given"
    if lacking:
        kind = f"{disk.protocol or disk.kind} disk"
        if disk.format != "raw":
            kind += f" of format {disk.format}"
        return f"is a {kind}, for which there is no driver"
    if not disk.serial:
        return "has no serial, by which guest and host could name it alike"
    if not disk.direct:
        return "is cached by its host (cache must be none or directsync)"
    return None


def host_ready(host: HostState, instance: str) -> None:
    """Check what the service of one host says of itself.

    :raises FallBack: the migration has to be the ordinary one.
    """
    _expect_none(host_obstacles(host, instance))


def host_obstacles(host: HostState, instance: str) -> Obstacles:
    """What the service of one host tells against relays there."""
    if host.draining:
        yield because(Reason.HOST_DRAINING, instance, host=host.host)
    if host.obstacle:
        yield because(Reason.CONFINED, instance, host=host.host, why=host.obstacle)
    if host.libvirt_version is not None:
        yield from _old_libvirt(host.libvirt_version, f"host {host.host}", instance)


def encrypted_as_well(domain: Domain, encrypted: bool, source: HostState) -> None:
    """See that relays encrypt what QEMU would.

    :param encrypted: QEMU shall encrypt its stream.
    :raises FallBack: they do not: only the ordinary migration is as safe as was asked for.
    """
    if encrypted and not source.tls:
        raise because(Reason.NATIVE_TLS, domain.name)


def libvirt_can(version: int | None, place: str, instance: str) -> None:
    """See that a libvirt migrates over UNIX sockets.

    :param version: as libvirt has it, a million times the major one and so on; None if it is not
        known, which is no obstacle: a libvirt that has gone shows in what is asked of it next.
    :param place: where it is, for people.
    :raises FallBack: it does not.
    """
    if version is not None:
        _expect_none(_old_libvirt(version, place, instance))


def _old_libvirt(version: int, place: str, instance: str) -> Obstacles:
    if version < _UNIX_SOCKETS:
        text = version_text(version)
        yield because(Reason.OLD_LIBVIRT, instance, version=text, place=place)


def untried_qemu(version: int) -> str | None:
    """What there is to say of a QEMU that is older than any that was tried; None if it is not.

    No migration is an ordinary one for that: relays pass through what they do not understand.

    :param version: as libvirt has it.
    """
    if version >= _OLDEST_QEMU:
        return None
    oldest = version_text(_OLDEST_QEMU)
    return f"QEMU {version_text(version)} is older than any that was tried, {oldest} the first"


def version_text(version: int) -> str:
    """A version that libvirt tells, of itself or of QEMU, as people write it."""
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"


def hosts_agree(domain: Domain, source: HostState, destination: HostState) -> None:
    """Check what both host services say of themselves.

    :raises FallBack: the migration has to be the ordinary one.
    """
    host_ready(source, domain.name)
    host_ready(destination, domain.name)
    _expect_none(pair_obstacles(domain, source, destination))


def pair_obstacles(domain: Domain, source: HostState, destination: HostState) -> Obstacles:
    """What stands between a domain and relays of both hosts, each of which may be ready."""
    yield from _sockets_for_others(domain, source, destination)
    yield from _incompatible(source, destination, domain.name)


def hosts_compatible(source: HostState, destination: HostState, instance: str) -> None:
    """Check that relays of both hosts can work together, whatever the domain.

    :raises FallBack: they cannot.
    """
    _expect_none(_incompatible(source, destination, instance))


def _incompatible(source: HostState, destination: HostState, instance: str) -> Obstacles:
    if source.tls != destination.tls:
        yield because(Reason.TLS_DIFFERS, instance)
    if not set(source.wire_versions) & set(destination.wire_versions):
        yield because(Reason.WIRE_DIFFERS, instance)
    if source.socket_directory != destination.socket_directory:
        yield because(
            Reason.SOCKETS_DIFFER,
            instance,
            ours=source.socket_directory,
            theirs=destination.socket_directory,
        )


def _sockets_for_others(domain: Domain, source: HostState, destination: HostState) -> Obstacles:
    """Sockets of relays that are not for the user that QEMU runs as: it cannot use them, which
    libvirt tells too late.
    """
    user = domain.qemu_user
    # Numbers of accounts differ from host to host, but not root's
    pairs = [(source, source.qemu_user == user)]
    pairs.append((destination, (destination.qemu_user == 0) == (user == 0)))
    for host, right in pairs:
        if not right and None not in (user, host.qemu_user):
            why = f"QEMU runs as user {user}, they are for user {host.qemu_user} ([host]qemu_user)"
            yield because(Reason.CONFINED, domain.name, host=host.host, why=why)


def _expect_none(obstacles: Obstacles) -> None:
    """:raises FallBack: the first of them."""
    for obstacle in obstacles:
        raise obstacle
