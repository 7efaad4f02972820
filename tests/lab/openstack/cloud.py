# SPDX-License-Identifier: Apache-2.0
"""The cloud as a whole, from nothing to two compute hosts that Nova knows, and back."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from tests.lab.broker import Broker
from tests.lab.guest_network import GuestNetwork
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.openstack import (
    cinder,
    exact_emulator,
    glance,
    keystone,
    neutron,
    nova,
    placement,
    schemas,
    seed,
)
from tests.lab.openstack.ceph_storage import CephStorage
from tests.lab.openstack.client import Client
from tests.lab.openstack.computes import Compute
from tests.lab.openstack.site import MESSAGING, Site
from tests.lab.openstack.storage import Kind, Storage
from tests.lab.openstack.way_in import open_broker


class OpenStack:
    """A cloud. A context manager; what it has started and made is gone at its end.

    :ivar client: its administrator.
    :ivar hosts: the two of libvirt; ``computes`` are the same to Nova, by name.
    :ivar storages: by the names of their volume types.
    :ivar guests: the network of its servers, and of their clients.
    :ivar network: the same to Neutron.
    :ivar seconds: that each step of its start took.
    """

    client: Client
    network: seed.Network

    def __init__(
        self,
        directory: Path,
        kinds: Sequence[Kind] = (CephStorage,),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """:param directory: an empty one, for all files; not beneath /run.
        :param kinds: of storage; volumes of which nothing is said are on the first one.
        :param say: is told what goes on.
        """
        self.directory = directory
        self.storages: dict[str, Storage] = {}
        self.seconds: dict[str, float] = {}
        self.computes: dict[str, Compute] = {}
        self._kinds = kinds
        self._say = say
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> "OpenStack":
        try:
            self._start()
        except BaseException as error:
            self._explain(error)
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if error is not None:
            self._explain(error)
        self.close()

    def close(self) -> None:
        """End all of it."""
        self._ends.close()

    def _start(self) -> None:
        enter, step = self._ends.enter_context, self._step
        with step("hosts"):
            self.hosts = enter(LibvirtHosts(self.directory))
            for host in (self.hosts.a, self.hosts.b):
                exact_emulator.install(host)
            self.guests = enter(GuestNetwork(self.hosts))
        with step("storage"):
            for kind in self._kinds:
                self.storages[kind.name] = enter(kind(self.directory, self.hosts))
            storages = list(self.storages.values())
        with step("broker and database"), ThreadPoolExecutor(1) as pool:
            self.broker = enter(Broker([]))
            self.site = site = Site.plan(self.directory, self.broker)
            self._ends.callback(site.database.stop)
            self._ends.callback(site.services.close)
            admitted = pool.submit(self._admit_services)
            for part in (keystone, placement, glance, neutron, nova):
                part.configure(site)
            cinder.configure(site, storages)
            schemas.start_database(site, (keystone, placement, glance, neutron, cinder, nova))
            admitted.result()
        with step("Keystone"):
            keystone.bootstrap(site)
            keystone.start(site)
            site.wait_for_api("keystone")
            with contextlib.closing(Client(site)) as client:
                seed.accounts(site, client)
            # With the catalogue as it is now
            self.client = enter(contextlib.closing(Client(site)))
        with step("APIs"):
            for part in (placement, glance, neutron, nova):
                part.start(site)
            cinder.start(site, storages)
            for name in site.ports:
                site.wait_for_api(name)
            seed.volume_types(self.client, list(self.storages))
        with step("computes"):
            for host in (self.hosts.a, self.hosts.b):
                self.computes[host.name] = compute = Compute(site, storages, host)
                compute.start()
            self.network = seed.network(self.client)
            self.client.wait_for_computes(list(self.computes), site.services.check_all_alive)
            self.client.wait_for_backends(list(self.storages), site.services.check_all_alive)

    def _explain(self, error: BaseException) -> None:
        """Let an error tell which services have ended, if any."""
        if hasattr(self, "site") and (ended := self.site.services.obituaries()):
            error.add_note(ended)

    def _admit_services(self) -> None:
        """At the broker, which also servers' agents shall reach."""
        open_broker(self.site.services, self.guests, self.broker.port, self.directory)
        for command in (
            ["add_vhost", MESSAGING],
            ["add_user", MESSAGING, self.site.password],
            ["set_permissions", "-p", MESSAGING, MESSAGING, ".*", ".*", ".*"],
        ):
            self.broker.control(*command)

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self._say(f"OpenStack: {name}")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
