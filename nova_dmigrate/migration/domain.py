# SPDX-License-Identifier: Apache-2.0
"""What a domain's XML says about how it can migrate: its volumes, its devices, its agent's port.

Format: https://libvirt.org/formatdomain.html
"""

import dataclasses
from pathlib import Path
from xml.etree import ElementTree

from nova_dmigrate import exception
from nova_dmigrate.rpc.channel import PORT_NAME
from nova_dmigrate.volumes import IscsiUnit, RbdLocation
from nova_dmigrate.volumes.iscsi_unit import SCHEME

#: The guest sees no more of a serial on virtio-blk (VIRTIO_BLK_ID_BYTES of the virtio standard).
_VIRTIO_BLK_SERIAL = 20
_UNITS = {"b": 1, "bytes": 1, "KB": 1000, "k": 1 << 10, "KiB": 1 << 10, "MB": 10**6, "M": 1 << 20}
_UNITS |= {"MiB": 1 << 20, "GB": 10**9, "G": 1 << 30, "GiB": 1 << 30, "TiB": 1 << 40}
#: Cache modes in which QEMU opens a volume with O_DIRECT, so that another host sees what the guest
#: has written.
_DIRECT = ("none", "directsync")


@dataclasses.dataclass(frozen=True)
class Disk:
    """One disk of a domain.

    :ivar target: name of the device in the XML, as ``vdb``.
    :ivar serial: as the guest sees it; empty for none.
    :ivar kind: the XML's type: ``block``, ``file``, ``network``, ...
    :ivar protocol: of a network disk, as ``rbd``; else empty.
    :ivar format: of the image, as ``raw``.
    :ivar location: path, RbdLocation or IscsiUnit as text, or the name of another network disk.
    :ivar direct: whether what the guest has written is on the volume, not in this host's cache.
    :ivar encrypted: by QEMU, so that the volume is not what the guest sees of it.
    :ivar key: libvirt's UUID of the passphrase, if it is LUKS by QEMU's own means; else empty.
    """

    target: str
    serial: str
    kind: str
    protocol: str
    format: str
    location: str
    direct: bool
    read_only: bool
    encrypted: bool = False
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Domain:
    """One domain, as its live XML describes it.

    :ivar memory: bytes.
    :ivar channel: the host's socket of the agent's port; None if there is no such port.
    :ivar host_devices: names of kinds of passed-through devices.
    :ivar qemu_user: number of the user that its QEMU runs as; None if that is not told.
    """

    uuid: str
    name: str
    memory: int
    machine: str
    disks: tuple[Disk, ...]
    channel: Path | None
    host_devices: tuple[str, ...]
    qemu_user: int | None = None


def parse_domain(xml: str) -> Domain:
    """A domain from its live XML.

    :raises MigrationError: if it is no such XML.
    """
    try:
        root = ElementTree.fromstring(xml)
        memory = root.find("memory")
        machine = root.find("os/type")
        if memory is None or machine is None:
            raise ValueError("it has no memory or no machine")
        return Domain(
            uuid=root.findtext("uuid", ""),
            name=root.findtext("name", ""),
            memory=int(memory.text or "") * _UNITS[memory.get("unit", "KiB")],
            machine=machine.get("machine", ""),
            disks=tuple(_disk(element) for element in root.iterfind("devices/disk")),
            channel=_channel(root),
            host_devices=tuple(_host_devices(root)),
            qemu_user=_qemu_user(root),
        )
    except (ElementTree.ParseError, ValueError, KeyError) as error:
        raise exception.MigrationError(
            instance="?", reason=f"the domain's XML is not understood: {error}"
        ) from error


def _disk(element: ElementTree.Element) -> Disk:
    kind = element.get("type", "")
    source, target, driver = (element.find(tag) for tag in ("source", "target", "driver"))
    location = protocol = ""
    if source is not None:
        protocol = source.get("protocol", "")
        location = source.get("dev") or source.get("file") or source.get("name") or ""
        if protocol == "rbd":
            location = _rbd_location(source, element.find("auth"))
        elif protocol == "iscsi":
            location = _iscsi_location(source, element.find("auth"))
    # libvirt has taken it at both places
    encryptions = [element.find(f"{at}encryption") for at in ("", "source/")]
    encryption = next((each for each in encryptions if each is not None), None)
    serial = element.findtext("serial", "")
    if target is not None and target.get("bus") == "virtio":
        serial = serial[:_VIRTIO_BLK_SERIAL]
    # For network disks QEMU's cache mode means the client library's
    cache = "" if driver is None else driver.get("cache", "")
    return Disk(
        target="" if target is None else target.get("dev", ""),
        serial=serial,
        kind=kind,
        protocol=protocol,
        format="raw" if driver is None else driver.get("type", "raw"),
        location=location,
        direct=cache in _DIRECT,
        read_only=element.find("readonly") is not None,
        encrypted=encryption is not None,
        key="" if encryption is None else _luks_key(encryption),
    )


def _luks_key(encryption: ElementTree.Element) -> str:
    """UUID of the one secret that opens it; empty if it is opened in another way."""
    secrets = encryption.findall("secret")
    if encryption.get("format") != "luks" or encryption.get("engine", "qemu") != "qemu":
        return ""
    if len(secrets) != 1 or secrets[0].get("type") != "passphrase":
        return ""
    return secrets[0].get("uuid", "")


def _iscsi_location(source: ElementTree.Element, auth: ElementTree.Element | None) -> str:
    """Where an iSCSI unit is; its name alone if it cannot be reached by that: it wants an account,
    or an initiator's name, or another transport.
    """
    name, hosts = source.get("name", ""), source.findall("host")
    special = [source.find("auth"), source.find("initiator"), auth]
    if len(hosts) != 1 or any(each is not None for each in special):
        return name
    address, port = hosts[0].get("name", ""), hosts[0].get("port", "3260")
    if ":" in address and not address.startswith("["):
        address = f"[{address}]"
    try:
        return str(IscsiUnit.parse(f"{SCHEME}{address}:{port}/{name}"))
    except ValueError:
        return name


def _rbd_location(source: ElementTree.Element, auth: ElementTree.Element | None) -> str:
    """Where an RBD image is; its name alone if that makes no sense.

    :param auth: the disk's, where the source has none of its own.
    """
    own = source.find("auth")
    name, account = source.get("name", ""), auth if own is None else own
    monitors = [(each.get("name", ""), each.get("port", "")) for each in source.iterfind("host")]
    try:
        place = RbdLocation.of_volume(
            name, monitors, "" if account is None else account.get("username", "")
        )
    except ValueError:
        return name
    snapshot = source.find("snapshot")
    if snapshot is not None:
        place = dataclasses.replace(place, snapshot=snapshot.get("name", ""))
    return str(place)


def _channel(root: ElementTree.Element) -> Path | None:
    for element in root.iterfind("devices/channel"):
        target, source = element.find("target"), element.find("source")
        if target is None or source is None or target.get("name") != PORT_NAME:
            continue
        path = source.get("path")
        if element.get("type") == "unix" and path:
            return Path(path)
    return None


def _qemu_user(root: ElementTree.Element) -> int | None:
    """As the label of libvirt's own security driver has it: "+64055:+64055", "root:root"."""
    label = root.findtext("seclabel[@model='dac']/label", "")
    user = label.partition(":")[0].removeprefix("+")
    if user == "root":
        return 0
    # The other names are those of the source host
    return int(user) if user.isdigit() else None


def _host_devices(root: ElementTree.Element) -> list[str]:
    kinds = [element.get("type", "device") for element in root.iterfind("devices/hostdev")]
    for element in root.iterfind("devices/interface"):
        if element.get("type") in ("hostdev", "vdpa"):
            kinds.append(f"interface of type {element.get('type')}")
    return kinds
