# SPDX-License-Identifier: Apache-2.0
"""The methods of the agent, and the records that they take and return.

Versions: the major number changes when an old client or agent would misunderstand a new one. The
minor one grows with every method, argument or field that is added; additions have defaults, and
who does not know a field of an answer ignores it. Arguments that are not known are refused.
"""

from __future__ import annotations

import dataclasses

from nova_dmigrate import exception
from nova_dmigrate.rpc.fields import (
    boolean,
    checked,
    choice,
    integer,
    number,
    optional,
    record,
    several,
    text,
    token,
)
from nova_dmigrate.rpc.protocol import Method, Protocol

VERSION = "1.2"

# Bytes. A chunk is carried as base64 within JSON; the largest message is one with a chunk.
MAX_CHUNK_BYTES = 1 << 20
MIN_CHUNK_BYTES = 4096
MAX_CHUNK_TEXT = (MAX_CHUNK_BYTES + 2) // 3 * 4
MAX_MESSAGE_BYTES = MAX_CHUNK_TEXT + 4096

MAX_CHUNKS = 1 << 16
MAX_SERVERS = 16
MAX_FINDINGS = 128
_FOREVER = 1e10  # seconds
_BYTES = integer(0, 1 << 50)
_SHARE = number(0, 1)
_NAME = text(256)
_SENTENCE = text(1024)


# What methods take


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No arguments."""


@dataclasses.dataclass(frozen=True)
class PrepareArguments:
    """Lower the share of dirty pages to ``dirty_share`` (0 to 1) within ``seconds``.

    The settings that this takes are held until `restore`, or until nobody has renewed the lease
    for ``lease_seconds``.
    """

    dirty_share: float = checked(number(0, 1), default=0.01)
    seconds: float = checked(number(1, 600), default=30.0)
    lease_seconds: float = checked(number(1, 3600), default=60.0)


@dataclasses.dataclass(frozen=True)
class RenewArguments:
    lease_id: str = checked(token())
    lease_seconds: float = checked(number(1, 3600), default=60.0)


@dataclasses.dataclass(frozen=True)
class LeaseArguments:
    lease_id: str = checked(token())


@dataclasses.dataclass(frozen=True)
class MapArguments:
    """``max_chunk_bytes`` bounds each chunk before base64."""

    max_chunk_bytes: int = checked(integer(MIN_CHUNK_BYTES, MAX_CHUNK_BYTES), default=1 << 18)


@dataclasses.dataclass(frozen=True)
class MapReference:
    map_id: str = checked(token())


@dataclasses.dataclass(frozen=True)
class ChunkArguments:
    map_id: str = checked(token())
    index: int = checked(integer(0, MAX_CHUNKS - 1))


# What methods return


@dataclasses.dataclass(frozen=True)
class Done:
    """Nothing to tell."""


@dataclasses.dataclass(frozen=True)
class Pong:
    """``incarnation`` is another one after every start of the agent."""

    agent_version: str = checked(_NAME)
    version: str = checked(token(16))
    incarnation: str = checked(token())


@dataclasses.dataclass(frozen=True)
class Finding:
    code: str = checked(token())
    severity: str = checked(choice("ok", "note", "problem"))
    message: str = checked(_SENTENCE)


@dataclasses.dataclass(frozen=True)
class Server:
    """A database server of the guest. Shares are of the buffer pool's pages, 0 to 1."""

    name: str = checked(_NAME)
    flavour: str = checked(choice("mysql", "mariadb"))
    server_version: str = checked(_NAME)
    pool_bytes: int = checked(_BYTES)
    page_bytes: int = checked(integer(1024, 1 << 20))
    filled_share: float = checked(_SHARE)
    dirty_share: float = checked(_SHARE)


@dataclasses.dataclass(frozen=True)
class Description:
    """What the agent knows about its guest.

    ``expected_share``: share of the guest's memory that a map made now would be expected to hold.
    """

    agent_version: str = checked(_NAME)
    memory_bytes: int = checked(_BYTES)
    expected_share: float = checked(_SHARE)
    servers: tuple[Server, ...] = checked(several(record(Server), MAX_SERVERS))
    findings: tuple[Finding, ...] = checked(several(record(Finding), MAX_FINDINGS))


@dataclasses.dataclass(frozen=True)
class LeaseState:
    """How far a preparation is.

    ``state``: ``flushing``, ``ready`` (the share was reached, or the time is over), ``restoring``
    (not all settings could be restored yet) or ``idle`` (nothing is changed). ``reached``: the
    share was reached. ``remaining``: seconds of the lease.
    """

    lease_id: str = checked(token())
    state: str = checked(choice("flushing", "ready", "restoring", "idle"))
    reached: bool = checked(boolean)
    dirty_share: float = checked(_SHARE)
    remaining: float = checked(number(0, _FOREVER))
    message: str = checked(_SENTENCE)


@dataclasses.dataclass(frozen=True)
class MapState:
    """A map that is being made (``building``), can be fetched (``ready``), or never (``failed``).

    ``pages``: guest pages of all its parts. ``seconds``: what building took. ``size``: bytes of all
    chunks.
    """

    map_id: str = checked(token())
    state: str = checked(choice("building", "ready", "failed"))
    chunks: int = checked(integer(0, MAX_CHUNKS))
    pages: int = checked(integer(0, 1 << 32))
    size: int = checked(_BYTES)
    seconds: float = checked(number(0, _FOREVER))
    message: str = checked(_SENTENCE)
    findings: tuple[Finding, ...] = checked(several(record(Finding), MAX_FINDINGS), default=())


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One chunk of a map, base64."""

    index: int = checked(integer(0, MAX_CHUNKS - 1))
    data: str = checked(text(MAX_CHUNK_TEXT))


@dataclasses.dataclass(frozen=True)
class ServerHealth:
    """``uptime``: seconds, None if the server could not be asked; then ``message`` says why.

    ``commits``, ``queries``: COMMIT statements, and statements of all kinds, since the server was
    started. ``latency_ms``: milliseconds that a statement which does nothing took, as the agent
    saw it. Since version 1.2.
    """

    name: str = checked(_NAME)
    healthy: bool = checked(boolean)
    message: str = checked(_SENTENCE)
    uptime: float | None = checked(optional(number(0, _FOREVER)))
    dirty_share: float | None = checked(optional(_SHARE))
    threads_running: int | None = checked(optional(integer(0, 1 << 32)))
    commits: int | None = checked(optional(integer(0, 1 << 64)), default=None)
    queries: int | None = checked(optional(integer(0, 1 << 64)), default=None)
    latency_ms: float | None = checked(optional(number(0, _FOREVER)), default=None)


@dataclasses.dataclass(frozen=True)
class Health:
    """``moves``: how often this agent noticed another host; ``since_move``: seconds since then."""

    incarnation: str = checked(token())
    moves: int = checked(integer(0, 1 << 32))
    since_move: float | None = checked(optional(number(0, _FOREVER)))
    servers: tuple[ServerHealth, ...] = checked(several(record(ServerHealth), MAX_SERVERS))


#: States of a `WarmUpState` that is not over.
WARM_UP_UNFINISHED = ("waiting", "running")


@dataclasses.dataclass(frozen=True)
class WarmUpState:
    """How far the buffer pools are filled again after a restart.

    ``state``: ``idle`` (nobody has asked), ``waiting`` (no server serves yet), ``running``,
    ``done``, ``stopped`` (something else came in between) or ``failed``. ``code``: why it is
    stopped or failed, for programs. ``loaded``, ``total``: pages of the lists of hot pages.
    ``seconds``: since it was asked for, until its end.
    """

    state: str = checked(choice("idle", "waiting", "running", "done", "stopped", "failed"))
    code: str | None = checked(optional(token()), default=None)
    loaded: int = checked(integer(0, 1 << 40), default=0)
    total: int = checked(integer(0, 1 << 40), default=0)
    seconds: float = checked(number(0, _FOREVER), default=0.0)
    message: str = checked(_SENTENCE, default="")


METHODS = {
    "ping": Method(Nothing, Pong),
    "describe": Method(Nothing, Description),
    "health": Method(Nothing, Health),
    "prepare": Method(PrepareArguments, LeaseState, remembered=True),
    "renew": Method(RenewArguments, LeaseState),
    "restore": Method(LeaseArguments, LeaseState, remembered=True),
    "map_begin": Method(MapArguments, MapState, remembered=True),
    "map_state": Method(MapReference, MapState),
    "map_chunk": Method(ChunkArguments, Chunk),
    "map_end": Method(MapReference, Done),
    "warm_up": Method(Nothing, WarmUpState, remembered=True, since="1.1"),
    "warm_up_state": Method(Nothing, WarmUpState, since="1.1"),
}

AGENT = Protocol(
    namespace="dmigrate.agent",
    version=VERSION,
    topic="dmigrate-agent",
    exchange="dmigrate",
    methods=METHODS,
    unreachable=exception.AgentUnreachable,
    refused=exception.AgentRefused,
    peer="instance",
    server="agent",
)
