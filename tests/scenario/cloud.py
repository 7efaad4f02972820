# SPDX-License-Identifier: Apache-2.0
"""A cloud by its API. openstacksdk logs in and finds the services; what is asked of Nova is written
out, with one version of its API, so that it is the same with every release of openstacksdk.
"""

import time
from collections.abc import Callable
from typing import Any

import openstack
from openstack import exceptions

from tests.scenario.waiting import wait_for

#: The first that has the details of events.
VERSION = "2.84"
_RUNNING = 1  # Nova's power state


class Cloud:
    """What the tests ask of a cloud. Errors of the API are raised as openstacksdk's."""

    def __init__(self, connection: openstack.connection.Connection, timeout: float) -> None:
        """:param timeout: seconds for whatever is waited for."""
        self._connection = connection
        self._timeout = timeout

    # What there is

    def hosts(self) -> list[str]:
        """Hosts whose nova-compute runs and takes servers."""
        services = self._get("/os-services?binary=nova-compute")["services"]
        return [
            service["host"]
            for service in services
            if service["state"] == "up" and service["status"] == "enabled"
        ]

    def image(self, name: str) -> str:
        """ID of an image."""
        return str(self._connection.image.find_image(name, ignore_missing=False).id)

    def network(self, name: str) -> Any:
        """What Nova wants to know of a network; ``none`` and ``auto`` are its own names."""
        if name in ("none", "auto"):
            return name
        found = self._connection.network.find_network(name, ignore_missing=False)
        return [{"uuid": found.id}]

    def find_server(self, name: str) -> str:
        """ID of a server of any project."""
        found = self._connection.compute.find_server(name, ignore_missing=False, all_projects=True)
        return str(found.id)

    # What is made

    def make_flavor(self, memory: int, processors: int, extra_specs: dict[str, str]) -> str:
        """A flavor without a disk of its own; its ID."""
        flavor = {
            "name": f"dmigrate-scenario-{time.time_ns()}",
            "ram": memory,
            "vcpus": processors,
            "disk": 0,
        }
        made = self._post("/flavors", {"flavor": flavor})["flavor"]["id"]
        if extra_specs:
            self._post(f"/flavors/{made}/os-extra_specs", {"extra_specs": extra_specs})
        return str(made)

    def remove_flavor(self, flavor: str) -> None:
        self._check(self._connection.compute.delete(f"/flavors/{flavor}", microversion=VERSION))

    def make_server(
        self, flavor: str, image: str, network: Any, disk: int, keypair: str | None = None
    ) -> str:
        """A server on a volume that goes with it; its ID. It is not active yet.

        :param disk: GiB.
        """
        volume = {
            "boot_index": 0,
            "source_type": "image",
            "uuid": image,
            "destination_type": "volume",
            "volume_size": disk,
            "delete_on_termination": True,
        }
        server: dict[str, Any] = {
            "name": f"dmigrate-scenario-{time.time_ns()}",
            "flavorRef": flavor,
            "networks": network,
            "block_device_mapping_v2": [volume],
        }
        if keypair:
            server["key_name"] = keypair
        return str(self._post("/servers", {"server": server})["server"]["id"])

    def remove_server(self, server: str) -> None:
        """Returns when it is gone."""
        response = self._connection.compute.delete(f"/servers/{server}", microversion=VERSION)
        if response.status_code != 404:
            self._check(response)
        self.wait_for(f"server {server} to be gone", lambda: self._is_gone(server))

    # Servers

    def server(self, server: str) -> dict[str, Any]:
        """As Nova shows it."""
        found: dict[str, Any] = self._get(f"/servers/{server}")["server"]
        return found

    def wait_until_active(self, server: str) -> None:
        """:raises AssertionError: it has failed, or is not active in time."""

        def active() -> bool:
            now = self.server(server)
            if now["status"] == "ERROR":
                raise AssertionError(f"server {server} has failed: {now.get('fault')}")
            return now["status"] == "ACTIVE" and not now["OS-EXT-STS:task_state"]

        self.wait_for(f"server {server} to be active", active)

    def revive(self, server: str) -> None:
        """Call a server active that Nova takes for broken, if its guest runs.

        Some releases of Nova (34 among them) do so when a live migration has failed or was aborted,
        whichever driver they have, although nothing happened to the guest.

        :raises AssertionError: its guest does not run.
        """
        now = self.server(server)
        if now["status"] != "ERROR":
            return
        if now["OS-EXT-STS:power_state"] != _RUNNING:
            raise AssertionError(f"the guest of server {server} is gone: {now.get('fault')}")
        self._post(f"/servers/{server}/action", {"os-resetState": {"state": "active"}})

    def host_of(self, server: str) -> str:
        return str(self.server(server)["OS-EXT-SRV-ATTR:host"])

    def live_migrate(self, server: str) -> None:
        """Ask for it; the scheduler chooses the host."""
        body = {"os-migrateLive": {"host": None, "block_migration": "auto"}}
        self._post(f"/servers/{server}/action", body)

    def abort(self, server: str, migration: int) -> bool:
        """Whether that could be asked for: a migration that has not begun, or is over, cannot be
        aborted."""
        path = f"/servers/{server}/migrations/{migration}"
        response = self._connection.compute.delete(path, microversion=VERSION)
        if response.status_code in (400, 404):
            return False
        self._check(response)
        return True

    def migrations(self, server: str) -> list[dict[str, Any]]:
        """All that there were."""
        found: list[dict[str, Any]] = self._get(f"/os-migrations?instance_uuid={server}")[
            "migrations"
        ]
        return found

    def actions(self, server: str) -> list[dict[str, Any]]:
        """Its live migrations, as actions."""
        actions = self._get(f"/servers/{server}/os-instance-actions")["instanceActions"]
        return [action for action in actions if action["action"] == "live-migration"]

    def events(self, server: str, request_id: str) -> list[dict[str, Any]]:
        """Those of an action."""
        path = f"/servers/{server}/os-instance-actions/{request_id}"
        events: list[dict[str, Any]] = self._get(path)["instanceAction"]["events"]
        return events

    def wait_for(self, what: str, condition: Callable[[], Any]) -> Any:
        """What ``condition`` returns, once that is true.

        :raises AssertionError: it is not in time.
        """
        return wait_for(what, condition, self._timeout)

    def _is_gone(self, server: str) -> bool:
        response = self._connection.compute.get(f"/servers/{server}", microversion=VERSION)
        if response.status_code == 404:
            return True
        self._check(response)
        return False

    def _get(self, path: str) -> dict[str, Any]:
        return self._check(self._connection.compute.get(path, microversion=VERSION))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._check(self._connection.compute.post(path, json=body, microversion=VERSION))

    @staticmethod
    def _check(response: Any) -> dict[str, Any]:
        exceptions.raise_from_response(response)
        found: dict[str, Any] = response.json() if response.content else {}
        return found


def connect(cloud: str, timeout: float) -> Cloud:
    """The cloud of that name in clouds.yaml."""
    return Cloud(openstack.connect(cloud=cloud), timeout)
