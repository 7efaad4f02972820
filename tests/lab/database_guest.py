# SPDX-License-Identifier: Apache-2.0
"""A real guest with a database server on a volume, and the agent beside it.

with DatabaseGuest.boot(DatabaseSpec(disk=create_volume(path))) as guest:
    client = guest.agent()
    mapped = client.fetch_map(MapLimits())
    guest.stop()
    share = guest.equal_share(mapped)

It is a `Guest`: migrations, monitor and memory are as there. The agent answers on the port that
the real one has; a port of the lab's runs scripts in the guest.
"""

import base64
import dataclasses
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.buffermap import BufferMap
from nova_dmigrate.rpc import channel
from nova_dmigrate.rpc.client import AgentClient, ClientSettings
from tests.lab.database_image import database_image, make_initramfs
from tests.lab.guest import KERNEL_ARGUMENTS, PAGE_SIZE, Guest, GuestError, GuestSpec
from tests.lab.qmp import connect_unix

#: As Nova gives it: the first 20 characters of the volume's id.
SERIAL = "6f1d2c3b-4a59-4687-9"
INSTANCE = "00000000-0000-4000-8000-000000000001"
_VOLUME_MB = 640
#: Seconds for a guest to boot on a machine that is busy with other tests.
BOOT_PATIENCE = 240.0


@dataclasses.dataclass(frozen=True)
class DatabaseSpec(GuestSpec):
    """``layout``: what the database's file system is on, ``partition`` (ext4) or ``lvm`` (XFS).

    ``hugepages``: how many of 2 MiB the guest reserves; the server's pool is in them if not 0.
    """

    ram_mb: int = 640
    layout: str = "partition"
    pool_mb: int = 64
    hugepages: int = 0


def create_volume(path: Path) -> Path:
    """An empty volume; the guest partitions and fills it when it boots."""
    with open(path, "wb") as volume:
        volume.truncate(_VOLUME_MB << 20)
    return path


class DatabaseGuest(Guest):
    """Made with `boot`, or with `start_destination`, which takes the source's spec."""

    spec: DatabaseSpec

    @classmethod
    def boot(cls, spec: DatabaseSpec) -> "DatabaseGuest":
        """A guest whose server has read its tables, so that its pool is full, and whose agent runs.

        :raises GuestError: it did not become ready.
        """
        guest = cls.start_source(spec, timeout=BOOT_PATIENCE)
        assert isinstance(guest, DatabaseGuest)
        return guest

    def run(self, script: str, timeout: float = 120) -> str:
        """Run a shell script in the guest; what it has printed.

        :raises GuestError: it failed, or did not end in time.
        """
        line = base64.b64encode(script.encode()).decode()
        try:
            answer = self.command(line, timeout)
        except GuestError as error:
            verdict, _, said = str(error).partition("failed ")
            if not said:
                raise
            text = base64.b64decode(said).decode(errors="replace")
            raise GuestError(f"{script!r} failed: {text}") from None
        return base64.b64decode(answer).decode(errors="replace")

    def sql(self, statement: str, timeout: float = 120) -> str:
        """Run a statement in the guest as its root; tab-separated lines without headings."""
        return self.run(f"mariadb -BN lab <<'END'\n{statement}\nEND\n", timeout)

    def agent(self) -> AgentClient:
        """The host's side of the agent, over the virtio-serial port."""
        transport = channel.ChannelTransport(INSTANCE, lambda: os.dup(self._port.fileno()))
        # Emulated processors are slow, and other tests run beside.
        return AgentClient(INSTANCE, transport, ClientSettings(timeout=60, map_timeout=180))

    def equal_share(self, built: BufferMap) -> float:
        """Share of mapped guest pages that equal their block; the guest must be stopped."""
        (volume,) = built.volumes
        guest, block = volume.pages()
        return float(self._equal(guest, block).mean())

    def _equal(self, guest: NDArray[np.uint32], block: NDArray[np.uint32]) -> NDArray[np.bool_]:
        # All of RAM is below the hole: a guest page is a row of its RAMBlock.
        content = np.fromfile(self.spec.disk, np.uint8).reshape(-1, PAGE_SIZE)
        return (self.ram[guest.astype(np.int64)] == content[block.astype(np.int64)]).all(axis=1)

    def _start(self, incoming: bool) -> None:
        super()._start(incoming)
        # Held from the start: a request that is sent while the agent opens its port anew, because
        # nobody was there, is lost.
        self._port = connect_unix(self.directory / "agent.sock", 10)
        self._sockets.append(self._port)

    def _arguments(self, incoming: bool) -> list[str]:
        spec, here, made = self.spec, self.directory, database_image()
        initramfs = make_initramfs(made, here / "initramfs.cpio")
        append = (
            f"{KERNEL_ARGUMENTS} ndm.layout={spec.layout} ndm.pool={spec.pool_mb}M"
            f" ndm.hugepages={spec.hugepages}"
        )
        arguments = [
            *("-accel", "tcg", "-cpu", spec.cpu, "-smp", str(spec.smp), "-m", f"{spec.ram_bytes}B"),
            *("-nodefaults", "-display", "none", "-no-reboot", "-name", "ndm-database"),
            *("-kernel", str(made.kernel), "-initrd", str(initramfs), "-append", append),
            *self._memory_arguments(),
            *("-chardev", f"socket,id=qmp,path={here}/qmp.sock,server=on,wait=off"),
            *("-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"file,id=console,path={here}/console.log", "-serial", "chardev:console"),
            *("-device", "virtio-serial-pci", "-device", "virtio-rng-pci"),
        ]
        for name, port in (("agent", channel.PORT_NAME), ("command", "lab.command")):
            arguments += [
                *("-chardev", f"socket,id={name},path={here}/{name}.sock,server=on,wait=off"),
                *("-device", f"virtserialport,chardev={name},name={port}"),
            ]
        # Source and destination have both disks open: no image locks.
        for name, path, read_only, device in (
            ("root", made.root, "on", ""),
            ("data", spec.disk, "off", f",serial={SERIAL}"),
        ):
            arguments += [
                "-drive",
                f"if=none,id={name},file={path},format=raw,file.locking=off,read-only={read_only}",
                *("-device", f"virtio-blk-pci,drive={name}{device}"),
            ]
        if incoming:
            arguments += ["-incoming", "defer", "-S"]
        return [*arguments, *spec.extra]
