# SPDX-License-Identifier: Apache-2.0
"""What Nova tells of a server's volumes, and of the way to the host that has connected them."""

from collections.abc import Iterable, Mapping
from typing import Any

from nova_dmigrate.migration.preflight import Elsewhere
from nova_dmigrate.volumes import RbdLocation

#: Kinds of connections (os-brick's ``driver_volume_type``) that end in a block device of the host.
_DEVICES = frozenset(
    ("iscsi", "iser", "fibre_channel", "nvmeof", "lightos", "storpool", "scaleio", "local")
)
#: Those that end in a file.
_FILES = frozenset(("nfs",))
_RBD = "rbd"
#: The guest sees no more of a serial on virtio-blk.
_VIRTIO_BLK_SERIAL = 20

Connection = Mapping[str, Any]


def connected(connections: Iterable[Connection]) -> dict[str, Elsewhere]:
    """What can be read of volumes on the host whose connections these are, by the disk's serial.

    :param connections: Nova's connection information; its serial is the volume's id.
    """
    found = {}
    for connection in connections:
        serial = str(connection.get("serial") or "")
        if serial:
            found[serial] = found[serial[:_VIRTIO_BLK_SERIAL]] = _place(connection)
    return found


def address_in(migrate_data: Any) -> str | None:
    """The destination's address in the migration network, if Nova knows one.

    :param migrate_data: a nova.objects.LibvirtLiveMigrateData.
    """
    if "target_connect_addr" not in migrate_data:
        return None
    address: str | None = migrate_data.target_connect_addr
    return address


def of_destination(migrate_data: Any) -> dict[str, Elsewhere]:
    """The same at the destination, once Nova has connected the volumes there.

    :param migrate_data: a nova.objects.LibvirtLiveMigrateData.
    """
    if "bdms" not in migrate_data:
        return {}
    connections = []
    for volume in migrate_data.bdms:
        connection = dict(volume.connection_info)
        connection["serial"] = volume.serial
        if "encryption_secret_uuid" in volume and volume.encryption_secret_uuid:
            connection["data"] = {**connection.get("data", {}), "encrypted": True}
        connections.append(connection)
    return connected(connections)


def _rbd_place(data: Mapping[str, Any]) -> Elsewhere:
    hosts, ports = data.get("hosts") or (), data.get("ports") or ()
    user = data.get("auth_username") if data.get("auth_enabled") else None
    try:
        place = RbdLocation.of_volume(
            str(data.get("name") or ""),
            monitors=zip(map(str, hosts), map(str, ports), strict=False),
            user=str(user or ""),
            cluster=str(data.get("cluster_name") or ""),
        )
    except ValueError as error:
        return Elsewhere(obstacle=f"is an RBD image, but {error}")
    return Elsewhere(str(place))


def _place(connection: Connection) -> Elsewhere:
    kind, data = str(connection.get("driver_volume_type")), connection.get("data") or {}
    if data.get("encrypted"):
        return Elsewhere(obstacle="is encrypted by Nova, so that memory and volume differ")
    if kind == _RBD:
        return _rbd_place(data)
    if kind not in _DEVICES | _FILES:
        return Elsewhere(obstacle=f"is connected by {kind}, of which nothing is known")
    if kind in _FILES and data.get("format", "raw") != "raw":
        return Elsewhere(obstacle=f"has format {data['format']}, not raw")
    path = data.get("device_path")
    if not path:
        return Elsewhere(obstacle=f"is connected by {kind}, but no path of it is told")
    return Elsewhere(str(path))
