# SPDX-License-Identifier: Apache-2.0
"""A database server at work on one kind of storage, which all rows of that storage are about."""

import contextlib
from collections.abc import Callable
from typing import Any

from tests.lab.openstack.ceph_storage import CephStorage
from tests.lab.openstack.cloud import OpenStack
from tests.lab.openstack.guest import DatabaseServer
from tests.lab.openstack.sql import table_errors, wait_until_filled
from tests.lab.openstack.working import Run, Shape, WorkingServer

CEPH = CephStorage.name


def server_name(storage: str) -> str:
    """The name of the database server on a storage."""
    return f"db-{storage}"


class Scene:
    """``working``: the server with its clients. ``runs``: what migrations have cost. A context
    manager.
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
        self.cloud, self.storage = cloud, storage
        self.runs: list[Run] = []
        self._shape, self._say, self._specs = shape, say, specs
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> "Scene":
        cloud, shape, name = self.cloud, self._shape, server_name(self.storage)
        with contextlib.ExitStack() as ends:
            self._say(f"{self.storage}: a server of {shape.ram_mb} MiB, pool {shape.pool_mb} MiB")
            database = DatabaseServer(
                cloud, name, list(cloud.storages).index(self.storage), shape.ram_mb,
                shape.pool_mb, shape.load, self.storage, **self._specs,
            ).create()  # fmt: skip
            console = cloud.site.services.log(f"console-{name}")
            ends.callback(lambda: console.write_text(database.console()))
            wait_until_filled(database.sql_server)
            cloud.client.wait(database.account.served, "the agent is at the broker")
            self._say("Its database has filled its pool; load, ledger and probe begin")
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

    def wrong_with_data(self) -> list[str]:
        """What is wrong with the database. Its clients end."""
        self.working.stop_clients()
        wrong = [f"CHECK TABLE: {line}" for line in table_errors(self.working.server)]
        return wrong + self.wrong_with_ledger()

    def wrong_with_ledger(self) -> list[str]:
        """What of the acknowledged commits the database does not have."""
        found = self.working.ledger.check()
        if found.ok:
            return []
        return [f"{found.lost} of {found.acknowledged} commits lost, {found.wrong} rows wrong"]
