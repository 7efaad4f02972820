# SPDX-License-Identifier: Apache-2.0
"""Volumes in a Ceph of one monitor, one manager and one OSD: Cinder's RBD driver.

Each host's libvirt has the key of QEMU's client as a secret, as Nova wants it, and DMigrate has a
client of its own that can do nothing but read.
"""

import base64
import contextlib
import time
import uuid
from pathlib import Path
from types import TracebackType

from tests.lab import image
from tests.lab.ceph import Ceph
from tests.lab.libvirt_host import LibvirtHost
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.openstack.configuration import Options
from tests.lab.openstack.service import PATIENCE
from tests.lab.openstack.storage_network import StorageNetwork

_POOL = "volumes"
#: Clients of Ceph: Cinder and QEMU, and DMigrate's relays.
_USER, _READER = "cinder", "dmigrate"
_SECRET = """
<secret ephemeral='no' private='no'>
  <uuid>{uuid}</uuid>
  <usage type='ceph'><name>client.{user} secret</name></usage>
</secret>
"""


class CephStorage:
    """``ceph``: the cluster. ``network``: on which hosts reach it. A context manager."""

    name = "ceph"
    ceph: Ceph
    network: StorageNetwork

    def __init__(self, directory: Path, hosts: LibvirtHosts) -> None:
        self._hosts = hosts
        self._secret = str(uuid.uuid4())
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> "CephStorage":
        with contextlib.ExitStack() as ends:
            self.network = ends.enter_context(StorageNetwork(self._hosts))
            self.ceph = ends.enter_context(Ceph(self.network.address, manager=True))
            self.ceph.create_pool(_POOL)
            self.ceph.add_client(_USER, osd=f"profile rbd pool={_POOL}")
            self.ceph.add_client(_READER, osd=f"profile rbd-read-only pool={_POOL}")
            self._wait_for_room()
            self._ends = ends.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._ends.close()

    def cinder_options(self) -> Options:
        return {
            self.name: {
                "volume_driver": "cinder.volume.drivers.rbd.RBDDriver",
                "volume_backend_name": self.name,
                "rbd_ceph_conf": self.ceph.configuration,
                "rbd_pool": _POOL,
                "rbd_user": _USER,
                "rbd_secret_uuid": self._secret,
            }
        }

    def cinder_setup(self) -> str:
        return ":"

    def nova_options(self) -> Options:
        # Cinder tells all that there is to know
        return {}

    def dmigrate_options(self) -> Options:
        return {
            "host": {"rbd_images": f"{_POOL}/volume-*"},
            "volume": {"rbd_user": _READER, "rbd_configuration": self.ceph.configuration},
        }

    def wrong_key(self, keyring: Path) -> Options:
        """Options of DMigrate with a key that is not its own.

        :param keyring: is written.
        """
        keyring.write_text(f"[client.{_READER}]\nkey = {self.ceph.key(_USER)}\n")
        return {"volume": {"rbd_keyring": keyring}}

    def prepare_host(self, host: LibvirtHost) -> None:
        connection = host.connect()
        try:
            secret = connection.secretDefineXML(_SECRET.format(uuid=self._secret, user=_USER))
            secret.setValue(base64.b64decode(self.ceph.key(_USER)))
        finally:
            connection.close()

    def fill(self, volume: str, content: Path) -> None:
        target = f"rbd:{_POOL}/volume-{volume}:id={_USER}:conf={self.ceph.configuration}"
        argv = ["qemu-img", "convert", "-n", "--target-is-zero", "-f", "raw", "-O", "raw"]
        image.run([*argv, str(content), target], content.parent)

    def _wait_for_room(self) -> None:
        """Cinder's scheduler takes a pool of which nothing is known for none."""
        deadline = time.monotonic() + PATIENCE
        while not self.ceph.room(_POOL):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the pool's room is not known: {self.ceph.last_words()}")
            time.sleep(0.2)
