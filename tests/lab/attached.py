# SPDX-License-Identifier: Apache-2.0
"""The QEMU of a libvirt domain as a `Guest`: its monitor, its program and its memory.

libvirt starts and ends the QEMU; these only hold connections to it, for as long as the domain is on
that host.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from tests.lab.database_guest import DatabaseGuest
from tests.lab.guest import Guest, GuestError, GuestSpec
from tests.lab.libvirt_host import GUESTS, LibvirtHost
from tests.lab.processes import start_time
from tests.lab.qmp import QMPClosed, QMPError, connect_unix


class LibvirtMonitor:
    """QMP by way of libvirt, with the interface of QMPClient."""

    def __init__(self, domain: Callable[[], libvirt.virDomain]) -> None:
        self._domain = domain

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = 0
    ) -> Any:
        """Run a command and return its result. libvirt alone decides how long it may take.

        :raises QMPError: QEMU's refusal.
        :raises QMPClosed: the domain does not run, or libvirt is gone.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        try:
            text = libvirt_qemu.qemuMonitorCommand(self._domain(), json.dumps(request), 0)
        except libvirt.libvirtError as error:
            raise QMPClosed(f"{command}: {error}") from None
        answer = json.loads(text)
        if "error" in answer:
            raise QMPError(command, answer["error"])
        return answer.get("return")


class AttachedGuest(Guest):
    """Of a domain that is on `host`; close it when the domain has left."""

    host: LibvirtHost

    def __init__(self, spec: GuestSpec, host: LibvirtHost, name: str,
                 domain: Callable[[], libvirt.virDomain]) -> None:  # fmt: skip
        """:param domain: finds libvirt's handle of it.
        :raises GuestError: the domain does not run there.
        """
        self.name = name
        self._pid = _qemu_pid(host, name)
        self._started = start_time(self._pid)
        self.monitor = LibvirtMonitor(domain)  # type: ignore[assignment]
        super().__init__(spec, incoming=False, directory=host.outside(GUESTS), host=host)

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def alive(self) -> bool:
        return self._started is not None and start_time(self._pid) == self._started

    def kill(self) -> None:
        """End QEMU at once, as a crash does (SIGKILL)."""
        if self.alive:
            os.kill(self._pid, signal.SIGKILL)

    def detach(self) -> None:
        """Close the connections; QEMU runs on."""
        self._started = None
        self.close()

    def _make_directory(self, parent: Path | None) -> Path:
        assert parent is not None
        return parent / self.name

    def _drop_directory(self) -> None:
        """It is the domain's."""

    def _start(self, incoming: bool) -> None:
        try:
            self._commands = connect_unix(self._reachable("command.sock"), 10)
        except OSError as error:
            raise GuestError(f"{self.name} has no port for commands: {error}") from error
        self._sockets.append(self._commands)
        self._rest = b""
        if self.spec.shared:
            self._map_ram()


class AttachedDatabase(AttachedGuest, DatabaseGuest):
    """A database guest of which the host service may have the agent's port."""


def _qemu_pid(host: LibvirtHost, name: str) -> int:
    path = host.outside(Path(f"/run/libvirt/qemu/{name}.pid"))
    try:
        return int(path.read_text())
    except OSError as error:
        raise GuestError(f"{name} does not run on {host.name}: {error}") from None
