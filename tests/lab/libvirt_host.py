# SPDX-License-Identifier: Apache-2.0
"""One host of the libvirt lab: network, mount and UTS namespace, and a libvirtd of its own.

The directories that tell two hosts apart are private: inside, they have the paths of any host;
outside, `LibvirtHost.outside` says where they are, for sockets that a test wants to reach.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import libvirt

from tests.lab import emulator, hypervisors, subreaper
from tests.lab.hosts import Host
from tests.lab.processes import end, spawn

#: Where the emulator of guests with exact memory is on each host.
EXACT_EMULATOR = Path("/etc/libvirt/emulator")
#: For sockets and files of guests and of what serves them.
GUESTS = Path("/run/guests")
#: Seconds for libvirtd to answer on a busy machine; it asks QEMU for its capabilities at first.
PATIENCE = 60.0
_STOP_PATIENCE = 15.0

# /run hides what is beneath it: it comes last.
_PRIVATE = ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/run")
_PRIVATE_FILES = ("/etc/hosts", "/etc/machine-id")

# /sys shows the network of whoever mounts it. The holder keeps the namespaces: reads until its end.
_SETUP = """
set -e
hostname "$1"; shift
mount -t sysfs sysfs /sys
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
echo ready
exec cat >/dev/null
"""

_LIBVIRTD_CONF = """
listen_tls = 0
listen_tcp = 1
listen_addr = "{address}"
auth_tcp = "none"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{uuid}"
"""

_QEMU_CONF = """
user = "root"
group = "root"
security_driver = "none"
remember_owner = 0
dynamic_ownership = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
migration_address = "{address}"
migration_host = "{address}"
"""


class LibvirtHostError(Exception):
    """A host or its libvirtd did not start; the message holds what it last said."""


class LibvirtHost(Host):
    """`name` is its hostname. `run`, `popen`, `argv` act in its namespaces, at the caller's cwd.

    Made by LibvirtHosts, which removes `directory`, too.
    """

    def __init__(self, host: Host, directory: Path) -> None:
        super().__init__(host.pair, host.namespace, host.address, host.mac)
        self.name = host.namespace
        self.directory = directory
        self.log_file = directory / "libvirtd.log"
        self._holder: subprocess.Popen[bytes] | None = None
        self._libvirtd: subprocess.Popen[bytes] | None = None
        self._forwarders: list[subprocess.Popen[bytes]] = []

    # -- life

    def start(self, neighbours: Sequence[Host]) -> None:
        """Make the namespaces and start libvirtd. What fails half-way is undone by `close`.

        :param neighbours: all hosts that shall have a name here.
        :raises LibvirtHostError: it did not start.
        """
        self._write_files(neighbours)
        mounts = [
            part
            for path in (*_PRIVATE_FILES, *_PRIVATE)
            if Path(path).exists()
            for part in (str(self.outside(Path(path))), path)
        ]
        unshare = ["unshare", "--mount", "--uts", "--propagation", "private", "--"]
        with open(self.directory / "setup.log", "wb") as log:
            self._holder = spawn(
                super().argv([*unshare, "sh", "-c", _SETUP, "sh", self.name, *mounts]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise LibvirtHostError((self.directory / "setup.log").read_text())
        self.start_libvirtd()

    def start_libvirtd(self) -> None:
        """Start libvirtd, also again after `kill_libvirtd`, and wait until it answers.

        :raises LibvirtHostError: it did not.
        """
        with open(self.log_file, "ab") as log:
            self._libvirtd = self.popen(
                [sys.executable, "-I", subreaper.__file__, *hypervisors.libvirtd(), "--listen"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.connect().close()
                return
            except libvirt.libvirtError as error:
                if self._libvirtd.poll() is not None or time.monotonic() > deadline:
                    raise LibvirtHostError(f"{error}\n{self.last_words()}") from None
                time.sleep(0.05)

    @property
    def libvirtd_pid(self) -> int:
        """:raises LibvirtHostError: it does not run."""
        try:
            return int(self.outside(Path("/run/libvirtd.pid")).read_text())
        except (OSError, ValueError):
            raise LibvirtHostError(f"libvirtd does not run on {self.name}") from None

    @property
    def runs_libvirtd(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._libvirtd is not None and self._libvirtd.poll() is None

    def stop_libvirtd(self) -> None:
        """End libvirtd as an administrator would; guests run on."""
        if self._libvirtd is not None:
            end(self._libvirtd, [(signal.SIGTERM, _STOP_PATIENCE)])
            self._libvirtd = None

    def kill_libvirtd(self) -> None:
        """End libvirtd as a crash does (SIGKILL); guests run on."""
        assert self._libvirtd is not None
        os.kill(self.libvirtd_pid, signal.SIGKILL)
        self._libvirtd.wait(_STOP_PATIENCE)
        end(self._libvirtd)
        self._libvirtd = None

    def close(self) -> None:
        """End libvirtd and the namespaces; guests must have ended."""
        self.stop_libvirtd()
        while self._forwarders:
            end(self._forwarders.pop())
        if self._holder is not None:
            end(self._holder)
            self._holder = None

    def last_words(self) -> str:
        """The end of libvirtd's log, for error messages."""
        with contextlib.suppress(OSError):
            return self.log_file.read_bytes()[-3000:].decode(errors="replace")
        return ""

    # -- ways in

    @property
    def uri(self) -> str:
        """For connections from outside the namespaces."""
        return f"qemu+unix:///system?socket={self.outside(Path('/run/libvirt/libvirt-sock'))}"

    @property
    def peer_uri(self) -> str:
        """For connections from the other host: the destination of a migration."""
        return f"qemu+tcp://{self.address}/system"

    def connect(self) -> libvirt.virConnect:
        """A connection to this host's libvirtd.

        :raises libvirt.libvirtError: it does not answer.
        """
        return libvirt.open(self.uri)

    def forward(self, port: int) -> None:
        """Let 127.0.0.1:port here be the machine's, which is where a broker of the lab listens."""
        socket = Path(f"/run/forward-{port}.sock")
        ways = (
            ([f"UNIX-LISTEN:{self.outside(socket)},fork", f"TCP:127.0.0.1:{port}"], False),
            ([f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork", f"UNIX-CONNECT:{socket}"], True),
        )
        for addresses, here in ways:
            argv = ["socat", *addresses]
            start = self.popen if here else spawn
            # It complains of each connection while there is no broker
            quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self._forwarders.append(start(argv, **quiet))
        self._wait_for_listener(port)

    def outside(self, path: Path) -> Path:
        """Where a file of a private directory is for those outside the namespaces."""
        for private in (*_PRIVATE, *_PRIVATE_FILES):
            if path.is_relative_to(private):
                return self.directory / private[1:].replace("/", "-") / path.relative_to(private)
        return path

    def argv(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        assert self._holder is not None
        enter = [
            "nsenter",
            f"--net=/run/netns/{self.namespace}",
            f"--mount=/proc/{self._holder.pid}/ns/mnt",
            f"--uts=/proc/{self._holder.pid}/ns/uts",
            f"--wdns={os.getcwd()}",
            "--",
        ]
        return [*enter, *(os.fspath(a) for a in argv)]

    # -- parts

    def _wait_for_listener(self, port: int) -> None:
        deadline = time.monotonic() + PATIENCE
        listening = ["ss", "--no-header", "--listening", "--tcp", f"sport = :{port}"]
        while not self.run(listening).stdout:
            if time.monotonic() > deadline:
                raise LibvirtHostError(f"{self.name} does not listen at {port}")
            time.sleep(0.02)

    def _write_files(self, neighbours: Sequence[Host]) -> None:
        own = str(uuid.uuid4())
        for path in _PRIVATE:
            self.outside(Path(path)).mkdir(parents=True)
        for directory in (GUESTS, Path("/run/libvirt"), Path("/run/lock")):
            self.outside(directory).mkdir()
        names = "".join(f"{each.address} {each.namespace}\n" for each in neighbours)
        self._write("/etc/hosts", f"127.0.0.1 localhost\n{names}")
        self._write("/etc/machine-id", own.replace("-", "") + "\n")
        values = {"address": self.address, "uuid": own}
        self._write("/etc/libvirt/libvirtd.conf", _LIBVIRTD_CONF.format(**values))
        self._write("/etc/libvirt/qemu.conf", _QEMU_CONF.format(**values))
        self._write(str(EXACT_EMULATOR), emulator.script(sys.executable))
        self.outside(EXACT_EMULATOR).chmod(0o755)

    def _write(self, path: str, text: str) -> None:
        self.outside(Path(path)).write_text(text)


def _quietly(_: object, __: object) -> None:
    """libvirt prints each error beside raising it, unless it is told where errors shall go."""


libvirt.registerErrorHandler(_quietly, None)
