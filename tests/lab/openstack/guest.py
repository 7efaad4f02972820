# SPDX-License-Identifier: Apache-2.0
"""Servers of the cloud: their images, and a database server with the agent, its volume and the
agent's way to the broker.

They boot from a kernel and an initramfs in Glance. An agent has its account at the broker from its
server's initramfs, as it would from the user data of cloud-init. Nova gives servers no port of the
agent's: it is asked over the network of the servers, on which the broker listens.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.lab import image
from tests.lab.database_image import (
    LEAN,
    MARIADB,
    DatabaseImage,
    Release,
    database_image,
    make_initramfs,
)
from tests.lab.demo.clients import Server
from tests.lab.demo.volume import create_volume
from tests.lab.guest import KERNEL_ARGUMENTS
from tests.lab.guest_network import CLIENTS_ADDRESS, guest_address
from tests.lab.openstack import seed, shell
from tests.lab.openstack.account import AgentAccount
from tests.lab.openstack.cloud import OpenStack

_SCRIPTS = Path(__file__).with_name("guest_scripts")
#: Image and flavor of servers that do nothing, and whose kernel they have.
_TINY = "nothing"
_TINY_RELEASE = MARIADB
_TINY_INIT = b"""#!/bin/busybox sh
# Nothing but a server that runs
/bin/busybox mkdir -p /proc
/bin/busybox mount -t proc proc /proc
echo "init: READY"
while true; do /bin/busybox sleep 1000; done
"""


def at_broker(release: Release) -> Release:
    """The release with an agent that speaks with the broker, for which it needs more than for a
    port."""
    return dataclasses.replace(release, packages=(*release.packages, "python3-oslo.messaging"))


def tiny_server(cloud: OpenStack, name: str, host: str) -> Any:
    """A server that does nothing, without a network, on a host.

    :raises CloudError: it does not come to run.
    """
    sdk = cloud.client.sdk
    found = sdk.image.find_image(_TINY) or tiny_image(cloud, _TINY)
    flavor = sdk.compute.find_flavor(_TINY) or seed.flavor(cloud.client, _TINY, 128, 1)
    ordered = sdk.compute.create_server(
        name=name,
        flavor_id=flavor.id,
        image_id=found.id,
        networks="none",
        availability_zone=_zone(host),
    )
    return cloud.client.wait_for_server(ordered, "ACTIVE")


def tiny_image(cloud: OpenStack, name: str) -> Any:
    """The image of a server that does nothing; no agent is in it."""
    made = database_image(at_broker(_TINY_RELEASE))
    initramfs = image.cpio(
        [
            ("bin", 0o040755, b""),
            ("dev", 0o040755, b""),
            ("bin/busybox", 0o100755, made.busybox.read_bytes()),
            ("init", 0o100755, _TINY_INIT),
        ]
    )
    disk = cloud.directory / "tiny.raw"
    with open(disk, "wb") as file:
        file.truncate(16 << 20)
    return _upload(cloud, name, made, initramfs, disk, "raw", KERNEL_ARGUMENTS)


class DatabaseServer:
    """A server of Nova's with a database on a volume of Cinder's, and the agent.

    ``address``: of the database. ``account``: of the agent. ``server``: as Nova has it.
    """

    server: Any

    def __init__(
        self,
        cloud: OpenStack,
        name: str,
        number: int = 0,
        ram_mb: int = 1024,
        pool_mb: int = 512,
        load: str = "oltp_read_write",
        storage: str | None = None,
        release: Release = MARIADB,
        host: str | None = None,
        **specs: str,
    ) -> None:
        """:param number: of its address.
        :param load: whose tables it has.
        :param storage: that its volume is on, by name; the cloud's first one if None.
        :param host: that it starts on; Nova chooses if None.
        :param specs: extra specs of its flavor, with ``__`` for the colon.
        """
        self.address = guest_address(number)
        self._cloud = cloud
        self._name = name
        self._ram_mb, self._pool_mb, self._load = ram_mb, pool_mb, load
        self._storage = storage or next(iter(cloud.storages))
        self._release = at_broker(release)
        self._host = host
        self._specs = specs
        self.account = AgentAccount(cloud.broker)

    def create(self) -> "DatabaseServer":
        """Make it, its image and its volume; the database may still be starting.

        :raises CloudError: the cloud does not.
        """
        made = database_image(self._release)
        root = _root_disk(made)
        uploaded = _upload(
            self._cloud, self._name, made, self._initramfs(made), root, "qcow2", self._arguments()
        )
        volume = self._filled_volume()
        flavor = seed.flavor(self._cloud.client, self._name, self._ram_mb, 3, **self._specs)
        ordered = _order(
            self._cloud, self._name, flavor, uploaded, volume, self.address, self._host
        )
        self.account.make(ordered.id)
        self.server = self._cloud.client.wait_for_server(ordered, "ACTIVE")
        return self

    @property
    def sql_server(self) -> Server:
        """The database, as its clients reach it."""
        return Server(host=self.address, clients=self._cloud.guests.clients)

    def console(self) -> str:
        """What it has said on its console."""
        with contextlib.suppress(Exception):
            output = self._cloud.client.sdk.compute.get_server_console_output(self.server.id)
            return str(output["output"])
        return ""

    def run(self, script: str) -> str:
        """Run a script of bash in it, with what ``guest.sh`` has; what it says.

        :raises ShellError: it failed.
        """
        return shell.run(self._cloud.guests.clients, self.address, script)

    @contextlib.contextmanager
    def agent_stopped(self) -> Iterator[None]:
        """There is no agent meanwhile."""
        try:
            self.run("touch /run/agent.stopped; kill $(</run/agent.pid)")
            yield
        finally:
            self.run("rm -f /run/agent.stopped")

    def _filled_volume(self) -> Any:
        content = self._cloud.directory / f"{self._name}-volume.raw"
        create_volume(self._release, self._load, self._pool_mb, content)
        size = -(-content.stat().st_size >> 30)
        volume = self._cloud.client.make_volume(self._name, size, self._storage)
        self._cloud.storages[self._storage].fill(volume.id, content)
        content.unlink()
        return volume

    def _arguments(self) -> str:
        return (
            f"{KERNEL_ARGUMENTS} ndm.pool={self._pool_mb}M ndm.hugepages=0"
            f" ndm.address={self.address} ndm.shell={shell.PORT}"
            f" ndm.options={','.join(LEAN[self._release.flavour])}"
        )

    def _initramfs(self, made: DatabaseImage) -> bytes:
        path = self._cloud.directory / f"{self._name}.cpio"
        make_initramfs(self._release, made, path)
        # The kernel takes several archives; of a file that two have it keeps the last one's
        own = image.cpio(
            [
                ("payload/init.sh", 0o100755, (_SCRIPTS / "init.sh").read_bytes()),
                ("payload/shell.py", 0o100755, shell.SERVER.read_bytes()),
                ("payload/agent.conf", 0o100600, self._agent_configuration().encode()),
            ]
        )
        return path.read_bytes() + own

    def _agent_configuration(self) -> str:
        return (
            f"[DEFAULT]\ntransport_url = {self.account.url(CLIENTS_ADDRESS, '@INSTANCE@')}\n"
            "[agent]\ntransport = broker\nstate_directory = /run/nova-dmigrate-agent\n"
            "sql_password_file = /run/payload/password\n"
        )


def _root_disk(made: DatabaseImage) -> Path:
    """The same disk as an image without what is empty; made once."""
    path = made.root.with_suffix(".qcow2")
    with image.locked(image.cache_directory() / "openstack-root.lock"):
        if not path.exists():
            part = path.with_suffix(".part")
            argv = ["qemu-img", "convert", "-O", "qcow2", str(made.root), str(part)]
            image.run(argv, path.parent)
            part.rename(path)
    return path


def _upload(
    cloud: OpenStack,
    name: str,
    made: DatabaseImage,
    initramfs: bytes,
    disk: Path,
    disk_format: str,
    arguments: str,
) -> Any:
    sdk = cloud.client.sdk.image
    kernel = sdk.create_image(
        f"{name}-kernel", filename=str(made.kernel), disk_format="aki", container_format="aki"
    )
    ramdisk = sdk.create_image(
        f"{name}-ramdisk", data=initramfs, disk_format="ari", container_format="ari"
    )
    return sdk.create_image(
        name,
        filename=str(disk),
        disk_format=disk_format,
        container_format="bare",
        kernel_id=kernel.id,
        ramdisk_id=ramdisk.id,
        os_command_line=arguments,
        hw_rng_model="virtio",
    )


def _order(
    cloud: OpenStack,
    name: str,
    flavor: Any,
    uploaded: Any,
    volume: Any,
    address: str,
    host: str | None,
) -> Any:
    """Order a server, whose disks are a copy of an image and a volume."""
    disks = [
        {
            "uuid": uploaded.id,
            "source_type": "image",
            "destination_type": "local",
            "boot_index": 0,
            "delete_on_termination": True,
        },
        {
            "uuid": volume.id,
            "source_type": "volume",
            "destination_type": "volume",
            "boot_index": -1,
        },
    ]
    return cloud.client.sdk.compute.create_server(
        name=name,
        flavor_id=flavor.id,
        image_id=uploaded.id,
        networks=[{"port": _port(cloud, name, address).id}],
        block_device_mapping=disks,
        **({"availability_zone": _zone(host)} if host else {}),
    )


def _zone(host: str) -> str:
    """That makes Nova start a server on a host."""
    return f"nova:{host}"


def _port(cloud: OpenStack, name: str, address: str) -> Any:
    return cloud.client.sdk.network.create_port(
        name=name,
        network_id=cloud.network.id,
        fixed_ips=[{"subnet_id": cloud.network.subnet, "ip_address": address}],
    )
