# SPDX-License-Identifier: Apache-2.0
"""All reasons not to use the volumes, or the relays, and how each of them is brought about.

with CASES["no-room"].provoke(place) as options:
    services.migrate(..., mode=CASES["no-room"].mode, **options)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.request import AgentTransport, Mode
from nova_dmigrate.rpc import host_messages
from tests.lab.guest import GuestError
from tests.lab.relays import PATIENCE, wait_until

if TYPE_CHECKING:  # whoever only reads the table needs no libvirt
    from tests.lab.demo.services import MigrationServices
    from tests.lab.domains import Domain
    from tests.lab.libvirt_host import LibvirtHost

_QEMU_CONF = Path("/etc/libvirt/qemu.conf")
_READ_ONLY = Path("/run/libvirt/libvirt-sock-ro")
_FULL = Path("/run/libvirt/libvirt-sock")
_SOCKETS = Path("/run/nova-dmigrate")
_LABEL = "security.selinux"
#: No host has this address (RFC 5737).
_NOWHERE = "203.0.113.1"
#: A service of another version, of which relays speak otherwise.
_OTHER_WIRE = """
from nova_dmigrate.relay.wire import hello
hello.VERSIONS = (1000,)
from nova_dmigrate.cmd.host import main
main()
"""
#: The database is not asked for anything, which is not always quick.
_UNPREPARED = {"migration__prepare_time": 0}
_ACCOUNT = "ALTER USER 'nova_dmigrate'@'localhost' ACCOUNT"
#: For libvirt's hypervisor for tests, which runs whatever it is told of.
_NODE = """
<node>
  <cpu><mhz>1000</mhz><model>i686</model><active>1</active><nodes>1</nodes><sockets>1</sockets>
    <cores>1</cores><threads>1</threads></cpu>
  <memory>8192000</memory>
  <domain type='test'>
    <name>{name}</name>
    <uuid>{uuid}</uuid>
    <memory>65536</memory>
    <vcpu>1</vcpu>
    <os><type>hvm</type></os>
    <devices>{devices}</devices>
  </domain>
</node>
"""
_PORT = """
<channel type='unix'><source mode='bind' path='/run/guests/agent.sock'/>
  <target type='virtio' name='org.openstack.dmigrate.0'/></channel>
"""
_CACHED_DISK = """
<disk type='file' device='disk'><driver name='qemu' type='raw' cache='writeback'/>
  <source file='/run/guests/disk'/><target dev='vda' bus='virtio'/><serial>disk</serial></disk>
"""
_PCI_DEVICE = """
<hostdev mode='subsystem' type='pci' managed='yes'>
  <source><address domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></source></hostdev>
"""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a guest is migrated from and to. ``directory``: for files."""

    services: MigrationServices
    domain: Domain
    source: LibvirtHost
    destination: LibvirtHost
    directory: Path


Options = dict[str, Any]
_ORDINARY = ("completed", "ordinary")
#: Through the relays, and all of it by the network.
_RELAYED = ("completed", "dmigrate")


@dataclasses.dataclass(frozen=True)
class Case:
    """How one reason is brought about.

    ``provoke``: meanwhile it holds; gives options of `MigrationServices.migrate`. ``way``: state
    and mode of the migration; None if there is none, because relays are required.
    """

    provoke: Callable[[Place], AbstractContextManager[Options]]
    mode: Mode = Mode.AUTO
    way: tuple[str, str] | None = _ORDINARY


def _refused(provoke: Callable[[Place], AbstractContextManager[Options]]) -> Case:
    """It leaves no way for an ordinary migration either, or is about the map, for which only a
    migration waits that has to go through the relays: any other may be over before.
    """
    return Case(provoke, Mode.REQUIRED, None)


# What is asked for, and the domain


@contextlib.contextmanager
def _nothing(place: Place) -> Iterator[Options]:
    yield {}


@contextlib.contextmanager
def _no_agent(place: Place) -> Iterator[Options]:
    yield {"agent_transport": AgentTransport.NONE}


def _other_domain(devices: str) -> Callable[[Place], AbstractContextManager[Options]]:
    """One of the same name with other devices, which libvirt tells of just as well."""

    @contextlib.contextmanager
    def provoke(place: Place) -> Iterator[Options]:
        node = place.directory / "node.xml"
        node.write_text(_NODE.format(name=place.domain.name, uuid=uuid.uuid4(), devices=devices))
        yield {"connect_uri": f"test+unix://{node}?socket={place.source.outside(_FULL)}"}

    return provoke


@contextlib.contextmanager
def _monitor_denied(place: Place) -> Iterator[Options]:
    """Whoever migrates may look at the domain, and not ask its QEMU."""
    yield {"connect_uri": f"qemu+unix:///system?socket={place.source.outside(_READ_ONLY)}"}


# The hosts


@contextlib.contextmanager
def _no_service(place: Place) -> Iterator[Options]:
    place.services.kill(place.destination)
    try:
        yield {}
    finally:
        place.services.start(place.destination)


def _destination(**options: object) -> Callable[[Place], AbstractContextManager[Options]]:
    """The destination's service has other options."""

    @contextlib.contextmanager
    def provoke(place: Place) -> Iterator[Options]:
        with place.services.changed(place.destination, **options):
            yield {}

    return provoke


@contextlib.contextmanager
def _volume_out_of_reach(place: Place) -> Iterator[Options]:
    """Something else is at its place at the destination."""
    volume = str(place.domain.volume)
    place.destination.run(["mount", "--bind", "/dev/null", volume])
    try:
        yield {}
    finally:
        place.destination.run(["umount", volume])


@contextlib.contextmanager
def _in_the_clear(place: Place) -> Iterator[Options]:
    """Relays do not encrypt, and QEMU shall."""
    with contextlib.ExitStack() as stack:
        for host in (place.source, place.destination):
            stack.enter_context(place.services.changed(host, wire__tls=False))
        yield {"tls": True}


@contextlib.contextmanager
def _other_wire(place: Place) -> Iterator[Options]:
    with place.services.changed(place.destination, ("-c", _OTHER_WIRE)):
        yield {}


@contextlib.contextmanager
def _confined(place: Place) -> Iterator[Options]:
    """What the kernel and the file system of a host with SELinux tell."""
    source = place.source
    configuration, sockets = source.outside(_QEMU_CONF), source.outside(_SOCKETS)
    with contextlib.ExitStack() as stack:
        usual = configuration.read_text()
        stack.callback(configuration.write_text, usual)
        configuration.write_text(usual.replace('security_driver = "none"', ""))
        source.run(["mount", "-t", "tmpfs", "tmpfs", "/sys/fs"])
        stack.callback(source.run, ["umount", "/sys/fs"])
        source.run(["sh", "-ec", "mkdir /sys/fs/selinux; echo 1 >/sys/fs/selinux/enforce"])
        os.setxattr(sockets, _LABEL, b"system_u:object_r:var_run_t:s0")
        stack.callback(os.removexattr, sockets, _LABEL)
        yield {}


@contextlib.contextmanager
def _relay_of_another_migration(place: Place) -> Iterator[None]:
    """One waits at the destination."""
    session = str(uuid.uuid4())
    order = host_messages.OpenDestination(
        migration_id="another",
        instance="another",
        session_id=session,
        token=secrets.token_hex(32),
        qemu_socket=str(_SOCKETS / "another" / "qemu"),
        tls_peer_name=place.source.name,
        lease_seconds=60,
    )
    with place.services.client(place.destination) as client:
        client.open_session(order)
        try:
            yield
        finally:
            client.close_session(session)


@contextlib.contextmanager
def _no_room(place: Place) -> Iterator[Options]:
    changed = place.services.changed(place.destination, host__max_relays=1)
    with changed, _relay_of_another_migration(place):
        yield {"wait_seconds": 1}


@contextlib.contextmanager
def _draining(place: Place) -> Iterator[Options]:
    services, host = place.services, place.destination
    changed = services.changed(host, host__drain_timeout=60)
    with changed, services.client(host) as client, _relay_of_another_migration(place):
        services.stop(host)
        wait_until(lambda: client.hello(PATIENCE).draining, "the service is being stopped")
        yield {}


# The agent and its map


def _operating(**options: object) -> Callable[[Place], AbstractContextManager[Options]]:
    """Whoever migrates has other options."""

    @contextlib.contextmanager
    def provoke(place: Place) -> Iterator[Options]:
        with place.services.operating(**options):
            yield {}

    return provoke


@contextlib.contextmanager
def _no_such_broker(place: Place) -> Iterator[Options]:
    """The agent would be asked over what oslo.messaging does not know."""
    with place.services.operating(migration__agent_url="pigeon://"):
        yield {"agent_transport": AgentTransport.BROKER}


@contextlib.contextmanager
def _agent_stopped(place: Place) -> Iterator[Options]:
    place.domain.guest.run("kill -STOP $(</run/agent.pid)")
    try:
        with place.services.operating(migration__agent_timeout=2):
            yield {}
    finally:
        place.domain.guest.run("kill -CONT $(</run/agent.pid)")


@contextlib.contextmanager
def _agent_stopped_later(place: Place) -> Iterator[Options]:
    """It has answered once by then, and does so again when all of memory has been sent."""
    sent: set[str] = set()

    def send_once(signal: str) -> None:
        if signal not in sent:
            sent.add(signal)
            place.domain.guest.run(f"kill -{signal} $(</run/agent.pid)")

    def on_progress(progress: Progress) -> None:
        if progress.phase == "waiting":  # the map is asked for in a moment
            send_once("STOP")
        elif progress.phase == "converging":
            # When the guest has moved before it could answer, it has been done all the same
            with contextlib.suppress(GuestError):
                send_once("CONT")

    try:
        # So long it is waited for; and what it does not restore, it does by itself
        with place.services.operating(migration__agent_timeout=30, migration__lease=10):
            yield {"on_progress": on_progress}
    finally:
        place.domain.guest.run("kill -CONT $(</run/agent.pid)")


@contextlib.contextmanager
def _agent_locked_out(place: Place) -> Iterator[Options]:
    """The database server does not know the agent any more."""
    place.domain.guest.sql(f"{_ACCOUNT} LOCK")
    try:
        yield {}
    finally:
        place.domain.guest.sql(f"{_ACCOUNT} UNLOCK")


@contextlib.contextmanager
def _state_unwritable(place: Place) -> Iterator[Options]:
    file = place.directory / "no-directory"
    file.touch()
    with place.services.operating(host__state_directory=str(file)):
        yield {}


@contextlib.contextmanager
def _map_too_large_for_the_relay(place: Place) -> Iterator[Options]:
    """The source's relay takes less than whoever migrates."""
    changed = place.services.changed(place.source, buffer_map__max_pages=1)
    with changed, place.services.operating(**_UNPREPARED):
        yield {}


#: By code.
CASES: Mapping[str, Case] = {
    "asked": Case(_nothing, Mode.ORDINARY),
    "native-tls": _refused(_in_the_clear),
    "configuration": Case(_no_such_broker),
    "host-devices": _refused(_other_domain(_PORT + _PCI_DEVICE)),
    "no-agent": Case(_no_agent),
    "no-agent-port": _refused(_other_domain(_CACHED_DISK)),
    "no-volumes": _refused(_other_domain(_PORT + _CACHED_DISK)),
    "volumes-unreadable": _refused(_volume_out_of_reach),
    "host-unreachable": Case(_no_service),
    "host-refused": Case(_destination(host__volume_directories="/nowhere")),
    "host-draining": Case(_draining),
    "confined": Case(_confined),
    "no-room": Case(_no_room),
    "tls-differs": Case(_destination(wire__tls=False)),
    "wire-differs": Case(_other_wire),
    "sockets-differ": Case(_destination(host__socket_directory="/run/other")),
    "agent-unreachable": Case(_agent_stopped),
    "agent-refused": Case(_agent_locked_out),
    "bad-map": _refused(_operating(buffer_map__max_pages=1, **_UNPREPARED)),
    "small-map": _refused(_operating(migration__min_mapped_share=1, **_UNPREPARED)),
    "memory-layout": _refused(_monitor_denied),
    "no-state": Case(_state_unwritable),
    "late-map": Case(_agent_stopped_later, way=_RELAYED),
    "map-refused": _refused(_map_too_large_for_the_relay),
    "relay-failed": Case(_destination(wire__listen_address=_NOWHERE)),
}
#: Of the ways in which only Nova migrates.
NOVAS = ("block-migration", "tunnelled")
#: What nobody knows how to bring about: it would be mended. Unit tests have it.
BUGS = ("unexpected",)
#: No release of Debian that the lab could take has such a libvirt.
TOO_OLD = ("old-libvirt",)
