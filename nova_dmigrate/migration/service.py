# SPDX-License-Identifier: Apache-2.0
"""From a host's configuration to one migration: what command line and driver call."""

import contextlib
import dataclasses
import ipaddress
import logging
import socket
import threading
import urllib.parse
from collections.abc import Callable

import libvirt  # type: ignore[import-untyped]
from oslo_config import cfg

from nova_dmigrate.findings import Finding
from nova_dmigrate.migration import history
from nova_dmigrate.migration.libvirt_guest import LibvirtGuest, open_libvirt
from nova_dmigrate.migration.orchestrator import Migration
from nova_dmigrate.migration.peers import open_peers, settings_from
from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.readiness import Readiness
from nova_dmigrate.migration.request import MigrationRequest
from nova_dmigrate.migration.summary import MigrationSummary, new_id

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
    with LibvirtGuest(request.connect_uri, request.domain) as guest:
        instance = request.instance or guest.facts.uuid
        channel = guest.facts.channel
        summary = Migration(
            migration_id,
            request,
            settings,
            guest,
            lambda: open_peers(request, config, settings, instance, channel),
            on_progress,
            threading.Event() if cancelled is None else cancelled,
        ).run()
    history.keep(summary, config)
    return summary


def check(request: MigrationRequest, config: cfg.ConfigOpts) -> list[Finding]:
    """What speaks for and against a migration through the relays, without changing anything."""
    return Readiness(with_hosts(request, config), config).findings()


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
    parts = urllib.parse.urlsplit(uri)
    name = parts.hostname
    if name:
        # As it is written: a queue at the broker has the name, where "A" is not "a"
        start = parts.netloc.lower().rindex(name.lower())
        name = parts.netloc[start : start + len(name)]
    try:
        ipaddress.ip_address(name or "")
    except ValueError:
        return name
    try:
        with contextlib.closing(open_libvirt(uri, patience)) as connection:
            hostname: str = connection.getHostname()
            return hostname
    except libvirt.libvirtError as error:
        LOG.info("libvirt at %s does not tell its name: %s", uri, error)
        return name
