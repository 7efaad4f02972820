# SPDX-License-Identifier: Apache-2.0
"""A server whose pool can be dumped and loaded, as far as the agent sees of that.

Its directory is a real one, and this process stands for the server's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.agent import flushing, hotlist_server, processes
from nova_dmigrate.agent.database import Login, PoolStatus

DEFAULTS = {
    hotlist_server.FILENAME: "ib_buffer_pool",
    hotlist_server.HOME: "./",
    hotlist_server.DUMP_SHARE: "25",
    hotlist_server.INSTANCES: "1",
    flushing.CAPACITY: "200",
    flushing.CAPACITY_MAX: "2000",
}


class PoolServer:
    """``in_pool``: the pages that a dump tells, in its order. ``loads``: those of each load.

    ``instances``: of its pool, whose pages follow each other there.
    ``name_is_fixed``: its file cannot be named anew. ``may_set``: whether its only account may set
    variables. ``own_load``: it loads by itself, until told not to.
    ``dies_at``: the number of the load that it does not survive.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.values = dict(DEFAULTS)
        self.in_pool: list[tuple[int, int]] = []
        self.loads: list[list[tuple[int, int]]] = []
        self.settings: list[dict[str, str]] = []
        self.may_set = True
        self.refuses_login = False
        self.own_load = False
        self.name_is_fixed = False
        self.flavour = "mysql"
        self.instances = 1
        self.total = 1000
        self.page_bytes = 16384
        self.free = 1 << 20
        self.dies_at: int | None = None
        self.dumps = 0
        self.fails_dump = ""
        self.status = {
            hotlist_server.LOAD_STATUS: "Loading of buffer pool not started",
            hotlist_server.DUMP_STATUS: "Dumping of buffer pool not started",
            hotlist_server._PAGES_READ: "0",
            "Uptime": "100",
        }
        self.process = processes.ServerProcess(
            pid=os.getpid(),
            start_time=processes.read_start_time(os.getpid()),
            executable="/usr/sbin/mysqld",
            datadir=str(directory),
            root=f"/proc/{os.getpid()}/root",
            socket="/run/mysqld.sock",
            uid=os.getuid(),
        )

    # service.Servers

    def find(self) -> Sequence[processes.ServerProcess]:
        return [self.process]

    def login(self, server: processes.ServerProcess) -> Login | None:
        return None if server.socket is None else self.login_at(server.socket)

    def login_at(self, socket: str) -> Login:
        return Login(socket)

    def connect(self, login: Login) -> Any:
        if self.refuses_login:
            raise exception.ServerError(server=login.socket, reason="denied", code="login")
        return PoolDatabase(self, login)

    # What it does

    def dump(self) -> None:
        self.dumps += 1
        if self.fails_dump:
            self.status[hotlist_server.DUMP_STATUS] = self.fails_dump
            return
        share = int(self.values.get(hotlist_server.DUMP_SHARE, 100)) / 100
        size = len(self.in_pool) // self.instances
        lines = [
            page
            for start in range(0, size * self.instances, size or 1)
            for page in self.in_pool[start : start + int(share * size)]
        ]
        path = self.directory / self.values[hotlist_server.FILENAME]
        path.unlink(missing_ok=True)
        path.write_text("".join(f"{space},{page}\n" for space, page in lines))
        self.status[hotlist_server.DUMP_STATUS] = f"Buffer pool(s) dump completed at {self.dumps}"

    def load(self) -> None:
        if self.dies_at == len(self.loads):
            raise exception.ServerError(server="it", reason="gone away", code="gone")
        text = (self.directory / self.values[hotlist_server.FILENAME]).read_text()
        pages = [tuple(map(int, line.split(","))) for line in text.splitlines()]
        self.loads.append(pages)  # type: ignore[arg-type]
        self.settings.append(dict(self.values))
        self.free -= len(pages)
        done = f"Buffer pool(s) load completed at {len(self.loads)}"
        self.status[hotlist_server.LOAD_STATUS] = done


class PoolDatabase:
    """A connection to it; the interface of agent.database.Database."""

    def __init__(self, server: PoolServer, login: Login) -> None:
        self._server = server
        self.login = login
        self.pid = server.process.pid
        self.flavour = server.flavour

    def __enter__(self) -> PoolDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None: ...

    def may_set_globals(self) -> bool:
        return self._server.may_set

    def variables(self, names: Sequence[str]) -> dict[str, str]:
        return {name: self._server.values[name] for name in names if name in self._server.values}

    def status(self, names: Sequence[str]) -> dict[str, str]:
        known = {**self._server.status, hotlist_server._FREE_PAGES: str(self._server.free)}
        if self._server.own_load:
            known[hotlist_server.LOAD_STATUS] = "Loaded 1/1000 pages"
        return {name: known[name] for name in names}

    def pool(self) -> PoolStatus:
        return PoolStatus(self._server.page_bytes, self._server.total, len(self._server.in_pool), 0)

    def set_global(self, name: str, value: str) -> None:
        if name == hotlist_server.DUMP:
            self._server.dump()
        elif name == hotlist_server.LOAD:
            self._server.load()
        elif name == hotlist_server.ABORT:
            self._server.own_load = False
        elif name == hotlist_server.FILENAME and self._server.name_is_fixed:
            raise exception.ServerError(server="it", reason="read only variable", code="read-only")
        else:
            self._server.values[name] = value
