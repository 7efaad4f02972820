# SPDX-License-Identifier: Apache-2.0
"""Two libvirt hosts on one machine, and the migration network between them.

    with workspace() as directory, LibvirtHosts(directory) as hosts:
        hosts.shape(50)                                    # MB/s in each direction, at any time
        domain = Domain(hosts, GuestSpec(disk)).start(hosts.a)
        hosts.a.run(["virsh", "list"])
        domain.migrate()

Needs root; no systemd, no virtlogd. Names are unique to the process, so labs run side by side. A
lab whose process was killed is removed by its reaper (see processes.py); `sweep`, which each start
does first, removes what a reaper could not, because it was killed as well.
"""

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

from tests.lab.hosts import HostPair
from tests.lab.libvirt_host import LibvirtHost
from tests.lab.processes import end_inmates, register, start_time

# One directory for each lab, that says who its process is and where its own directory.
_RECORDS = Path("/run")
_RECORD_PREFIX = "nova-dmigrate-lab-"
_NAMESPACES = Path("/run/netns")


class LibvirtHosts:
    """`a` and `b`, both running. A context manager that yields itself.

    ``link``: the network between them, for what this class does not have (`HostPair.stall`).
    ``directory``: goes with the lab, however that ends.
    """

    def __init__(self, directory: Path) -> None:
        """:param directory: in which the lab makes its own; not beneath /run."""
        self.sweep()
        self.link = HostPair()
        hosts = (self.link.a, self.link.b)
        name = os.path.commonprefix([each.namespace for each in hosts])
        self.directory = directory.resolve() / name
        self._record = _RECORDS / f"{_RECORD_PREFIX}{name}"
        self.a, self.b = (LibvirtHost(each, self.directory / each.namespace) for each in hosts)
        try:
            self._make_directories()
            for host in (self.a, self.b):
                host.start(hosts)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "LibvirtHosts":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def shape(self, mb_per_s: float | None) -> None:
        """Limit each direction of the migration network to so many MB/s, also in mid-migration;
        None: no limit.
        """
        self.link.shape(None if mb_per_s is None else mb_per_s * 1e6)

    def cut(self) -> None:
        """Pull the cable of the migration network."""
        self.link.cut()

    def heal(self) -> None:
        """Undo `cut`."""
        self.link.restore()

    def other(self, host: LibvirtHost) -> LibvirtHost:
        """The host that is not this one."""
        return self.b if host is self.a else self.a

    def close(self) -> None:
        """End guests, libvirtds and whatever else runs on the hosts; remove all of it."""
        for host in (self.a, self.b):
            host.stop_libvirtd()
            end_inmates(host.namespace)
            host.close()
        self.link.close()
        for directory in (self.directory, self._record):
            shutil.rmtree(directory, ignore_errors=True)
            register.remove("dir", directory)

    @staticmethod
    def sweep() -> list[str]:
        """Remove the remains of labs whose process has ended, with the other networks that it had;
        the labs' names.
        """
        found = []
        for record in _RECORDS.glob(f"{_RECORD_PREFIX}*"):
            try:
                owner, name = (record / "owner").read_text().splitlines()
            except FileNotFoundError:  # being made, or removed by somebody else
                continue
            pid, _, started = owner.partition(":")
            if start_time(int(pid)) == started:
                continue
            directory = Path(name)
            found.append(directory.name)
            namespaces = {f"{directory.name}a", f"{directory.name}b"}
            if start_time(int(pid)) is None:  # no other process has it now
                namespaces.update(each.name for each in _NAMESPACES.glob(f"ndm{pid}[a-z]*"))
            for namespace in namespaces:
                end_inmates(namespace)
                argv = ["ip", "netns", "delete", namespace]
                subprocess.run(argv, capture_output=True, check=False)
            for each in (directory, record):
                shutil.rmtree(each, ignore_errors=True)
        return found

    def _make_directories(self) -> None:
        for directory in (self.directory, self._record):
            register.add("dir", directory)
            directory.mkdir()
        # Whole from the first moment, for a sweep that looks now
        unfinished = self._record / "unfinished"
        unfinished.write_text(f"{os.getpid()}:{start_time(os.getpid())}\n{self.directory}\n")
        unfinished.rename(self._record / "owner")
