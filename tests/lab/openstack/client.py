# SPDX-License-Identifier: Apache-2.0
"""The cloud's user and administrator: openstacksdk, and what is asked of Nova again and again."""

import time
from collections.abc import Callable
from typing import Any

import openstack
from openstack import exceptions

from tests.lab.openstack.move import CANCELLED, COMPLETED
from tests.lab.openstack.service import PATIENCE
from tests.lab.openstack.site import REGION, Site
from tests.lab.openstack.venv import program

#: Of Nova's API: shows the details of events.
_MICROVERSION = "2.90"
#: Its power state.
_RUNNING = 1
_OVER = (COMPLETED, "failed", "error", CANCELLED, "done")


class CloudError(Exception):
    """The cloud did not do what it was asked; the message says what it tells of it."""


class Client:
    """``sdk``: the administrator's connection."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.sdk = openstack.connect(
            **site.administrator(),
            region_name=REGION,
            compute_default_microversion=_MICROVERSION,
            app_name="lab",
        )

    def close(self) -> None:
        self.sdk.close()

    def command(self, *argv: str) -> str:
        """Give a command, as operators do: ``openstack ARGV...``; what it prints.

        :raises ServiceError: it failed.
        """
        known = {
            **self._site.administrator(),
            "region_name": REGION,
            "identity_api_version": "3",
            "compute_api_version": _MICROVERSION,
        }
        variables = {f"OS_{name.upper()}": value for name, value in known.items()}
        return self._site.services.run("openstack", [program("openstack"), *argv], variables)

    def wait_for_computes(self, names: list[str], check: Callable[[], None]) -> None:
        """Wait until hosts can have servers.

        :param check: raises what makes the wait vain.
        :raises CloudError: they cannot in time.
        """

        def up() -> bool:
            check()
            found = {
                each.host
                for each in self.sdk.compute.services(binary="nova-compute")
                if each.state == "up"
            }
            known = {each.name for each in self.sdk.compute.hypervisors()}
            return found.issuperset(names) and known.issuperset(names)

        self.wait(up, "the compute hosts are up")

    def wait_for_backends(self, names: list[str], check: Callable[[], None]) -> None:
        """Wait until Cinder's scheduler knows what its backends can take. Until then it refuses
        volumes, of which it tells their owner only that they are in error.

        :param check: raises what makes the wait vain.
        :raises CloudError: it does not in time.
        """

        def known() -> bool:
            check()
            pools = self.sdk.block_storage.backend_pools(detail=True)
            return {pool.capabilities["volume_backend_name"] for pool in pools}.issuperset(names)

        self.wait(known, "Cinder's scheduler knows all backends")

    def wait_for_server(self, server: Any, status: str) -> Any:
        """:raises CloudError: a server does not come to have a status."""
        # Of one that is known already it believes what was known then
        now = self.sdk.compute.get_server(server.id)
        try:
            return self.sdk.compute.wait_for_server(
                now, status=status, failures=["ERROR"], interval=1, wait=PATIENCE
            )
        except Exception as error:
            fault = self.sdk.compute.get_server(server.id).fault
            raise CloudError(f"server {server.name} is not {status}: {error}; {fault}") from error

    def make_volume(self, name: str, size_gb: int, backend: str) -> Any:
        """Make a volume and wait until it can be used.

        :raises CloudError: it cannot.
        """
        sdk = self.sdk.block_storage
        volume = sdk.create_volume(name=name, size=size_gb, volume_type=backend)
        try:
            return sdk.wait_for_status(volume, "available", ["error"], interval=1, wait=PATIENCE)
        except Exception as error:
            told = sdk.get(f"/messages?resource_uuid={volume.id}", microversion="3.5").json()
            raise CloudError(f"volume {name}: {error}; {told}") from error

    def delete_server(self, server: Any) -> None:
        """Delete a server and wait until it is gone."""
        self.sdk.compute.delete_server(server.id)
        self.sdk.compute.wait_for_delete(server, interval=1, wait=PATIENCE)

    def host_of(self, server: Any) -> str:
        """The name of the host that a server is on."""
        name: str = self.sdk.compute.get_server(server.id).compute_host
        return name

    def events(self, server: Any, action: str = "live-migration") -> list[str]:
        """Of the last action of a kind: each event, its result and what it tells."""
        for each in self.sdk.compute.server_actions(server.id):
            if each.action == action:
                whole = self.sdk.compute.get_server_action(each.request_id, server.id)
                return [
                    f"{event['event']} {event['result']} {event['details'] or ''}".rstrip()
                    for event in whole.events
                ]
        return []

    def migrations(self, server: Any) -> list[Any]:
        """Of a server, as Nova has them."""
        return list(self.sdk.compute.migrations(server_id=server.id))

    def force_down(self, host: str) -> None:
        """Say that a host is dead, as whoever has fenced it does."""
        if not self._force(host, True):
            raise CloudError(f"{host} cannot be said to be down")

    def bring_up(self, host: str) -> None:
        """Take it back, once the host has come back and has removed the servers that have left it.

        :raises CloudError: it does not come.
        """
        self.wait(lambda: self._force(host, False), f"{host} has no servers that have left it")
        self.wait_for_computes([host], lambda: None)

    def evacuate(self, server: Any, version: str) -> None:
        """Order it, whose host is dead.

        :param version: of Nova's API.
        """
        response = self.sdk.compute.post(
            f"/servers/{server.id}/action", json={"evacuate": {}}, microversion=version
        )
        exceptions.raise_from_response(response)

    def settle(self, server: Any) -> Any:
        """Have a server run that was left in some state; the server.

        :raises CloudError: it does not.
        """
        compute = self.sdk.compute
        self.wait(lambda: not compute.get_server(server.id).task_state, f"{server.name} is at rest")
        now = compute.get_server(server.id)
        if now.status == "SHUTOFF":
            compute.start_server(server.id)
        elif now.power_state != _RUNNING:
            compute.reset_server_state(server.id, "active")
            compute.reboot_server(server.id, "HARD")
        elif now.status != "ACTIVE":
            compute.reset_server_state(server.id, "active")
        return self.wait_for_server(server, "ACTIVE")

    def _force(self, host: str, down: bool) -> bool:
        """Whether Nova takes it."""
        compute = self.sdk.compute
        (service,) = compute.services(binary="nova-compute", host=host)
        response = compute.put(
            f"/os-services/{service.id}", json={"forced_down": down}, microversion=_MICROVERSION
        )
        return bool(response.ok)

    @staticmethod
    def wait(
        condition: Callable[[], bool],
        what: str,
        interval: float = 1.0,
        patience: float = PATIENCE,
    ) -> None:
        """Wait until something is so.

        :param interval, patience: seconds.
        :raises CloudError: it is not in time.
        """
        deadline = time.monotonic() + patience
        while not condition():
            if time.monotonic() > deadline:
                raise CloudError(f"not so after {patience:.0f} s: {what}")
            time.sleep(interval)


class Order:
    """A live migration that has been ordered.

    ``source``: the host that the server is on. ``began``: when the command for it had returned,
    monotonic seconds.
    """

    def __init__(self, client: Client, server: Any) -> None:
        """Order it; the scheduler chooses the host."""
        self.source = client.host_of(server)
        self._client, self._server = client, server
        self._known = {each.uuid for each in client.migrations(server)}
        client.command("server", "migrate", "--live-migration", server.id)
        self.began = time.monotonic()

    def over(self) -> bool:
        """Whether it has ended, however."""
        migration = self._migration()
        return migration is not None and migration.status in _OVER

    def wait(self) -> str:
        """Wait for the end; Nova's word for how it has ended. The server is active then.

        :raises CloudError: it does not end, or its server does not run.
        """
        client, server = self._client, self._server
        client.wait(self.over, f"the migration of {server.name} is over", 0.5)
        status: str = self._migration().status
        if status != COMPLETED:
            # Nova 34 takes servers for broken whose migration was aborted, with any driver
            client.wait(lambda: self._settled() != "", f"{server.name} is settled")
            if self._settled() == "ERROR":
                client.sdk.compute.reset_server_state(server.id, "active")
        client.wait_for_server(server, "ACTIVE")
        return status

    def _migration(self) -> Any:
        """As Nova has it; None before it does."""
        new = [x for x in self._client.migrations(self._server) if x.uuid not in self._known]
        return new[0] if new else None

    def _settled(self) -> str:
        """The server's status; nothing while Nova is at work on it."""
        now = self._client.sdk.compute.get_server(self._server.id)
        return "" if now.task_state else str(now.status)
