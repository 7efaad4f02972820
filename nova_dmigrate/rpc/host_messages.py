# SPDX-License-Identifier: Apache-2.0
"""The methods of a host's service, and the records that they take and return.

A *session* is one relay of one migration, at one of its two hosts. Versions: as in `messages`.
"""

from __future__ import annotations

import dataclasses
from typing import Union

from nova_dmigrate import exception
from nova_dmigrate.buffermap import MapLimits
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.fields import (
    boolean,
    checked,
    choice,
    integer,
    number,
    optional,
    path,
    record,
    secret,
    several,
    text,
    token,
)
from nova_dmigrate.rpc.protocol import Method, Protocol

VERSION = "1.4"
#: The least that a migration through relays needs of both services; what is newer has another way.
NEEDED = "1.1"

ROLES = ("source", "destination")
#: In this order; the last three are final.
STATES = ("queued", "starting", "running", "delivered", "failed", "cancelled")
FINAL = frozenset(STATES[3:])
#: Code of a refusal that another attempt may not get: a relay that runs has not answered yet.
RELAY_BUSY = "relay-busy"
#: Code of a refusal by a host that takes no new session, and message of one that was queued then.
DRAINING = "draining"
STOPPING = "the host service is being stopped"
#: Code of a refusal: the file of a map would become larger than it may.
LARGE_MAP = "large-map"
#: How the message of a session begins that was in the queue for all its time.
NO_ROOM = "no room in time"

MAX_VOLUMES = 64
MAX_PROGRESS = 64 << 10  # characters of JSON
MAX_ARGUMENTS = 64 << 10
#: Bytes of a compressed summary in one answer, before base64.
MAX_CHUNK_BYTES = 384 << 10
MAX_CHUNK_TEXT = (MAX_CHUNK_BYTES + 2) // 3 * 4
MAX_SUMMARY_BYTES = 64 << 20
#: After so many seconds it is told how many chunks of a map have been saved.
SAVING_SECONDS = 1.0
#: What the answer of an agent may be as JSON within JSON.
MAX_ANSWER = 2 * messages.MAX_MESSAGE_BYTES
_SOCKET = path(107)  # what a UNIX socket's address holds
_RATE = number(0, 1 << 50)  # bytes a second, 0 for no cap
_MEMORY = integer(0, 1 << 50)  # bytes
_LEASE = number(1, 3600)
_WAIT = number(0, 3600)
#: As libvirt numbers them: a million times the major one, a thousand times the minor one, the rest.
_VERSION = integer(0, 1 << 32)
_SENTENCE = text(1024)
_NAME = text(255)
_IDENTIFIER = token()  # by another name, where a field has that one


# What methods take


@dataclasses.dataclass(frozen=True)
class HelloArguments:
    """``version``: of this protocol, the least that the requester needs."""

    version: str = checked(token(16), default=NEEDED)


@dataclasses.dataclass(frozen=True)
class Volume:
    """A volume of the instance, as the destination reaches it."""

    volume_id: str = checked(token(255))
    driver: str = checked(token())
    location: str = checked(text(1024))


@dataclasses.dataclass(frozen=True)
class OpenDestination:
    """Start the destination relay of a migration, which listens for the source's.

    ``token``: the migration's secret, 64 hexadecimal digits, the same for both relays, which get it
    bound to the ``volumes``.
    ``qemu_socket``: where the destination QEMU listens, or will; in the host's directory for
    sockets, or in a directory of its own there. ``tls_peer_name``: the source host's name in its
    certificate, None for no TLS. ``lease_seconds``: after so long without `renew` the host ends
    the session. Bandwidths in bytes a second, 0 for no cap of this migration's own.
    ``wait_seconds``: how long to stay in the queue while the host has no room for one more relay.
    ``guest_memory``: bytes of the guest, by which the host reckons the memory of its relay.
    """

    migration_id: str = checked(token())
    instance: str = checked(token())
    session_id: str = checked(token())
    token: str = checked(secret, repr=False)
    qemu_socket: str = checked(_SOCKET)
    volumes: tuple[Volume, ...] = checked(several(record(Volume), MAX_VOLUMES), default=())
    tls_peer_name: str | None = checked(optional(_NAME), default=None)
    lease_seconds: float = checked(_LEASE, default=30.0)
    network_bandwidth: float = checked(_RATE, default=0.0)
    volume_bandwidth: float = checked(_RATE, default=0.0)
    wait_seconds: float = checked(_WAIT, default=0.0)
    guest_memory: int = checked(_MEMORY, default=0)


@dataclasses.dataclass(frozen=True)
class OpenSource:
    """Start the source relay, which connects to the destination's at ``host`` and ``port``.

    ``qemu_socket``: where the relay will listen for the source QEMU. ``buffer_map`` and
    ``memory_layout``: files on this host, both or neither. ``volumes``: the very same that the
    destination was told of; they have to be disks of the ``domain``, which is libvirt's UUID of it,
    None for the instance's. ``volumes_connected``: the destination has them where it has connected
    them itself, so that their paths there may be others. The others as in `OpenDestination`.
    """

    migration_id: str = checked(token())
    instance: str = checked(token())
    session_id: str = checked(token())
    token: str = checked(secret, repr=False)
    qemu_socket: str = checked(_SOCKET)
    host: str = checked(_NAME)
    port: int = checked(integer(1, 65535))
    domain: str | None = checked(optional(_IDENTIFIER), default=None)
    volumes: tuple[Volume, ...] = checked(several(record(Volume), MAX_VOLUMES), default=())
    volumes_connected: bool = checked(boolean, default=False)
    buffer_map: str | None = checked(optional(path()), default=None)
    memory_layout: str | None = checked(optional(path()), default=None)
    tls_peer_name: str | None = checked(optional(_NAME), default=None)
    lease_seconds: float = checked(_LEASE, default=30.0)
    network_bandwidth: float = checked(_RATE, default=0.0)
    volume_bandwidth: float = checked(_RATE, default=0.0)
    wait_seconds: float = checked(_WAIT, default=0.0)
    guest_memory: int = checked(_MEMORY, default=0)


Order = Union[OpenDestination, OpenSource]


@dataclasses.dataclass(frozen=True)
class SessionReference:
    session_id: str = checked(token())


@dataclasses.dataclass(frozen=True)
class RenewSession:
    session_id: str = checked(token())
    lease_seconds: float = checked(_LEASE, default=30.0)


@dataclasses.dataclass(frozen=True)
class UseMap:
    """Have a source relay that runs use a buffer map that has come only now.

    ``buffer_map`` and ``memory_layout``: files on this host. The answer tells whether the relay
    has begun to load them; how that goes is in its progress.
    """

    session_id: str = checked(token())
    buffer_map: str = checked(path())
    memory_layout: str = checked(path())


@dataclasses.dataclass(frozen=True)
class DowntimeArguments:
    """How long did a guest stand still that has come to the host? ``domain``: libvirt's UUID."""

    domain: str = checked(token())


@dataclasses.dataclass(frozen=True)
class SummaryArguments:
    """``offset``: in the compressed summary, bytes."""

    session_id: str = checked(token())
    offset: int = checked(integer(0, MAX_SUMMARY_BYTES), default=0)


@dataclasses.dataclass(frozen=True)
class AgentRequest:
    """One request to the agent of an instance on this host, over its virtio-serial port.

    ``channel_path``: QEMU's socket of the port. ``arguments``: JSON. ``timeout``: seconds.
    """

    instance: str = checked(token())
    channel_path: str = checked(_SOCKET)
    method: str = checked(token())
    request_id: str = checked(token())
    arguments: str = checked(text(MAX_ARGUMENTS))
    timeout: float = checked(number(0.1, 600))


@dataclasses.dataclass(frozen=True)
class SaveChunks:
    """Put chunks of an agent's buffer map into a file of this host: as many as come in
    `SAVING_SECONDS`, but one at least.

    ``first``: number of the first one that the file lacks, to be put at ``offset`` bytes;
    ``behind``: number behind the last one. ``max_chunk_bytes``: of each. ``buffer_map``: the file,
    which is there, and gets ``max_bytes`` at most. ``timeout``: seconds that each chunk may take.
    """

    instance: str = checked(token())
    channel_path: str = checked(_SOCKET)
    map_id: str = checked(token())
    first: int = checked(integer(0, messages.MAX_CHUNKS))
    behind: int = checked(integer(1, messages.MAX_CHUNKS))
    max_chunk_bytes: int = checked(integer(messages.MIN_CHUNK_BYTES, messages.MAX_CHUNK_BYTES))
    buffer_map: str = checked(path())
    offset: int = checked(_MEMORY)
    timeout: float = checked(number(0.1, 600))
    max_bytes: int = checked(_MEMORY, default=MapLimits().max_bytes)


# What methods return


@dataclasses.dataclass(frozen=True)
class HostState:
    """What a host says of itself.

    ``host``: its name, also in its certificate. ``version``: of this protocol; ``needs``: what
    migrations that begin there need of others. ``incarnation`` is another one after every start of
    the service. ``tls``: whether it migrates with TLS only.
    ``drivers``: of volumes that its relays can read. ``relays``: how many run, of both roles;
    ``max_relays``: how many of each role may. ``draining``: it takes no new session.
    ``migration_address``: where its relays listen, None if everywhere. ``obstacle``: what keeps
    its guests from the relays' sockets, empty if nothing is known that does. ``qemu_user``: number
    of the user that these sockets are for, None if it is not known. ``libvirt_version`` and
    ``qemu_version``: as libvirt numbers them, None if they are not known.
    """

    host: str = checked(_NAME)
    version: str = checked(token(16))
    wire_versions: tuple[int, ...] = checked(several(integer(0, 1 << 16), 32))
    incarnation: str = checked(token())
    tls: bool = checked(boolean)
    drivers: tuple[str, ...] = checked(several(token(), 32))
    relays: int = checked(integer(0, 1 << 16))
    max_relays: int = checked(integer(0, 1 << 16))
    queued: int = checked(integer(0, 1 << 16))
    draining: bool = checked(boolean)
    migration_address: str | None = checked(optional(_NAME))
    socket_directory: str = checked(path())
    obstacle: str = checked(_SENTENCE, default="")
    qemu_user: int | None = checked(optional(integer(0, 1 << 32)), default=None)
    libvirt_version: int | None = checked(optional(_VERSION), default=None)
    qemu_version: int | None = checked(optional(_VERSION), default=None)
    needs: str = checked(token(16), default=NEEDED)


@dataclasses.dataclass(frozen=True)
class SessionState:
    """How far a session is.

    ``message``: what it waits for, or why it has failed. ``host`` and ``port``: where a running
    destination relay can be reached, else None. ``queue_position``: 1 for the next, 0 for who is
    not queued. ``lease_remaining``: seconds. ``progress``: what the relay tells of itself, JSON,
    empty before it runs; at the end its summary without the time series. ``summary_path``: where
    its host keeps that, with the series.
    """

    session_id: str = checked(token())
    migration_id: str = checked(token())
    instance: str = checked(token())
    role: str = checked(choice(*ROLES))
    state: str = checked(choice(*STATES))
    message: str = checked(_SENTENCE)
    host: str | None = checked(optional(_NAME))
    port: int | None = checked(optional(integer(1, 65535)))
    queue_position: int = checked(integer(0, 1 << 16))
    lease_remaining: float = checked(number(0, 3600))
    progress: str = checked(text(MAX_PROGRESS))
    summary_path: str = checked(path())


@dataclasses.dataclass(frozen=True)
class SummaryChunk:
    """Part of a session's summary, gzip and then base64. ``size``: bytes of all, compressed."""

    size: int = checked(integer(0, MAX_SUMMARY_BYTES))
    offset: int = checked(integer(0, MAX_SUMMARY_BYTES))
    data: str = checked(text(MAX_CHUNK_TEXT))


@dataclasses.dataclass(frozen=True)
class AgentAnswer:
    """What the agent has answered, JSON."""

    answer: str = checked(text(MAX_ANSWER))


@dataclasses.dataclass(frozen=True)
class SavedChunks:
    """``chunks``: that the file has now. ``size``: bytes of them in the file."""

    chunks: int = checked(integer(1, messages.MAX_CHUNKS))
    size: int = checked(_MEMORY)


@dataclasses.dataclass(frozen=True)
class GuestDowntime:
    """``milliseconds``: None if libvirt does not tell."""

    milliseconds: float | None = checked(optional(number(0, 1 << 40)), default=None)


METHODS = {
    "hello": Method(HelloArguments, HostState),
    # Opening is repeated without harm: the session's identifier makes it the same one
    # Since 1.1 both bind the relays' token to the volumes
    "open_destination": Method(OpenDestination, SessionState, since="1.1"),
    "open_source": Method(OpenSource, SessionState, since="1.1"),
    "session": Method(SessionReference, SessionState),
    "renew": Method(RenewSession, SessionState),
    "use_map": Method(UseMap, SessionState),
    "close": Method(SessionReference, SessionState, remembered=True),
    "summary": Method(SummaryArguments, SummaryChunk),
    # The agent itself knows repeated requests by their identifiers
    "agent": Method(AgentRequest, AgentAnswer),
    # Repeated without harm: it says where in the file the chunks belong
    # Since 1.3 it says how large that may become; 1.2 takes no request that does
    "save_chunks": Method(SaveChunks, SavedChunks, since="1.3"),
    "downtime": Method(DowntimeArguments, GuestDowntime, since="1.4"),
}

HOST = Protocol(
    namespace="dmigrate.host",
    version=VERSION,
    topic="dmigrate-host",
    exchange="dmigrate",
    methods=METHODS,
    unreachable=exception.HostUnreachable,
    refused=exception.HostRefused,
    peer="host",
    server="host service",
)
