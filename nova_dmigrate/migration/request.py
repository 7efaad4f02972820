# SPDX-License-Identifier: Apache-2.0
"""What is asked of one migration."""

import dataclasses
import enum

from nova_dmigrate import exception

_LEAST = {"max_downtime_ms": 1, "network_bandwidth": 0, "volume_bandwidth": 0, "wait_seconds": 0}


class Mode(str, enum.Enum):
    """Whether a migration goes through the relays."""

    AUTO = "auto"  # where it can; else the ordinary one, and why is told
    REQUIRED = "required"  # or not at all
    ORDINARY = "ordinary"  # never


class AgentTransport(str, enum.Enum):
    """How the agent in the guest is asked."""

    CHANNEL = "channel"
    BROKER = "broker"
    NONE = "none"  # not at all


@dataclasses.dataclass(frozen=True)
class MigrationRequest:
    """One migration as its caller wants it.

    :ivar domain: name or UUID; empty only where no domain is meant, when a host alone is checked.
    :ivar destination_uri: the destination's libvirt, as the source's libvirt reaches it; empty only
        where no destination is meant.
    :ivar connect_uri: the source's libvirt.
    :ivar instance: UUID by which the agent knows its guest; None for the domain's.
    :ivar mode: whether it goes through the relays.
    :ivar max_downtime_ms: QEMU's downtime limit, in milliseconds, at least 1; None for the
        configured one.
    :ivar network_bandwidth: the most that goes over the network, in bytes a second; 0 for no cap.
    :ivar volume_bandwidth: the most that the destination reads from volumes, in bytes a second; 0
        for no cap.
    :ivar auto_converge: QEMU may slow the guest down.
    :ivar post_copy: libvirt may switch to post-copy.
    :ivar tls: QEMU's own stream is encrypted where the migration is an ordinary one; between relays
        the hosts' configuration decides.
    :ivar agent_transport: how the agent in the guest is asked.
    :ivar agent_url: the broker of agents; None for the configured one.
    :ivar source_host: the source's host service; None for this host's.
    :ivar destination_host: the destination's host service; None for the host of the
        ``destination_uri``.
    :ivar migration_address: the destination's address in the migration network; None for what its
        host service says.
    :ivar wait_seconds: how long it may wait for a free relay; None for the configured time.
    :raises ConfigurationError: a number is too small.
    """

    domain: str = ""
    destination_uri: str = ""
    connect_uri: str = "qemu:///system"
    instance: str | None = None
    mode: Mode = Mode.AUTO
    max_downtime_ms: int | None = None
    network_bandwidth: int = 0
    volume_bandwidth: int = 0
    auto_converge: bool = False
    post_copy: bool = False
    tls: bool = False
    agent_transport: AgentTransport = AgentTransport.CHANNEL
    agent_url: str | None = None
    source_host: str | None = None
    destination_host: str | None = None
    migration_address: str | None = None
    wait_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise exception.ConfigurationError(reason=f"{name} is {value}, less than {low}")
