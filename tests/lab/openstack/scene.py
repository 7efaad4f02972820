# SPDX-License-Identifier: Apache-2.0
"""A database server at work on one kind of storage, which all rows of that storage are about."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tests.lab.openstack.ceph_storage import CephStorage
from tests.lab.openstack.client import CloudError
from tests.lab.openstack.cloud import OpenStack
from tests.lab.openstack.computes import Compute
from tests.lab.openstack.guest import DatabaseServer, tiny_server
from tests.lab.openstack.sql import table_errors, wait_until_filled
from tests.lab.openstack.storage import SharedDirectory
from tests.lab.openstack.working import Run, Shape, WorkingServer

CEPH, NFS = CephStorage.name, SharedDirectory.name
#: Seconds in which a database that is at work acknowledges a commit, also when its machine is busy.
_COMMIT = 180.0
#: MiB of another server, and of its pool.
_COMPANION = (640, 256)


def server_name(storage: str) -> str:
    """The name of the database server on a storage."""
    return f"db-{storage}"


class Scene:
    """``working``: the server with its clients. ``runs``: what migrations have cost. A context
    manager; the server goes at its end.
    """

    working: WorkingServer

    def __init__(
        self,
        cloud: OpenStack,
        storage: str,
        shape: Shape,
        say: Callable[[str], None],
        **specs: str,
    ) -> None:
        """:param storage: by name.
        :param say: is told what goes on.
        :param specs: extra specs of the server's flavor, with ``__`` for the colon.
        """
        self.cloud, self.storage, self.say = cloud, storage, say
        self.runs: list[Run] = []
        self._shape, self._specs = shape, specs
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> "Scene":
        cloud, shape, name = self.cloud, self._shape, server_name(self.storage)
        with contextlib.ExitStack() as ends:
            self.say(f"{self.storage}: a server of {shape.ram_mb} MiB, pool {shape.pool_mb} MiB")
            database = DatabaseServer(
                cloud, name, list(cloud.storages).index(self.storage), shape.ram_mb,
                shape.pool_mb, shape.load, self.storage, shape.release, **self._specs,
            ).create()  # fmt: skip
            ends.callback(self._delete, database.server)
            console = cloud.site.services.log(f"console-{name}")
            ends.callback(lambda: console.write_text(database.console()))
            wait_until_filled(database.sql_server)
            cloud.client.wait(database.account.served, "the agent is at the broker")
            self.say("Its database has filled its pool; load, ledger and probe begin")
            cloud.hosts.shape(shape.network)
            directory = cloud.directory / name
            directory.mkdir()
            self.working = ends.enter_context(WorkingServer(cloud, database, shape, directory))
            self._ends = ends.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    @property
    def server(self) -> Any:
        """The database server, as Nova has it."""
        return self.working.database.server

    @property
    def here(self) -> Compute:
        """The host that it is on."""
        return self.cloud.computes[self.cloud.client.host_of(self.server)]

    @property
    def there(self) -> Compute:
        """The other one."""
        here = self.here
        (other,) = (each for each in self.cloud.computes.values() if each is not here)
        return other

    @contextlib.contextmanager
    def neighbour(self) -> Iterator[Any]:
        """Another server on the same host, which does nothing and has no agent."""
        server = tiny_server(self.cloud, "neighbour", self.here.name)
        try:
            yield server
        finally:
            self._delete(server)

    @contextlib.contextmanager
    def companion(self) -> Iterator[DatabaseServer]:
        """Another database server on the same host, with an agent and without clients, whose flavor
        prefers the relays.
        """
        database = DatabaseServer(
            self.cloud, "companion", len(self.cloud.storages), *_COMPANION, self._shape.load,
            self.storage, self._shape.release, self.here.name, dmigrate__policy="preferred",
        )  # fmt: skip
        try:
            database.create()
            wait_until_filled(database.sql_server)
            self.cloud.client.wait(database.account.served, "the companion's agent is there")
            yield database
        finally:
            for server in self.cloud.client.sdk.compute.servers(name="^companion$"):
                self._delete(server)
                database.account.remove()

    @contextlib.contextmanager
    def network(self, mb_per_s: float | None) -> Iterator[None]:
        """The migration network carries so much meanwhile; what it does else if None."""
        self.cloud.hosts.shape(mb_per_s or self._shape.network)
        try:
            yield
        finally:
            self.cloud.hosts.shape(self._shape.network)

    def mend(self) -> None:
        """See that the next row finds all in order, whatever has become of the last one.

        :raises CloudError: that is not to be had.
        """
        client = self.cloud.client
        for compute in self.cloud.computes.values():
            compute.ensure_running()
            client.wait(compute.serves, f"the host service of {compute.name} answers")
            client.bring_up(compute.name)
        client.settle(self.server)
        try:
            self.working.wait_for_commit(_COMMIT)
        except CloudError:
            self.say("The database does not commit; its server is started anew")
            self.reboot()
            self.working.outlive()
        client.wait(self.working.database.account.served, "the agent is at the broker")

    def wrong_with_server(self) -> list[str]:
        """What of it must never be: that it is in two places, or has lost commits."""
        found = [
            compute.name
            for compute in self.cloud.computes.values()
            if self.server.id in compute.guests()
        ]
        here = self.here.name
        wrong = [] if found == [here] else [f"Nova has it on {here}, libvirt on {found}"]
        return wrong + self._wrong_with_ledger()

    def wrong_with_data(self) -> list[str]:
        """What is wrong with the database. Its clients end."""
        self.working.stop_clients()
        wrong = [f"CHECK TABLE: {line}" for line in table_errors(self.working.server)]
        return wrong + self._wrong_with_ledger()

    def _wrong_with_ledger(self) -> list[str]:
        """What of the acknowledged commits the database does not have."""
        found = self.working.ledger.check()
        if found.ok:
            return []
        return [f"{found.lost} of {found.acknowledged} commits lost, {found.wrong} rows wrong"]

    def reboot(self) -> None:
        """Start the server anew, as by its power: what its database has in memory is gone.

        :raises CloudError: it does not start.
        """
        client = self.cloud.client
        client.sdk.compute.reboot_server(self.server.id, "HARD")
        client.wait_for_server(self.server, "ACTIVE")

    def _delete(self, server: Any) -> None:
        """Others do not depend on whether it goes."""
        try:
            self.cloud.client.delete_server(server)
        except Exception as error:  # noqa: BLE001
            self.say(f"Server {server.name} cannot be deleted: {error}")
