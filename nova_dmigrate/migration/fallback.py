# SPDX-License-Identifier: Apache-2.0
"""Why a migration is the ordinary one: each reason once, with the sentence that the operator reads.

Whoever finds that a migration cannot go through the relays raises `FallBack` made by `because`;
nothing has been changed by then that the caller would not undo.
"""

import enum

from nova_dmigrate import exception


class Reason(enum.Enum):
    """A stable code, for programs, and a sentence whose keywords the caller gives."""

    ASKED = ("asked", "the ordinary migration was asked for")
    BLOCK_MIGRATION = ("block-migration", "local disks are copied along: {disks}")
    TUNNELLED = ("tunnelled", "libvirt tunnels the migration, no relay would see it")
    NATIVE_TLS = (
        "native-tls",
        "the migration has to be encrypted, and the relays do not encrypt ([wire]tls)",
    )
    OLD_LIBVIRT = (
        "old-libvirt",
        "libvirt {version} at {place} does not migrate over UNIX sockets, 6.8.0 and later do",
    )
    CONFIGURATION = ("configuration", "{error}")
    UNEXPECTED = ("unexpected", "an error that was not expected, see the log: {error}")
    HOST_DEVICES = ("host-devices", "devices of the host are passed through: {devices}")
    NO_AGENT = ("no-agent", "the guest has no agent that could be asked")
    NO_AGENT_PORT = ("no-agent-port", "the domain has no port for the agent ({port})")
    NO_VOLUMES = ("no-volumes", "no disk can be read at the destination: {disks}")
    VOLUMES_UNREADABLE = ("volumes-unreadable", "host {host} can read none of the volumes: {why}")
    HOST_UNREACHABLE = ("host-unreachable", "{error}")
    HOST_REFUSED = ("host-refused", "{error}")
    HOST_DRAINING = ("host-draining", "the service of host {host} is being shut down")
    CONFINED = ("confined", "guests of host {host} may not use the sockets of relays: {why}")
    NO_ROOM = ("no-room", "host {host} has no relay free: {detail}")
    TLS_DIFFERS = ("tls-differs", "one host demands TLS between relays, the other has none")
    WIRE_DIFFERS = ("wire-differs", "the relays of both hosts have no common version of the wire")
    # libvirt speaks of one path, on which the source's QEMU sends and the destination's receives
    SOCKETS_DIFFER = (
        "sockets-differ",
        "the hosts have other directories for sockets: {ours} and {theirs}",
    )
    AGENT_UNREACHABLE = ("agent-unreachable", "{error}")
    AGENT_REFUSED = ("agent-refused", "{error}")
    BAD_MAP = ("bad-map", "the agent's buffer map is refused: {error}")
    SMALL_MAP = ("small-map", "only {share:.1%} of the guest's memory could be read from volumes")
    MEMORY_LAYOUT = ("memory-layout", "QEMU does not tell how its memory lies: {error}")
    NO_STATE = ("no-state", "the buffer map cannot be kept for the relay: {error}")
    LATE_MAP = ("late-map", "the buffer map came when the memory had been sent")
    MAP_REFUSED = ("map-refused", "the relays do not use the buffer map, see their logs")
    RELAY_FAILED = ("relay-failed", "{error}")

    def __init__(self, code: str, sentence: str) -> None:
        self.code = code
        self.sentence = sentence


def because(reason: Reason, instance: str, **details: object) -> exception.FallBack:
    """The error that makes the migration the ordinary one."""
    return exception.FallBack(
        instance=instance, reason=reason.sentence.format(**details), code=reason.code
    )
