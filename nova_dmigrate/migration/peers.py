# SPDX-License-Identifier: Apache-2.0
"""The ways to the services of both hosts and to the agent, as a host's configuration has them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.buffermap import MapLimits
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.relayed import Peers
from nova_dmigrate.migration.request import AgentTransport, MigrationRequest
from nova_dmigrate.migration.sessions import Terms
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.migration.waiting import Waiting, answer_of
from nova_dmigrate.rpc import broker, isolation
from nova_dmigrate.rpc.client import AgentClient, ClientSettings
from nova_dmigrate.rpc.host_client import HostChannelTransport, HostClient
from nova_dmigrate.rpc.host_messages import HOST, HostState
from nova_dmigrate.rpc.messages import AGENT
from nova_dmigrate.rpc.transport import Transport

_KIB = 1 << 10
#: How much of a host's time its answer gets; the rest is for the broker, to tell that none comes.
_OWN_SHARE = 0.85


def settings_from(config: cfg.ConfigOpts) -> OrchestrationSettings:
    """The options of this host in plain units."""
    options, limits = config.migration, config.buffer_map
    return OrchestrationSettings(
        state_directory=Path(config.host.state_directory) / "maps",
        agent_timeout=options.agent_timeout,
        prepare_time=options.prepare_time,
        dirty_share=options.dirty_share,
        map_time=options.map_time,
        min_mapped_share=options.min_mapped_share,
        host_timeout=options.host_timeout,
        queue_time=options.queue_time,
        lease=options.lease,
        stall_timeout=config.relay.stall_timeout,
        max_downtime_ms=options.max_downtime,
        retry_ordinary=options.retry_ordinary,
        map_limits=MapLimits(
            max_pages=limits.max_pages,
            max_volumes=limits.max_volumes,
            max_chunk_bytes=limits.max_chunk_size * _KIB,
        ),
    )


def host_client(name: str, config: cfg.ConfigOpts, settings: OrchestrationSettings) -> HostClient:
    """Asks the service of the host of that name.

    :raises ConfigurationError: there can be no broker at the ``transport_url``.
    """
    transport = broker.BrokerTransport(name, config.transport_url, HOST, config)
    return HostClient(name, transport, timeout=settings.host_timeout)


@contextlib.contextmanager
def open_peers(
    request: MigrationRequest,
    config: cfg.ConfigOpts,
    settings: OrchestrationSettings,
    instance: str,
    channel: Path | None,
) -> Iterator[Peers]:
    """Who takes part in a migration besides libvirt.

    :param request: with the names of both host services.
    :param instance: UUID by which the agent knows its guest.
    :param channel: QEMU's socket of the agent's port, on the source host; None for none.
    :raises ConfigurationError: there can be no broker at the ``transport_url``; or, when the agent
        is wanted, at the ``agent_url``.
    """
    assert request.source_host
    client_settings = ClientSettings(
        timeout=settings.agent_timeout, attempts=2, map_timeout=settings.map_time
    )

    def agent(host: HostClient) -> AgentClient:
        transport: Transport
        saver = None
        if request.agent_transport is AgentTransport.BROKER:
            url = request.agent_url or config.migration.agent_url
            url = f"{url.rstrip('/')}/{isolation.virtual_host(instance)}"
            transport = broker.BrokerTransport(instance, url, AGENT, config)
        else:
            transport = by_host = HostChannelTransport(instance, host, str(channel))
            saver = by_host.save_chunks
        return AgentClient(instance, transport, client_settings, saver=saver)

    with contextlib.ExitStack() as stack:
        source = stack.enter_context(host_client(request.source_host, config, settings))
        destination = stack.enter_context(
            host_client(request.destination_host or "", config, settings)
        )
        yield Peers(source, destination, agent)


def ask_host(
    host: HostClient, instance: str, patience: float, waiting: Waiting = lambda: None
) -> HostState:
    """What the service of a host says of itself.

    :param patience: seconds within which it is known what it says, or that it says nothing.
    :raises FallBack: it says nothing, or nothing that can be used.
    """
    try:
        return answer_of(lambda: host.hello(_OWN_SHARE * patience), waiting)
    except exception.HostUnreachable as error:
        raise because(Reason.HOST_UNREACHABLE, instance, error=error) from error
    except exception.HostRefused as error:
        raise because(Reason.HOST_REFUSED, instance, error=error) from error


def terms_of(
    request: MigrationRequest,
    settings: OrchestrationSettings,
    source: HostState,
    destination: HostState,
) -> Terms:
    """On what terms relays are asked for."""
    wait = request.wait_seconds
    return Terms(
        source.host if source.tls else None,
        destination.host if source.tls else None,
        request.migration_address,
        request.network_bandwidth,
        request.volume_bandwidth,
        settings.queue_time if wait is None else wait,
    )
