# SPDX-License-Identifier: Apache-2.0
"""What speaks for and against a migration through the relays, finding by finding.

A migration stops at the first obstacle. Here all are told, and what one of them leaves unknown is
left out.
"""

import contextlib
from collections.abc import Iterator

from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.migration import preflight
from nova_dmigrate.migration.domain import Domain
from nova_dmigrate.migration.fallback import Reason
from nova_dmigrate.migration.libvirt_guest import LibvirtGuest
from nova_dmigrate.migration.peers import ask_host, host_client, open_peers, settings_from
from nova_dmigrate.migration.request import AgentTransport, MigrationRequest
from nova_dmigrate.rpc.host_messages import HostState
from nova_dmigrate.volumes import DRIVERS, VolumeSpec

#: Codes, those of a migration's reason where it would have one.
_CODES: dict[type[exception.DMigrateError], str] = {
    exception.AgentUnreachable: Reason.AGENT_UNREACHABLE.code,
    exception.AgentRefused: Reason.AGENT_REFUSED.code,
    exception.ConfigurationError: Reason.CONFIGURATION.code,
    exception.MigrationError: "domain",
}


class Readiness:
    """Looks at all that can be looked at without changing anything. Call :meth:`findings` once.

    :param request: with the names of both host services; without a domain it is about hosts alone.
    """

    def __init__(self, request: MigrationRequest, config: cfg.ConfigOpts) -> None:
        self._request = request
        self._config = config
        self._settings = settings_from(config)
        self._found: list[Finding] = []

    def findings(self) -> list[Finding]:
        """All of them."""
        request = self._request
        domain = self._look_at_domain() if request.domain else None
        source = self._ask_host(request.source_host)
        destination = None
        if request.destination_host or request.destination_uri:
            destination = self._ask_host(request.destination_host)
        if domain is not None:
            if source is not None and destination is not None:
                self._object(preflight.pair_obstacles(domain, source, destination))
            if source is not None:
                with self._noted():
                    preflight.encrypted_as_well(domain, request.tls, source)
            self._look_at_disks(domain, destination)
            self._ask_agent(domain, source)
        return self._found

    def _look_at_domain(self) -> Domain | None:
        request = self._request
        with self._noted(), LibvirtGuest(request.connect_uri, request.domain) as guest:
            facts = guest.facts
            self._tell("domain", Severity.OK, f"domain {facts.name} runs")
            self._object(preflight.domain_obstacles(facts, request))
            with self._noted():
                here = f"host {request.source_host}"
                preflight.libvirt_can(guest.libvirt_version, here, facts.name)
            return facts
        return None

    def _ask_host(self, name: str | None) -> HostState | None:
        """What a host says of itself; None if it does not."""
        if not name:
            why = f"{self._request.destination_uri} names no host (--destination-host does)"
            self._tell(Reason.HOST_UNREACHABLE.code, Severity.PROBLEM, why)
            return None
        with self._noted(), host_client(name, self._config, self._settings) as client:
            state = ask_host(client, name, self._settings.host_timeout)
            self._tell("host", Severity.OK, f"the service of host {name} answers")
            self._object(preflight.host_obstacles(state, name))
            version = state.qemu_version
            untried = None if version is None else preflight.untried_qemu(version)
            if untried is not None:
                self._tell("old-qemu", Severity.NOTE, f"host {name}: {untried}")
            return state
        return None

    def _look_at_disks(self, domain: Domain, destination: HostState | None) -> None:
        """:param destination: None if it is not known what drivers it has."""
        drivers = tuple(DRIVERS) if destination is None else destination.drivers
        for disk, volume in preflight.disks_of(domain, drivers):
            if not isinstance(volume, VolumeSpec):
                why = f"{disk.target} {volume}; its pages go over the network"
                self._tell("unread-disk", Severity.NOTE, why)
            elif destination is None:
                why = f"{disk.target} can be read where there is the driver {volume.driver}"
                self._tell("volume", Severity.OK, f"{why}: {volume.location}")
            else:
                why = f"{disk.target} can be read at the destination: {volume.location}"
                self._tell("volume", Severity.OK, why)
        with self._noted():
            preflight.volumes_of(domain, drivers)

    def _ask_agent(self, domain: Domain, source: HostState | None) -> None:
        """:param source: through whose service the port is reached; None if it does not answer."""
        request = self._request
        if request.agent_transport is AgentTransport.NONE:
            return
        if request.agent_transport is AgentTransport.CHANNEL:
            if domain.channel is None or source is None:
                return
        instance = request.instance or domain.uuid
        with self._noted(), contextlib.ExitStack() as stack:
            peers = stack.enter_context(
                open_peers(request, self._config, self._settings, instance, domain.channel)
            )
            agent = stack.enter_context(peers.agent(peers.source))
            for each in agent.describe().findings:
                self._tell(each.code, Severity(each.severity), each.message)

    def _object(self, obstacles: preflight.Obstacles) -> None:
        for obstacle in obstacles:
            self._tell_error(obstacle)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """What is raised within becomes a finding."""
        try:
            yield
        except exception.DMigrateError as error:
            self._tell_error(error)

    def _tell_error(self, error: exception.DMigrateError) -> None:
        if isinstance(error, exception.FallBack):
            self._tell(error.kwargs["code"], Severity.PROBLEM, error.kwargs["reason"])
        else:
            self._tell(_CODES.get(type(error), "error"), Severity.PROBLEM, str(error))

    def _tell(self, code: str, severity: Severity, message: str) -> None:
        finding = Finding(code, severity, message)
        # Both hosts are asked over one broker
        if finding not in self._found:
            self._found.append(finding)
