# SPDX-License-Identifier: Apache-2.0
"""What has to be so for a server's live migration to go through the relays.

`examine` looks at what Nova and the domain say; `at_source` and `at_destination` at all that can be
known before Nova has claimed anything.
"""

import dataclasses
from collections.abc import Sequence

from nova.virt.libvirt import driver as libvirt_driver
from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.migration import preflight
from nova_dmigrate.migration.domain import Domain
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.peers import ask_host, host_client, open_peers, settings_from
from nova_dmigrate.migration.request import AgentTransport, MigrationRequest, Mode
from nova_dmigrate.rpc.client import AgentClient
from nova_dmigrate.virt import volumes
from nova_dmigrate.virt.policy import Policy


@dataclasses.dataclass(frozen=True)
class NovasWay:
    """How Nova would have libvirt migrate.

    :ivar flags: of virDomainMigrateToURI3.
    :ivar disks: local disks that are copied along.
    """

    flags: int
    disks: Sequence[str] = ()

    def has(self, flag: str) -> bool:
        """Whether a flag of that name is set, which old versions of libvirt may not know."""
        return bool(self.flags & getattr(libvirt_driver.libvirt, flag, 0))

    @property
    def tls(self) -> bool:
        return self.has("VIR_MIGRATE_TLS")


def request_for(
    domain: Domain,
    policy: Policy,
    config: cfg.ConfigOpts,
    source: str,
    destination: str | None = None,
    address: str | None = None,
    bandwidth: int = 0,
) -> MigrationRequest:
    """What is asked of one migration.

    :param source: the host services' names are those of Nova's hosts; :param destination: None when
        it is not known yet.
    :param address: the destination's in the migration network.
    :param bandwidth: bytes a second, 0 for no cap.
    """
    return MigrationRequest(
        domain=domain.uuid,
        mode=Mode.REQUIRED if policy is Policy.REQUIRED else Mode.AUTO,
        network_bandwidth=bandwidth,
        agent_transport=_transport(domain, config),
        source_host=source,
        destination_host=destination,
        migration_address=address,
    )


def examine(domain: Domain, way: NovasWay, request: MigrationRequest) -> None:
    """Check what Nova, the domain and the request alone tell.

    :raises FallBack: the migration has to be the ordinary one.
    """
    if way.disks:
        raise because(Reason.BLOCK_MIGRATION, domain.name, disks=", ".join(way.disks))
    if way.has("VIR_MIGRATE_TUNNELLED"):
        raise because(Reason.TUNNELLED, domain.name)
    preflight.examine(domain, request)


def at_source(
    domain: Domain,
    way: NovasWay,
    connections: Sequence[volumes.Connection],
    request: MigrationRequest,
    config: cfg.ConfigOpts,
) -> None:
    """Check what the source knows before the destination has connected any volume.

    :param connections: of the volumes, as the source has them.
    :raises FallBack: the migration would have to be the ordinary one.
    """
    examine(domain, way, request)
    settings = settings_from(config)
    with open_peers(request, config, settings, domain.uuid, domain.channel) as peers:
        source = ask_host(peers.source, domain.name, settings.host_timeout)
        preflight.host_ready(source, domain.name)
        preflight.encrypted_as_well(domain, way.tls, source)
        # Hosts of one cloud have the same readers; if they have not, it is told later
        preflight.volumes_of(domain, source.drivers, volumes.connected(connections))
        with peers.agent(peers.source) as agent:
            _see_agent(agent, domain.name)


def at_destination(instance: str, host: str, config: cfg.ConfigOpts) -> None:
    """Check what the destination knows of itself.

    :param host: its name.
    :raises FallBack: the migration would have to be the ordinary one.
    """
    settings = settings_from(config)
    with host_client(host, config, settings) as client:
        preflight.host_ready(ask_host(client, instance, settings.host_timeout), instance)


def _see_agent(agent: AgentClient, instance: str) -> None:
    try:
        agent.ping()
    except exception.AgentUnreachable as error:
        raise because(Reason.AGENT_UNREACHABLE, instance, error=error) from error
    except exception.AgentRefused as error:
        raise because(Reason.AGENT_REFUSED, instance, error=error) from error


def _transport(domain: Domain, config: cfg.ConfigOpts) -> AgentTransport:
    if domain.channel is not None:
        return AgentTransport.CHANNEL
    return AgentTransport.BROKER if config.migration.agent_url else AgentTransport.NONE
