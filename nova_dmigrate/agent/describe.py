# SPDX-License-Identifier: Apache-2.0
"""What the agent knows of its guest, and what is missing for a quick migration."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nova_dmigrate import exception, version
from nova_dmigrate.agent import database, processes
from nova_dmigrate.agent.maps import to_messages
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.rpc import messages

Connect = Callable[[database.Login], database.Database]

_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
# Bits of the effective capabilities, and what is impossible without
_CAPABILITIES = {
    "CAP_DAC_READ_SEARCH": (2, "open the files of the database"),
    "CAP_SYS_PTRACE": (19, "read the memory of the database server"),
    "CAP_SYS_ADMIN": (21, "learn guest-physical addresses"),
    "CAP_SETGID": (6, "keep a list of hot pages beside the data, as the server's group"),
    "CAP_SETUID": (7, "keep a list of hot pages beside the data, as the server's account"),
}
_FLUSH_METHOD = "innodb_flush_method"
_BUFFERING = "innodb_data_file_buffering"  # MariaDB 11
_POOL_SIZE = "innodb_buffer_pool_size"
# Seconds for a statement: while health is found out, nothing else is answered over a port
_HEALTH_PATIENCE = 2.0
# Handler_commit is not what clients have committed: it has each statement of a transaction as well,
# and all of it twice where there is a binary log
_COMMITS = "Com_commit"
# Unlike Questions with what stored programs and events do
_QUERIES = "Queries"


@dataclasses.dataclass(frozen=True)
class Inspection:
    """All that was found out, in the agent's own records."""

    servers: tuple[messages.Server, ...]
    findings: tuple[Finding, ...]
    memory_bytes: int
    expected_share: float

    def to_message(self) -> messages.Description:
        return messages.Description(
            agent_version=version.version_string(),
            memory_bytes=self.memory_bytes,
            expected_share=self.expected_share,
            servers=self.servers[: messages.MAX_SERVERS],
            findings=to_messages(self.findings),
        )


def inspect(
    find: Callable[[], Sequence[processes.ServerProcess]],
    login: Callable[[processes.ServerProcess], database.Login | None],
    connect: Connect = database.connect,
) -> Inspection:
    """Look at the servers and at ourselves. Troubles become findings, never errors.

    :param find: the servers that are meant; raises AgentError if there is none.
    :param login: how to reach a server, None if it listens on no socket; raises ServerError.
    """
    found = missing_capabilities(_STATUS.read_text(encoding="ascii"))
    memory = total_memory(_MEMORY.read_text(encoding="ascii"))
    servers: list[messages.Server] = []
    clean = 0
    try:
        running = find()
    except exception.AgentError as error:
        running = []
        code = "no-privilege" if isinstance(error, exception.PrivilegeError) else "no-server"
        found.append(Finding(code, Severity.PROBLEM, str(error)))
    for process in running:
        try:
            reach = login(process)
            if reach is None:
                text = f"The server in {process.datadir} has no socket: it cannot be prepared"
                found.append(Finding("no-socket", Severity.PROBLEM, text))
                continue
            with connect(reach) as server:
                pool = server.pool()
                servers.append(_server(process, server, pool))
                found += inspect_server(server)
        except exception.ServerError as error:
            code = "no-login" if error.kwargs.get("code") == "login" else "no-answer"
            found.append(Finding(code, Severity.PROBLEM, str(error)))
            continue
        clean += max(0, pool.data - pool.dirty) * pool.page_bytes
    return Inspection(
        servers=tuple(servers),
        findings=tuple(found),
        memory_bytes=memory,
        expected_share=min(1.0, clean / memory) if memory else 0.0,
    )


def inspect_server(server: database.Database) -> list[Finding]:
    """What one server's settings and our rights in it mean for a migration."""
    found = []
    name = f"{server.flavour} {server.server_version}"
    if server.may_set_globals():
        found.append(Finding("may-prepare", Severity.OK, f"{name} can be prepared"))
    else:
        statements = database.grants(server.flavour, server.version, server.login.user)
        text = f"{name} does not let {server.login.user} change settings: {statements[-1]}"
        found.append(Finding("no-grant", Severity.PROBLEM, text))
    values = server.variables([_FLUSH_METHOD, _BUFFERING])
    method = values.get(_FLUSH_METHOD, "").upper()
    buffered = values.get(_BUFFERING, "").upper() == "ON"
    if buffered or (_BUFFERING not in values and not method.startswith(("O_DIRECT", "ALL_O_DIR"))):
        text = (
            f"{name} writes through the guest's page cache (innodb_flush_method={method or '-'}): "
            "O_DIRECT lets more of the pool come from the volume"
        )
        found.append(Finding("not-o-direct", Severity.NOTE, text))
    return found


def missing_capabilities(status: str) -> list[Finding]:
    """From the text of /proc/self/status."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    effective = int(match[1], 16) if match else 0
    return [
        Finding("no-capability", Severity.PROBLEM, f"Without {name} the agent cannot {purpose}")
        for name, (bit, purpose) in _CAPABILITIES.items()
        if not effective >> bit & 1
    ]


def total_memory(text: str) -> int:
    """Bytes of memory, from the text of /proc/meminfo; 0 if it does not say."""
    match = re.search(r"^MemTotal:\s*(\d+) kB", text, re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def inspect_health(
    login: database.Login, connect: Connect = database.connect
) -> messages.ServerHealth:
    """Whether a server answers, and what it says of itself."""
    login = dataclasses.replace(login, timeout=min(login.timeout, _HEALTH_PATIENCE))
    try:
        with connect(login) as server:
            latency = server.latency()
            status = server.status(["Uptime", "Threads_running", _COMMITS, _QUERIES])
            pool = server.pool()
    except exception.ServerError as error:
        return messages.ServerHealth(login.socket, False, str(error)[:1000], None, None, None)
    return messages.ServerHealth(
        name=login.socket,
        healthy=True,
        message="",
        uptime=float(status.get("Uptime", 0)),
        dirty_share=pool.dirty_share,
        threads_running=int(status.get("Threads_running", 0)),
        commits=int(status.get(_COMMITS, 0)),
        queries=int(status.get(_QUERIES, 0)),
        latency_ms=round(1000 * latency, 3),
    )


def _server(
    process: processes.ServerProcess, server: database.Database, pool: database.PoolStatus
) -> messages.Server:
    size = server.variables([_POOL_SIZE]).get(_POOL_SIZE)
    return messages.Server(
        name=process.datadir[:256],
        flavour=server.flavour,
        server_version=server.server_version[:256],
        pool_bytes=int(size) if size else pool.total * pool.page_bytes,
        page_bytes=pool.page_bytes,
        filled_share=pool.filled_share,
        dirty_share=pool.dirty_share,
    )
