# SPDX-License-Identifier: Apache-2.0
"""Database servers without a database: variables that clamp each other as the real ones do.

And a map without a server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

from nova_dmigrate import exception
from nova_dmigrate.agent import flushing
from nova_dmigrate.agent.database import Login, PoolStatus
from nova_dmigrate.buffermap import BufferMap
from nova_dmigrate.findings import Finding

# Defaults of each: capacity_max, capacity, idle (None where it is unknown), low water, high water
DEFAULTS = {
    ("mysql", (5, 6, 24)): ("2000", "200", None, "0", "75"),
    ("mysql", (5, 7, 44)): ("2000", "200", None, "0.000000", "75.000000"),
    ("mysql", (8, 0, 36)): ("2000", "200", "100", "10.000000", "90.000000"),
    ("mysql", (8, 4, 3)): ("20000", "10000", "100", "10.000000", "90.000000"),
    ("mysql", (9, 7, 0)): ("20000", "10000", "50", "10.000000", "90.000000"),
    ("mariadb", (10, 5, 22)): ("2000", "200", None, "0.000000", "90.000000"),
    ("mariadb", (11, 8, 2)): ("2000", "200", None, "5.000000", "90.000000"),
}


class FakeServer:
    """A server that outlives its connections.

    ``dirty``: dirty pages of 1000. ``down``: nobody listens. ``refuses``: names of variables that
    cannot be set. ``crash_at``: the number of the change before which the agent dies.
    """

    def __init__(
        self,
        flavour: str = "mysql",
        version: tuple[int, int, int] = (8, 0, 36),
        socket: str = "/run/one.sock",
    ) -> None:
        self.flavour, self.version, self.socket = flavour, version, socket
        values = DEFAULTS[flavour, version]
        self.values = {
            name: value for name, value in zip(flushing.ORDER, values) if value is not None
        }
        # The process that is looked for in /proc: this one is there
        self.pid: int | None = os.getpid()
        self.uptime = 1000
        self.dirty = 500
        self.down = False
        self.refuses: set[str] = set()
        self.crash_at: int | None = None
        self.changes: list[tuple[str, str]] = []
        self.connections = 0

    def restart(self) -> None:
        """Another process, with the settings of its configuration."""
        fresh = FakeServer(self.flavour, self.version)
        self.values, self.pid, self.uptime = fresh.values, os.getppid(), 0


class Killed(BaseException):
    """The agent does not get any further."""


class FakeDatabase:
    """A connection to a `FakeServer`; the interface of agent.database.Database."""

    def __init__(self, server: FakeServer, login: Login) -> None:
        self._server = server
        self.login = login
        self.flavour, self.version, self.pid = server.flavour, server.version, server.pid
        server.connections += 1

    def close(self) -> None:
        self._server.connections -= 1

    def variables(self, names: Sequence[str]) -> dict[str, str]:
        return {name: self._server.values[name] for name in names if name in self._server.values}

    def status(self, names: Sequence[str]) -> dict[str, str]:
        figures = {"Uptime": self._server.uptime, "Com_commit": 7, "Queries": 90}
        return {name: str(figures[name]) for name in names if name in figures}

    def latency(self) -> float:
        return 0.0015

    def pool(self) -> PoolStatus:
        return PoolStatus(page_bytes=16384, total=2000, data=1000, dirty=self._server.dirty)

    def set_global(self, name: str, value: str) -> None:
        server, values = self._server, self._server.values
        if server.crash_at == len(server.changes):
            raise Killed
        if name in server.refuses:
            raise exception.ServerError(
                server=server.socket, reason="SUPER is needed", code="privilege"
            )
        server.changes.append((name, value))
        number = float(value)
        if name == flushing.CAPACITY:
            number = min(number, float(values[flushing.CAPACITY_MAX]))
        if name == flushing.LOW_WATER:
            number = min(number, float(values[flushing.HIGH_WATER]))
        values[name] = _shown(values[name], number)
        if name == flushing.CAPACITY_MAX and number < float(values[flushing.CAPACITY]):
            values[flushing.CAPACITY] = values[name]
        if name == flushing.HIGH_WATER and number < float(values[flushing.LOW_WATER]):
            values[flushing.LOW_WATER] = values[name]


class FakeGuest:
    """The servers of a guest, as `Preparation` wants them."""

    def __init__(self, *servers: FakeServer) -> None:
        self.servers = list(servers)

    def logins(self) -> list[Login]:
        return [Login(server.socket) for server in self.servers]

    def connect(self, login: Login) -> FakeDatabase:
        (server,) = [each for each in self.servers if each.socket == login.socket]
        if server.down:
            raise exception.ServerError(server=server.socket, reason="refused", code="gone")
        return FakeDatabase(server, login)


def _shown(like: str, number: float) -> str:
    """A number as the server shows that variable."""
    return f"{number:.6f}" if "." in like else str(int(number))


class FakeServerMap:
    """In the place of mapper.ServerMap: a map that was made before."""

    def __init__(self, parts: Sequence[BufferMap], findings: Sequence[Finding] = ()) -> None:
        self._parts = parts
        self.summary = SimpleNamespace(findings=findings)
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __iter__(self) -> Iterator[BufferMap]:
        return iter(self._parts)
