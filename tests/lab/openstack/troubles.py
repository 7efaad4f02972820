# SPDX-License-Identifier: Apache-2.0
"""What goes wrong while a server migrates, each as a context manager around the migration. At its
end all is as it was.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from tests.lab.ceph import Ceph
from tests.lab.demo.midway import midway
from tests.lab.openstack.ceph_storage import CephStorage
from tests.lab.openstack.scene import Scene

Trouble = Callable[[Scene], AbstractContextManager[None]]

#: Bytes of a volume, more than opening it takes.
_READ = 4e6
#: Seconds for which storage is slow, and in turn hangs and serves; and for which it is gone.
_SLOW, _HANGS, _SERVES, _GONE = 20.0, 0.4, 0.1, 3.0


def no_trouble(scene: Scene) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def agent_stopped(scene: Scene) -> Iterator[None]:
    """The agent in the server does not run."""
    database, client = scene.working.database, scene.cloud.client
    with database.agent_stopped():
        client.wait(lambda: not database.account.served(), "no agent is at the broker")
        yield
    client.wait(database.account.served, "the agent is at the broker")


@contextlib.contextmanager
def wrong_password(scene: Scene) -> Iterator[None]:
    """The agent has another password than the broker, which does not let it in."""
    account, client = scene.working.database.account, scene.cloud.client
    with account.refused():
        client.wait(lambda: not account.served(), "no agent is at the broker")
        yield
    client.wait(account.served, "the agent is at the broker")


@contextlib.contextmanager
def no_host_service(scene: Scene) -> Iterator[None]:
    """DMigrate's host service does not run at the destination."""
    there = scene.there
    scene.cloud.site.services.stop(there.host_service)
    try:
        yield
    finally:
        there.ensure_running()
        scene.cloud.client.wait(there.serves, f"the host service of {there.name} answers")


@contextlib.contextmanager
def wrong_keyring(scene: Scene) -> Iterator[None]:
    """DMigrate's host service at the destination has a key that Ceph does not take."""
    there, client = scene.there, scene.cloud.client
    keyring = scene.cloud.directory / "wrong.keyring"
    with there.other_options(_storage(scene).wrong_key(keyring)):
        client.wait(there.serves, f"the host service of {there.name} answers")
        yield
    client.wait(there.serves, f"the host service of {there.name} answers")


@contextlib.contextmanager
def abort(scene: Scene) -> Iterator[None]:
    """Whoever has ordered the migration has it aborted, while the destination reads."""
    client, server = scene.cloud.client, scene.server
    _, has_read = _ceph(scene)

    def order(over: threading.Event) -> None:
        for each in client.sdk.compute.server_migrations(server.id):
            client.command("server", "migration", "abort", server.id, str(each.id))

    with midway(has_read, _READ, order):
        yield


@contextlib.contextmanager
def slow_ceph(scene: Scene) -> Iterator[None]:
    """Ceph hangs most of the time for a while, in which the destination reads."""
    ceph, has_read = _ceph(scene)

    def hang(over: threading.Event) -> None:
        end = time.monotonic() + _SLOW
        while time.monotonic() < end:
            with ceph.frozen("osd"):
                time.sleep(_HANGS)
            time.sleep(_SERVES)

    with midway(has_read, _READ, hang):
        yield


@contextlib.contextmanager
def osd_restarted(scene: Scene) -> Iterator[None]:
    """The OSD is killed while the destination reads, and started a moment later."""
    ceph, has_read = _ceph(scene)

    def restart(over: threading.Event) -> None:
        try:
            ceph.kill_osd()
            time.sleep(_GONE)
        finally:
            ceph.start_osd()

    with midway(has_read, _READ, restart):
        yield


def _ceph(scene: Scene) -> tuple[Ceph, Callable[[], int]]:
    """The cluster, and how many bytes the destination has read of it."""
    storage = _storage(scene)
    return storage.ceph, functools.partial(storage.network.carried_to, scene.there.host)


def _storage(scene: Scene) -> CephStorage:
    storage = scene.cloud.storages[scene.storage]
    assert isinstance(storage, CephStorage)
    return storage
