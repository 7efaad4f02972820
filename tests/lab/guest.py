# SPDX-License-Identifier: Apache-2.0
"""A real QEMU (TCG) with the lab's test guest in it.

disk = create_disk(directory / "disk.raw", 256)
spec = GuestSpec(disk=disk, fill_mb=256, mapped=90)
with Guest.start_source(spec) as source, Guest.start_destination(spec) as destination:
    gpa, offset = source.buffer_map_extents()
    source.migrate(destination.listen(destination.directory / "in.sock"))
    assert source.wait_migration()["status"] == "completed"
    destination.wait_incoming()
    assert not differing_pages(source, destination).size
    destination.kill()
    source.cont()  # works again and again: one booted guest serves many migrations
"""

import contextlib
import mmap
import os
import shlex
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.lab import hypervisors
from tests.lab.hosts import Host
from tests.lab.image import guest_image
from tests.lab.processes import drop_workspace, end, make_workspace, spawn
from tests.lab.qmp import QMPClient, QMPClosed, connect_unix

PAGE_SIZE = 4096
ENDED = ("completed", "failed", "cancelled")
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet loglevel=4 panic=-1 nokaslr mitigations=off random.trust_cpu=on"
    " tsc=reliable no_timer_check init_on_alloc=0 transparent_hugepage=never 8250.nr_uarts=4"
)


class GuestError(Exception):
    """The guest or its QEMU did not do what it was asked; the message holds what they last said."""


@dataclass(frozen=True)
class GuestSpec:
    """What a guest is made of. Source and destination of a migration take the same one."""

    disk: Path
    ram_mb: int = 512
    fill_mb: int = 256
    mapped: int = 90  # percent of the filled frames that are copies of the disk
    zero: int = 5  # percent that stay zero; the rest has content of its own
    seed: int = 7
    thp: bool = False  # transparent huge pages for the filled memory
    smp: int = 1
    exact: bool = True  # RAM of a size with which QEMU under TCG loses no dirty page
    shared: bool = True  # RAM in memfds, so that the harness reads it without QEMU
    numa_nodes: int = 1
    machine: str = "pc"
    cpu: str = "qemu64"
    qemu: tuple[str, ...] = field(default_factory=hypervisors.qemu)
    extra: tuple[str, ...] = field(default=())

    @property
    def ram_bytes(self) -> int:
        """Size of the guest's RAM; 8 KiB more than ram_mb if it is to be exact.

        QEMU's sync of the dirty bitmap of a RAMBlock of a multiple of 256 KiB takes 64 pages at a
        time, and under TCG the vCPU's TLB is then not told (never up to 8.2; later, not when all
        pages written to were still dirty): later writes to those pages go unnoticed. A direct
        migration of a running guest leaves a few kernel pages behind in 5 to 20 % of all cases,
        and the guest may crash at the destination. Other sizes are synced page by page, rightly.
        """
        return (self.ram_mb << 20) + (8192 if self.exact else 0)

    @property
    def mailbox_bytes(self) -> int:
        """Size of the disk on which the guest writes its map."""
        return (self.fill_mb * 256 * 16 + (1 << 20)) & ~0xFFFFF | 1 << 20

    @property
    def kernel_arguments(self) -> str:
        return (
            f"{KERNEL_ARGUMENTS} ndm.fill={self.fill_mb} ndm.mapped={self.mapped}"
            f" ndm.zero={self.zero} ndm.seed={self.seed} ndm.thp={int(self.thp)}"
        )

    @property
    def block_names(self) -> tuple[str, ...]:
        """RAMBlock idstrs of the guest's memory, named as libvirt names them."""
        if self.numa_nodes == 1:
            return ("pc.ram",)
        return tuple(f"ram-node{node}" for node in range(self.numa_nodes))


class Guest:
    """One QEMU process. Make it with `start_source` or `start_destination`; a context manager."""

    def __init__(self, spec: GuestSpec, *, incoming: bool, directory: Path | None = None,
                 host: Host | None = None) -> None:  # fmt: skip
        self.spec = spec
        self.host = host
        self.directory = self._make_directory(directory)
        self.boot_seconds = 0.0
        self._ram: dict[str, NDArray[np.uint8]] = {}
        self._maps: list[mmap.mmap] = []
        self._sockets: list[socket.socket] = []
        self._process: subprocess.Popen[Any] | None = None
        self._closed = False
        try:
            self._start(incoming)
        except BaseException:
            self.close()
            raise

    @classmethod
    def start_source(cls, spec: GuestSpec, *, directory: Path | None = None,
                     host: Host | None = None, timeout: float = 120) -> "Guest":  # fmt: skip
        """Boot a guest and wait until its memory is filled and its buffer map written.

        :raises GuestError: it did not become ready in time.
        """
        started = time.monotonic()
        guest = cls(spec, incoming=False, directory=directory, host=host)
        try:
            guest.wait_ready(timeout)
        except BaseException:
            guest.close()
            raise
        guest.boot_seconds = time.monotonic() - started
        return guest

    @classmethod
    def start_destination(cls, spec: GuestSpec, *, directory: Path | None = None,
                          host: Host | None = None) -> "Guest":  # fmt: skip
        """Start a QEMU that waits for `listen` and stays paused after the migration."""
        return cls(spec, incoming=True, directory=directory, host=host)

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    # -- the process

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def beat_path(self) -> Path:
        """The UNIX socket on which the guest's heartbeats arrive (see HeartbeatRecorder)."""
        return self.directory / "beat.sock"

    def last_words(self) -> str:
        """What QEMU and the guest's kernel printed last, for error messages."""
        said = []
        for name in ("qemu.log", "console.log"):
            with contextlib.suppress(OSError):
                said.append((self.directory / name).read_bytes()[-2000:].decode(errors="replace"))
        return "\n".join(said).strip()

    def kill(self) -> None:
        """End QEMU at once, as a crash does (SIGKILL). The directory stays until `close`."""
        if self._process is not None:
            end(self._process)

    def close(self) -> None:
        """End QEMU if it still runs and delete all that belongs to this guest."""
        if self._closed:
            return
        self._closed = True
        self.kill()
        for connection in self._sockets:
            connection.close()
        self._ram.clear()
        for mapping in self._maps:
            with contextlib.suppress(BufferError):  # someone still holds an array of it
                mapping.close()
        self._drop_directory()

    # -- monitor

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; underscores in argument names become dashes."""
        fixed = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.monitor.execute(command, fixed)

    def hmp(self, text: str) -> str:
        return str(self.monitor.execute("human-monitor-command", {"command-line": text}))

    def stop(self) -> None:
        self.qmp("stop")

    def cont(self) -> None:
        self.qmp("cont")

    @property
    def status(self) -> str:
        """QEMU's run state: running, paused, inmigrate, postmigrate, ..."""
        return str(self.qmp("query-status")["status"])

    # -- the program in the guest

    def command(self, line: str, timeout: float = 60) -> str:
        """Send one command line to the guest's program, return what follows "ok" in its answer.

        Commands: `dirty SHARE RATE [touch|full|same]` (percent of the frames, MB/s of pages; rate 0
        stops it, and once it has answered nothing more is written; `touch` changes 64 bytes of each
        page, `full` all of it, `same` nothing), `fill MAPPED ZERO SEED` (as at boot, see `fill`),
        `map`, `sum`, `beat on|off`, `ping`.

        :raises GuestError: the guest refused it or did not answer in time.
        """
        self._commands.sendall(line.encode() + b"\n")
        answer = self._read_line(timeout, f"an answer to {line!r}")
        verdict, _, rest = answer.partition(" ")
        if verdict != "ok":
            raise GuestError(f"{line!r}: {answer}")
        return rest

    def wait_ready(self, timeout: float) -> None:
        """Wait for the guest's word that it has booted and filled its memory; once only.

        :raises GuestError: it said something else, or nothing in time.
        """
        line = self._read_line(timeout, "READY")
        if line != "READY":
            raise GuestError(f"the guest did not become ready: {line}\n{self.last_words()}")

    def fill(
        self, *, mapped: int | None = None, zero: int | None = None, seed: int | None = None
    ) -> None:
        """Fill memory anew, as after a boot: the map is right again. Ends dirtying. < 1 s."""
        spec = self.spec
        values = zip((mapped, zero, seed), (spec.mapped, spec.zero, spec.seed), strict=True)
        numbers = [str(default if value is None else value) for value, default in values]
        self.command(" ".join(["fill", *numbers]))

    def buffer_map_extents(
        self, *, refresh: bool = True
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Guest-physical address and byte offset on the data disk of each mapped 4 KiB page.

        With refresh the (running) guest writes its map anew, else the last one written is read. The
        map says where a page was read from; a page dirtied since then stays in it, as in a DBMS.
        """
        if refresh:
            self.command("map")
        raw = (self.directory / "mailbox.raw").read_bytes()
        if raw[:7] != b"NDMMAP1":
            raise GuestError("the guest has not written its map")
        count = int.from_bytes(raw[8:16], "little")
        pairs = np.frombuffer(raw, "<u8", 2 * count, PAGE_SIZE).reshape(count, 2)
        return pairs[:, 0].copy(), pairs[:, 1].copy()

    # -- memory

    @property
    def ram(self) -> NDArray[np.uint8]:
        """Live read-only view of a one-node guest's RAM, (pages, 4096); needs spec.shared."""
        (block,) = self.ram_blocks.values()
        return block

    @property
    def ram_blocks(self) -> dict[str, NDArray[np.uint8]]:
        """Live read-only view of each RAMBlock of RAM, (pages, 4096); needs spec.shared."""
        if not self._ram:
            raise GuestError("RAM is not shared: use pmemsave")
        return self._ram

    def page_of(self, gpa: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Page index in `ram` of guest-physical addresses (up to 2 GiB there is no hole)."""
        if self.spec.ram_mb > 2048 or self.spec.numa_nodes > 1:
            raise GuestError("addresses are RAM offsets only up to 2 GiB, without NUMA")
        return (gpa // np.uint64(PAGE_SIZE)).astype(np.int64)

    def pmemsave(self, path: Path, start: int = 0, size: int | None = None) -> Path:
        """Let QEMU write guest-physical memory to a file (default: all RAM, up to 2 GiB)."""
        size = self.spec.ram_bytes if size is None else size
        self.qmp("pmemsave", val=start, size=size, filename=str(path))
        return path

    # -- migration

    def set_capabilities(self, *names: str, state: bool = True) -> None:
        self.qmp(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": state} for name in names],
        )

    def set_parameters(self, **parameters: Any) -> None:
        """Migration parameters, for example max_bandwidth (bytes/s), downtime_limit (ms)."""
        self.qmp("migrate-set-parameters", **parameters)

    def listen(self, address: str | Path) -> str:
        """Let a destination listen at a URI or UNIX socket path. Returns the URI to migrate to."""
        uri = f"unix:{address}" if isinstance(address, Path) else address
        self.qmp("migrate-incoming", uri=uri)
        return uri

    def migrate(self, uri: str | Path) -> None:
        """Begin a migration; `wait_migration` waits for its end."""
        self.qmp("migrate", uri=f"unix:{uri}" if isinstance(uri, Path) else uri)

    def migration(self) -> dict[str, Any]:
        """QEMU's query-migrate: status, ram, total-time and downtime (ms), error-desc ..."""
        return dict(self.qmp("query-migrate"))

    def wait_migration(self, timeout: float = 120,
                       until: tuple[str, ...] = ENDED) -> dict[str, Any]:  # fmt: skip
        """Wait until the migration has one of the statuses; returns query-migrate then."""
        deadline = time.monotonic() + timeout
        while True:
            state = self.migration()
            if state.get("status") in until:
                return state
            if time.monotonic() > deadline:
                raise GuestError(f"migration is still {state.get('status')}: {state}")
            time.sleep(0.02)

    def wait_incoming(self, timeout: float = 30) -> str:
        """Wait until a destination has taken over the guest; returns its run state ("paused").

        :raises GuestError: QEMU ended (the stream was broken), or it took too long.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                status = self.status
            except QMPClosed as error:
                raise GuestError(f"the destination has ended: {self.last_words()}") from error
            if status != "inmigrate":
                return status
            if time.monotonic() > deadline:
                raise GuestError(f"the destination still waits: {self.last_words()}")
            time.sleep(0.02)

    # -- start

    def _make_directory(self, parent: Path | None) -> Path:
        return make_workspace(parent)

    def _drop_directory(self) -> None:
        drop_workspace(self.directory)

    def _start(self, incoming: bool) -> None:
        with open(self.directory / "mailbox.raw", "wb") as mailbox:
            mailbox.truncate(self.spec.mailbox_bytes)
        argv = [*self.spec.qemu, *self._arguments(incoming)]
        if self.host is not None:
            argv = self.host.argv(argv)
        with open(self.directory / "qemu.log", "wb") as log:
            log.write(shlex.join(argv).encode() + b"\n")
            log.flush()
            self._process = spawn(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.monitor = QMPClient(self._reachable("qmp.sock"))
            self._sockets.append(self.monitor._socket)
            self._commands = connect_unix(self._reachable("command.sock"), 10)
            self._sockets.append(self._commands)
        except (OSError, QMPClosed) as error:
            raise GuestError(f"QEMU did not start: {error}\n{self.last_words()}") from error
        self._rest = b""
        if self.spec.shared:
            self._map_ram()
        # QEMU's default of 128 MiB/s is the host's own shaping to set, not the monitor's.
        self.set_parameters(max_bandwidth=1 << 34)

    def _reachable(self, name: str) -> Path:
        """Path of a socket once it exists, so that a QEMU that cannot start fails at once."""
        path = self.directory / name
        while self.alive and not path.exists():
            time.sleep(0.01)
        if not self.alive:
            raise GuestError(f"QEMU did not start:\n{self.last_words()}")
        return path

    def _arguments(self, incoming: bool) -> list[str]:
        spec, here, image = self.spec, self.directory, guest_image()
        arguments = [
            *("-accel", "tcg", "-cpu", spec.cpu, "-smp", str(spec.smp), "-m", f"{spec.ram_bytes}B"),
            *("-nodefaults", "-display", "none", "-no-reboot", "-name", "ndm-lab"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
            *("-append", spec.kernel_arguments),
            *self._memory_arguments(),
            *("-chardev", f"socket,id=qmp,path={here}/qmp.sock,server=on,wait=off"),
            *("-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"file,id=console,path={here}/console.log"),
            *("-chardev", f"socket,id=command,path={here}/command.sock,server=on,wait=off"),
            *("-chardev", f"socket,id=beat,path={here}/beat.sock,server=on,wait=off"),
        ]
        for name in ("console", "command", "beat"):
            arguments += ["-serial", f"chardev:{name}"]
        # Two QEMUs have the data disk open, and tests change it under them: no image locks.
        for name, path, read_only in (
            ("data", spec.disk, "on"),
            ("mailbox", here / "mailbox.raw", "off"),
        ):
            arguments += [
                "-drive",
                f"if=none,id={name},file={path},format=raw,file.locking=off,read-only={read_only}",
                *("-device", f"virtio-blk-pci,drive={name}"),
            ]
        if incoming:
            arguments += ["-incoming", "defer", "-S"]
        return [*arguments, *spec.extra]

    def _memory_arguments(self) -> list[str]:
        spec, arguments = self.spec, []
        kind = "memory-backend-memfd" if spec.shared else "memory-backend-ram"
        for node, name in enumerate(spec.block_names):
            size = spec.ram_bytes // spec.numa_nodes
            sharing = ",share=on" if spec.shared else ""
            # Old machine types would call the RAMBlock /objects/..., libvirt forbids it too.
            sharing += ",x-use-canonical-path-for-ramblock-id=off"
            arguments += ["-object", f"{kind},id={name},size={size}{sharing}"]
            if spec.numa_nodes > 1:
                arguments += ["-numa", f"node,nodeid={node},memdev={name}"]
                if node < spec.smp:
                    arguments[-1] += f",cpus={node}"
        machine = spec.machine
        if spec.numa_nodes == 1:
            machine += ",memory-backend=pc.ram"
        return ["-machine", machine, *arguments]

    def _map_ram(self) -> None:
        # QEMU gives all its memfds one name; descriptors ascend in the order of the command line.
        found: list[int] = []
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith("/memfd:memory-backend-memfd"):
                    found.append(int(link.name))
        if len(found) != len(self.spec.block_names):
            raise GuestError(f"RAM is in {len(found)} memfds, not {len(self.spec.block_names)}")
        for name, descriptor in zip(self.spec.block_names, sorted(found), strict=True):
            with open(f"/proc/{self.pid}/fd/{descriptor}", "rb") as memory:
                mapping = mmap.mmap(memory.fileno(), 0, prot=mmap.PROT_READ)
            self._maps.append(mapping)
            self._ram[name] = np.frombuffer(mapping, np.uint8).reshape(-1, PAGE_SIZE)

    def _read_line(self, timeout: float, awaited: str) -> str:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            try:
                self._commands.settimeout(max(left, 0.001))
                data = self._commands.recv(4096)
            except TimeoutError:
                data = b""
            if not data:
                why = "in time" if self.alive else "before its QEMU ended"
                raise GuestError(f"no {awaited} {why}\n{self.last_words()}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")
