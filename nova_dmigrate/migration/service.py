# SPDX-License-Identifier: Apache-2.0
"""From a host's configuration to one migration: what command line and driver call."""

import contextlib
import dataclasses
import ipaddress
import logging
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator

import libvirt  # type: ignore[import-untyped]
from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.migration import history, preflight
from nova_dmigrate.migration.libvirt_guest import LibvirtGuest, open_libvirt
from nova_dmigrate.migration.orchestrator import Migration
from nova_dmigrate.migration.peers import host_client, open_peers, settings_from
from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.relayed import Peers
from nova_dmigrate.migration.request import AgentTransport, MigrationRequest
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.migration.summary import MigrationSummary, new_id
from nova_dmigrate.rpc.host_messages import HostState

LOG = logging.getLogger(__name__)


def migrate(
    request: MigrationRequest,
    config: cfg.ConfigOpts,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    cancelled: threading.Event | None = None,
) -> MigrationSummary:
    """Carry out one migration and note it in the history; how it went.

    :param on_progress: called a few times a second.
    :param cancelled: when it is set, the migration is given up: the guest stays where it is.
    :raises MigrationError: there is no such domain; or relays were required and cannot be had.
    """
    migration_id = new_id()
    request = with_hosts(request, config)
    settings = settings_from(config)
    with contextlib.ExitStack() as stack:
        guest = stack.enter_context(LibvirtGuest(request.connect_uri, request.domain))
        peers = stack.enter_context(_peers(request, config, settings, guest))
        summary = Migration(
            migration_id,
            request,
            settings,
            guest,
            peers,
            on_progress,
            threading.Event() if cancelled is None else cancelled,
        ).run()
    history.keep(summary, config)
    return summary


def check(request: MigrationRequest, config: cfg.ConfigOpts) -> list[Finding]:
    """What speaks for and against a migration through the relays, without changing anything."""
    request = with_hosts(request, config)
    settings = settings_from(config)
    found: list[Finding] = []
    states: list[HostState] = []
    with contextlib.ExitStack() as stack:
        guest: LibvirtGuest | None = None
        if request.domain:
            guest = stack.enter_context(LibvirtGuest(request.connect_uri, request.domain))
            with _noted(found):
                preflight.examine(guest.facts, request)
                preflight.libvirt_can(guest.libvirt_version, guest.facts.name)
        names = [request.source_host, request.destination_host]
        for name in names:
            if not name:
                continue
            client = stack.enter_context(host_client(name, config, settings))
            with _noted(found):
                states.append(client.hello(settings.host_timeout))
                found.append(_well("host", f"the service of host {name} answers"))
        if guest is None:
            return found
        with _noted(found):
            if len(states) == len(names):
                preflight.hosts_agree(guest.facts, *states)
                preflight.encrypted_as_well(guest.facts, request.tls, states[0])
            drivers = states[-1].drivers if states else ("block",)
            volumes = preflight.volumes_of(guest.facts, drivers)
            names_of = ", ".join(each.location for each in volumes)
            found.append(_well("volumes", f"the destination may read {names_of}"))
        if states and request.agent_transport is not AgentTransport.NONE:
            peers = stack.enter_context(_peers(request, config, settings, guest))
            with _noted(found), peers.agent(peers.source) as agent:
                for each in agent.describe().findings:
                    found.append(Finding(each.code, Severity(each.severity), each.message))
    return found


def with_hosts(request: MigrationRequest, config: cfg.ConfigOpts) -> MigrationRequest:
    """The request with the names of both host services in it."""
    return dataclasses.replace(
        request,
        source_host=request.source_host or config.host.name or socket.gethostname(),
        destination_host=request.destination_host
        or _host_of(request.destination_uri, config.migration.host_timeout),
    )


def _host_of(uri: str, patience: float) -> str | None:
    """The host of a libvirt URI, by the name that it has for itself where the URI has a number.

    :param patience: seconds that it gets to tell.
    """
    name = urllib.parse.urlsplit(uri).hostname
    try:
        ipaddress.ip_address(name or "")
    except ValueError:
        return name
    try:
        connection = open_libvirt(uri, patience)
    except libvirt.libvirtError as error:
        LOG.info("libvirt at %s does not tell its name: %s", uri, error)
        return name
    with contextlib.closing(connection):
        hostname: str = connection.getHostname()
        return hostname


def _peers(
    request: MigrationRequest,
    config: cfg.ConfigOpts,
    settings: OrchestrationSettings,
    guest: LibvirtGuest,
) -> contextlib.AbstractContextManager[Peers]:
    instance = request.instance or guest.facts.uuid
    return open_peers(request, config, settings, instance, guest.facts.channel)


@contextlib.contextmanager
def _noted(found: list[Finding]) -> Iterator[None]:
    """What is raised within becomes a finding."""
    try:
        yield
    except exception.DMigrateError as error:
        code = str(error.kwargs.get("code") or "error")
        found.append(Finding(code, Severity.PROBLEM, str(error)))


def _well(code: str, message: str) -> Finding:
    return Finding(code, Severity.OK, message)
