# SPDX-License-Identifier: Apache-2.0
"""Domain XML of the lab's guests, as Nova writes it as far as a migration can tell."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from tests.lab.guest import GuestSpec
from tests.lab.guest_network import BRIDGE
from tests.lab.libvirt_host import EXACT_EMULATOR, GUESTS

PLAIN_EMULATOR = Path("/usr/bin/qemu-system-x86_64")


@dataclass(frozen=True)
class Disk:
    """A raw disk, a block device or a file (which libvirt migrates if it is read-only).

    ``limits``: of QEMU's, by libvirt's names: ``read_iops_sec``, ``read_bytes_sec``, ...
    """

    path: Path
    read_only: bool = False
    serial: str | None = None
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Hardware:
    """What a domain has beside what its GuestSpec says.

    ``serials``: names of UNIX sockets at the serial ports after the first, which is the console.
    ``channels``: virtio-serial ports by name, and the names of their sockets.
    ``mac``: address of an interface on the guests' network; None for no interface.
    """

    kernel: Path
    initramfs: Path
    disks: tuple[Disk, ...]
    serials: tuple[str, ...] = ()
    channels: Mapping[str, str] = field(default_factory=dict)
    mac: str | None = None


def domain_xml(name: str, uuid: str, spec: GuestSpec, hardware: Hardware) -> str:
    """Sockets and console lie in GUESTS/name on whichever host the domain is."""
    here = GUESTS / name
    devices = [
        f"<emulator>{EXACT_EMULATOR if spec.exact else PLAIN_EMULATOR}</emulator>",
        "<controller type='usb' model='none'/>",
        f"<serial type='file'><source path='{here}/console.log'/><target port='0'/></serial>",
        *(_disk(number, disk) for number, disk in enumerate(hardware.disks)),
    ]
    for port, socket in enumerate(hardware.serials, 1):
        source = f"<source mode='bind' path='{here}/{socket}.sock'/>"
        devices.append(f"<serial type='unix'>{source}<target port='{port}'/></serial>")
    for channel, socket in hardware.channels.items():
        source = f"<source mode='bind' path='{here}/{socket}.sock'/>"
        target = f"<target type='virtio' name={quoteattr(channel)}/>"
        devices.append(f"<channel type='unix'>{source}{target}</channel>")
    if hardware.mac is not None:
        devices.append(
            f"<interface type='bridge'><mac address='{hardware.mac}'/><source bridge='{BRIDGE}'/>"
            "<model type='virtio'/><driver name='qemu'/><rom enabled='no'/></interface>"
        )
    devices.append("<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>")
    memory = ""
    if spec.shared:
        memory = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
    arguments = "".join(f"<qemu:arg value={quoteattr(each)}/>" for each in spec.extra)
    return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{escape(name)}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{spec.ram_mb}</memory>
  {memory}
  <vcpu>{spec.smp}</vcpu>
  <cpu mode='custom' match='exact' check='none'><model fallback='allow'>{spec.cpu}</model></cpu>
  <os>
    <type arch='x86_64' machine='{spec.machine}'>hvm</type>
    <kernel>{hardware.kernel}</kernel>
    <initrd>{hardware.initramfs}</initrd>
    <cmdline>{escape(spec.kernel_arguments)}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    {"".join(devices)}
  </devices>
  <qemu:commandline>{arguments}</qemu:commandline>
</domain>"""


def _disk(number: int, disk: Disk) -> str:
    kind, attribute = ("block", "dev") if disk.path.is_block_device() else ("file", "file")
    serial = f"<serial>{escape(disk.serial)}</serial>" if disk.serial else ""
    return (
        f"<disk type='{kind}' device='disk'><driver name='qemu' type='raw' cache='none'/>"
        f"<source {attribute}={quoteattr(str(disk.path))}/>"
        f"<target dev='vd{'abcdefgh'[number]}' bus='virtio'/>{serial}"
        f"{'<readonly/>' if disk.read_only else ''}{_limits(disk)}</disk>"
    )


def _limits(disk: Disk) -> str:
    if not disk.limits:
        return ""
    each = "".join(f"<{name}>{value}</{name}>" for name, value in disk.limits.items())
    return f"<iotune>{each}</iotune>"
