# SPDX-License-Identifier: Apache-2.0
"""A real guest with a database server on a volume, and the agent beside it.

with DatabaseGuest.boot(DatabaseSpec(disk=create_volume(path))) as guest:
    client = guest.agent()
    mapped = fetch_map(client)
    guest.stop()
    equal = guest.equal_pages(mapped, guest.ram)

It is a `Guest`: migrations, monitor and memory are as there. The agent answers on the port that
the real one has; a port of the lab's runs scripts in the guest.
"""

import base64
import dataclasses
import time
import uuid
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.buffermap import BufferMap
from nova_dmigrate.rpc import channel
from nova_dmigrate.rpc.client import AgentClient, ClientSettings
from tests.lab.database_image import MARIADB, Release, database_image, make_initramfs
from tests.lab.guest import KERNEL_ARGUMENTS, PAGE_SIZE, Guest, GuestError, GuestSpec

#: As Nova gives it: the first 20 characters of the volume's id.
SERIAL = "6f1d2c3b-4a59-4687-9"
INSTANCE = "00000000-0000-4000-8000-000000000001"
_VOLUME_MB = 640
#: Seconds for a guest to boot on a machine that is busy with other tests.
BOOT_PATIENCE = 240.0


@dataclasses.dataclass(frozen=True)
class DatabaseSpec(GuestSpec):
    """``release``: what runs in it.

    ``layout``: what the database's file system is on, ``partition`` (ext4) or ``lvm`` (XFS); it is
    made when the guest boots, unless it is ``kept``: a database is on the first partition already.

    ``hugepages``: how many of 2 MiB the guest reserves; the server's pool is in them if not 0.

    ``options``: more of the server's, without dashes.

    ``address``: of guest and server on the guests' network; None for neither.

    ``limits``: of a domain's volume, pairs as `domain_xml.Disk` has them.
    """

    ram_mb: int = 640
    cpu: str = "Nehalem"  # the oldest that the NumPy of Debian's newest releases runs on
    release: Release = MARIADB
    layout: str = "partition"
    pool_mb: int = 64
    hugepages: int = 0
    options: tuple[str, ...] = ()
    address: str | None = None
    limits: tuple[tuple[str, int], ...] = ()

    @property
    def kernel_arguments(self) -> str:
        return (
            f"{KERNEL_ARGUMENTS} ndm.layout={self.layout} ndm.pool={self.pool_mb}M"
            f" ndm.hugepages={self.hugepages} ndm.address={self.address or ''}"
            f" ndm.options={','.join(self.options)}"
        )


def create_volume(path: Path) -> Path:
    """An empty volume; the guest partitions and fills it when it boots."""
    with open(path, "wb") as volume:
        volume.truncate(_VOLUME_MB << 20)
    return path


def same_pages(
    one: NDArray[np.uint8],
    numbers: NDArray[np.uint32],
    other: NDArray[np.uint8],
    other_numbers: NDArray[np.uint32],
) -> NDArray[np.bool_]:
    """Whether pages of one array of them, (pages, 4096), equal pages of another."""
    same = one[numbers.astype(np.int64)] == other[other_numbers.astype(np.int64)]
    return np.asarray(same.all(axis=1))


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
        # What was asked before may still be answered: a guest that was migrated meanwhile does that
        # where it has come to
        number = uuid.uuid4().hex
        self._commands.sendall(f"{number} {base64.b64encode(script.encode()).decode()}\n".encode())
        end = time.monotonic() + timeout
        answer = ""
        while not answer.startswith(number):
            answer = self._read_line(end - time.monotonic(), f"an answer to {script!r}")
        _, verdict, said = answer.split(" ")
        text = base64.b64decode(said).decode(errors="replace")
        if verdict != "ok":
            raise GuestError(f"{script!r} failed: {text}")
        return text

    def sql(self, statement: str, timeout: float = 120) -> str:
        """Run a statement in the guest as its root; tab-separated lines without headings."""
        return self.run(f"client -BN lab <<'END'\n{statement}\nEND\n", timeout)

    @property
    def agent_path(self) -> Path:
        """The UNIX socket of the agent's port. QEMU takes one connection at a time."""
        return self.directory / "agent.sock"

    def agent(self, attempts: int = 3) -> AgentClient:
        """The host's side of the agent, over a connection of its own to the virtio-serial port.

        :param attempts: how often a request is sent at most.
        """
        transport = channel.ChannelTransport(
            INSTANCE, lambda: channel.open_port(str(self.agent_path))
        )
        # Emulated processors are slow, and other tests run beside.
        settings = ClientSettings(timeout=60, map_timeout=180, attempts=attempts)
        return AgentClient(INSTANCE, transport, settings)

    def equal_pages(self, built: BufferMap, memory: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Whether each mapped guest page equals its block; the guest must be stopped.

        :param memory: of the guest, (pages, 4096).
        """
        (volume,) = built.volumes
        guest, block = volume.pages()
        content = np.fromfile(self.spec.disk, np.uint8).reshape(-1, PAGE_SIZE)
        # All of RAM is below the hole: a guest page is a row of its RAMBlock.
        return same_pages(memory, guest, content, block)

    def _arguments(self, incoming: bool) -> list[str]:
        spec, here = self.spec, self.directory
        made = database_image(spec.release)
        initramfs = make_initramfs(spec.release, made, here / "initramfs.cpio")
        arguments = [
            *("-accel", "tcg", "-cpu", spec.cpu, "-smp", str(spec.smp), "-m", f"{spec.ram_bytes}B"),
            *("-nodefaults", "-display", "none", "-no-reboot", "-name", "ndm-database"),
            *("-kernel", str(made.kernel), "-initrd", str(initramfs)),
            *("-append", spec.kernel_arguments),
            *self._memory_arguments(),
            *("-chardev", f"socket,id=qmp,path={here}/qmp.sock,server=on,wait=off"),
            *("-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"file,id=console,path={here}/console.log", "-serial", "chardev:console"),
            *("-device", "virtio-serial-pci", "-device", "virtio-rng-pci"),
        ]
        for name, port in (("agent", channel.PORT_NAME), ("command", "lab.command")):
            arguments += [
                *("-chardev", f"socket,id={name},path={here}/{name}.sock,server=on,wait=off"),
                *("-device", f"virtserialport,id={name}-port,chardev={name},name={port}"),
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
