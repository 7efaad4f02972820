# SPDX-License-Identifier: Apache-2.0
"""The relays of one live migration of Nova's, up to the moment at which libvirt is asked for it."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from oslo_config import cfg

from nova_dmigrate.migration import preflight
from nova_dmigrate.migration.peers import ask_host, open_peers, settings_from, terms_of
from nova_dmigrate.migration.relayed import Guest, RelayedMigration
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.virt import conditions, volumes
from nova_dmigrate.virt.guest import NovaGuest
from nova_dmigrate.virt.policy import Policy


@dataclasses.dataclass(frozen=True)
class Order:
    """What Nova wants of one live migration.

    :ivar instance: a nova.objects.Instance; :ivar guest: its nova.virt.libvirt.guest.Guest, the
        one that Nova's monitor has.
    :ivar apart: as of `NovaGuest`.
    :ivar flags: of virDomainMigrateToURI3, as Nova has them.
    :ivar destination: the host's name.
    :ivar migrate_data: a nova.objects.LibvirtLiveMigrateData, filled by the destination.
    :ivar bandwidth: the most that goes over the network, in bytes a second; 0 for no cap.
    :ivar downtime_limit: QEMU's, in milliseconds, until Nova sets one.
    """

    instance: Any
    guest: Any
    apart: Callable[[Any], Any]
    policy: Policy
    flags: int
    destination: str
    migrate_data: Any
    bandwidth: int
    downtime_limit: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Relays that are ready.

    :ivar guest: whom they serve.
    :ivar ends: has them ended, and put back what was changed for them, when it is closed.
    """

    relayed: RelayedMigration
    guest: NovaGuest
    settings: OrchestrationSettings
    ends: contextlib.ExitStack


def prepare(
    migration_id: str,
    order: Order,
    guest: NovaGuest,
    disks: Sequence[str],
    config: cfg.ConfigOpts,
    enter: Callable[[str], None],
) -> Prepared:
    """Have relays started on both hosts, and all that belongs to them.

    :param disks: local disks that are copied along.
    :param enter: as of `RelayedMigration`.
    :raises FallBack: the migration has to be the ordinary one.
    """
    with contextlib.ExitStack() as stack:
        enter("checking")
        settings = settings_from(config)
        relayed = _relayed(stack, migration_id, order, guest, disks, config, settings, enter)
        return Prepared(relayed, guest, settings, stack.pop_all())


def _relayed(
    stack: contextlib.ExitStack,
    migration_id: str,
    order: Order,
    guest: NovaGuest,
    disks: Sequence[str],
    config: cfg.ConfigOpts,
    settings: OrchestrationSettings,
    enter: Callable[[str], None],
) -> RelayedMigration:
    way = conditions.NovasWay(order.flags, disks)
    request = conditions.request_for(
        guest.facts,
        order.policy,
        config,
        order.instance.host,
        order.destination,
        volumes.address_in(order.migrate_data),
        order.bandwidth,
    )
    conditions.examine(guest.facts, way, request)
    uuid = order.instance.uuid
    peers = stack.enter_context(open_peers(request, config, settings, uuid, guest.facts.channel))
    source, destination = (
        ask_host(host, uuid, settings.host_timeout, lambda: enter("checking"))
        for host in (peers.source, peers.destination)
    )
    preflight.hosts_agree(guest.facts, source, destination)
    preflight.encrypted_as_well(guest.facts, way.tls, source)
    subject = Guest(
        memory=guest.facts.memory,
        volumes=preflight.volumes_of(
            guest.facts, destination.drivers, volumes.of_destination(order.migrate_data)
        ),
        layout=guest.memory_layout,
        runs_here=guest.runs_here,
        connected=True,
    )
    relayed = RelayedMigration(
        migration_id,
        uuid,
        subject,
        peers,
        settings,
        terms_of(request, settings, source, destination),
        source.socket_directory,
        order.downtime_limit,
        enter=enter,
        map_first=order.policy is Policy.REQUIRED,
    )
    return stack.enter_context(relayed)
