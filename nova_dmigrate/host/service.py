# SPDX-License-Identifier: Apache-2.0
"""The methods of the host's protocol."""

import base64
import dataclasses
import gzip
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.host import confinement, downtime, permissions, vouching
from nova_dmigrate.host.agents import AgentProxy
from nova_dmigrate.host.hypervisor import UNKNOWN, Versions
from nova_dmigrate.host.sessions import Sessions
from nova_dmigrate.host.store import Record, Store
from nova_dmigrate.relay.wire.hello import VERSIONS
from nova_dmigrate.rpc.host_messages import (
    HOST,
    MAX_CHUNK_BYTES,
    MAX_SUMMARY_BYTES,
    NEEDED,
    AgentAnswer,
    AgentRequest,
    DowntimeArguments,
    GuestDowntime,
    HelloArguments,
    HostState,
    OpenDestination,
    OpenSource,
    Order,
    RenewSession,
    SaveChunks,
    SavedChunks,
    SessionReference,
    SessionState,
    SummaryArguments,
    SummaryChunk,
    UseMap,
)
from nova_dmigrate.volumes import DRIVERS, IMAGE_DRIVERS, usable_drivers

#: Drivers whose location is a path on the host.
_PATH_DRIVERS = ("block",)
_MAX_SOCKET_PATH = 107


@dataclasses.dataclass(frozen=True)
class ServiceSettings:
    """What the service says of its host, and allows on it.

    :ivar migration_address: where relays listen; None for everywhere.
    :ivar tls: whether sessions in the clear are refused.
    :ivar qemu_user: number of the user that QEMU's sockets are for.
    :ivar iscsi_units: that relays may read; none if it is empty.
    :ivar volume_keys: whether relays are given keys of encrypted volumes.
    """

    name: str
    migration_address: str | None
    tls: bool
    max_relays: int
    qemu_user: int
    volume_directories: Sequence[str] = ()
    rbd_images: Sequence[str] = ()
    iscsi_units: Sequence[str] = ()
    volume_keys: bool = False
    map_directories: Sequence[str] = ()
    channel_directories: Sequence[str] = ()

    @property
    def drivers(self) -> frozenset[str]:
        """Of volumes that relays may read with."""
        withheld = {"luks": not self.volume_keys, "iscsi": not self.iscsi_units}
        return frozenset(name for name in DRIVERS if not withheld.get(name))


class HostService:
    """Has a method for each of the protocol's; see `host_messages` for what they mean.

    :param disks: of a guest of this host; None where they are not known, and not looked at.
    :param versions: of its libvirt and QEMU, at once.
    :param downtime_of: a guest that has come here; None where libvirt shall not be asked.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        sessions: Sessions,
        store: Store,
        disks: vouching.Disks | None = None,
        versions: Callable[[], Versions] = lambda: UNKNOWN,
        downtime_of: downtime.Ask | None = None,
    ) -> None:
        self._settings = settings
        self._versions = versions
        self._disks = disks
        self._downtime_of = downtime_of
        self._sessions = sessions
        self._store = store
        self._agents = AgentProxy(settings.channel_directories)
        self._incarnation = uuid.uuid4().hex

    def hello(self, arguments: HelloArguments) -> HostState:
        if not HOST.speaks(arguments.version):
            raise exception.RequestRefused(
                reason=f"the host service speaks version {HOST.version}", code="version"
            )
        libvirt_version, qemu_version = self._versions()
        return HostState(
            host=self._settings.name,
            version=HOST.version,
            wire_versions=VERSIONS,
            incarnation=self._incarnation,
            tls=self._settings.tls,
            drivers=tuple(each for each in usable_drivers() if each in self._settings.drivers),
            relays=self._sessions.running,
            max_relays=self._settings.max_relays,
            queued=self._sessions.queued,
            draining=self._sessions.draining,
            migration_address=self._settings.migration_address,
            socket_directory=str(self._store.sockets),
            qemu_user=self._settings.qemu_user,
            obstacle=confinement.obstacle(self._store.sockets),
            libvirt_version=libvirt_version,
            qemu_version=qemu_version,
            needs=NEEDED,
        )

    def open_destination(self, order: OpenDestination) -> SessionState:
        volumes = []
        for volume in order.volumes:
            if volume.driver not in self._settings.drivers:
                raise exception.RequestRefused(
                    reason=f"there is no driver {volume.driver}", code="unknown-driver"
                )
            location = volume.location
            if volume.driver in _PATH_DRIVERS:
                location = permissions.volume_location(location, self._settings.volume_directories)
            elif volume.driver in IMAGE_DRIVERS:
                location = permissions.image(
                    location, self._settings.volume_directories, self._settings.iscsi_units
                )
            elif volume.driver == "rbd":
                permissions.rbd_image(location, self._settings.rbd_images)
            volumes.append(
                {"volume_id": volume.volume_id, "driver": volume.driver, "location": location}
            )
        return self._open("destination", order, {"volumes": volumes})

    def open_source(self, order: OpenSource) -> SessionState:
        if self._disks is not None:
            vouching.check(order, self._disks)
        description: dict[str, Any] = {"host": order.host, "port": order.port}
        if order.buffer_map is not None:
            description["buffer_map"] = self._map_file(order.buffer_map)
        if order.memory_layout is not None:
            description["memory_layout"] = self._map_file(order.memory_layout)
        return self._open("source", order, description)

    def session(self, arguments: SessionReference) -> SessionState:
        return self._sessions.session(arguments.session_id)

    def renew(self, arguments: RenewSession) -> SessionState:
        return self._sessions.renew(arguments.session_id, arguments.lease_seconds)

    def use_map(self, arguments: UseMap) -> SessionState:
        return self._sessions.use_map(
            arguments.session_id,
            self._map_file(arguments.buffer_map),
            self._map_file(arguments.memory_layout),
        )

    def close(self, arguments: SessionReference) -> SessionState:
        return self._sessions.close(arguments.session_id)

    def summary(self, arguments: SummaryArguments) -> SummaryChunk:
        path = self._store.files(arguments.session_id).summary
        try:
            # The same at each call, so that its parts fit together
            data = gzip.compress(path.read_bytes(), compresslevel=1, mtime=0)
        except OSError as error:
            raise exception.RequestRefused(
                reason=f"there is no summary: {error}", code="no-summary"
            ) from error
        if len(data) > MAX_SUMMARY_BYTES:
            raise exception.RequestRefused(reason="it is too long", code="no-summary")
        part = data[arguments.offset : arguments.offset + MAX_CHUNK_BYTES]
        return SummaryChunk(
            size=len(data), offset=arguments.offset, data=base64.b64encode(part).decode()
        )

    def downtime(self, arguments: DowntimeArguments) -> GuestDowntime:
        ask = self._downtime_of
        return GuestDowntime(None if ask is None else downtime.of_domain(arguments.domain, ask))

    def agent(self, request: AgentRequest) -> AgentAnswer:
        return self._agents.ask(request)

    def save_chunks(self, request: SaveChunks) -> SavedChunks:
        allowed = self._settings.map_directories
        with permissions.map_to_write(request.buffer_map, allowed) as descriptor:
            return self._agents.save_chunks(request, descriptor)

    def _map_file(self, path: str) -> str:
        return permissions.map_file(path, self._settings.map_directories)

    def _open(self, role: str, order: Order, description: dict[str, Any]) -> SessionState:
        directory = permissions.socket_directory(order.qemu_socket, self._store.sockets)
        files = self._store.files(order.session_id)
        if len(str(files.control).encode()) > _MAX_SOCKET_PATH:
            raise exception.RequestRefused(
                reason=f"no socket can have the path {files.control}", code="socket-not-allowed"
            )
        if order.tls_peer_name is not None:
            description["tls"] = {"peer_name": order.tls_peer_name}
        elif self._settings.tls:
            raise exception.RequestRefused(
                reason="this host does not migrate in the clear", code="tls-required"
            )
        return self._sessions.open(
            Record(
                session_id=order.session_id,
                migration_id=order.migration_id,
                instance=order.instance,
                role=role,
                description={
                    "role": role,
                    "instance": order.instance,
                    "session_id": order.session_id,
                    "token": vouching.bound_token(order.token, order.volumes),
                    "qemu_socket": order.qemu_socket,
                    "control_socket": str(files.control),
                    "summary": str(files.summary),
                    **description,
                },
                socket=order.qemu_socket,
                directory=directory,
                network_bandwidth=order.network_bandwidth,
                volume_bandwidth=order.volume_bandwidth,
                lease_seconds=order.lease_seconds,
                wait_seconds=order.wait_seconds,
                created=time.time(),
                guest_memory=order.guest_memory,
            )
        )
