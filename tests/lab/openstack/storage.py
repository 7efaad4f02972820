# SPDX-License-Identifier: Apache-2.0
"""Where volumes are. A cloud is given one kind of storage; this one is a directory that is shared
as by NFS.

What another kind (Ceph) has to have is `Storage`.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Protocol

from tests.lab.libvirt_host import LibvirtHost
from tests.lab.openstack.configuration import Options

BACKEND = "lab"


class Storage(Protocol):
    """A kind of storage for Cinder's volumes."""

    def cinder_options(self) -> Options:
        """Of cinder-volume; the backend is the group `BACKEND`."""

    def cinder_setup(self) -> str:
        """Commands of a shell before cinder-volume starts, in a mount namespace of its own."""

    def nova_options(self, host: LibvirtHost) -> Options:
        """Of nova-compute on a host."""

    def prepare_host(self, host: LibvirtHost) -> None:
        """Make a host a client of it, before its nova-compute starts."""

    def fill(self, volume: str, content: Path) -> None:
        """Write a volume's content, as somebody does who restores it from elsewhere.

        :param volume: its id; it is not attached.
        :param content: a raw image, not larger than the volume.
        """


class SharedDirectory:
    """Files in a directory: Cinder's NFS driver, with a client of NFS that is the lab's own
    (``programs/mount``).
    """

    def __init__(self, directory: Path) -> None:
        """:param directory: for it; not there yet."""
        self._export = directory / "export"
        self._mounts = directory / "mounts"
        self._shares = directory / "shares"
        for each in (self._export, self._mounts):
            each.mkdir(parents=True)
        self._shares.write_text(f"{self._share}\n")

    def cinder_options(self) -> Options:
        return {
            BACKEND: {
                "volume_driver": "cinder.volume.drivers.nfs.NfsDriver",
                "volume_backend_name": BACKEND,
                "nfs_shares_config": self._shares,
                "nfs_mount_point_base": self._mounts,
                "nas_secure_file_operations": False,
                "nas_secure_file_permissions": False,
            }
        }

    def cinder_setup(self) -> str:
        # It is where the share lies, and needs no client
        name = hashlib.md5(self._share.encode(), usedforsecurity=False).hexdigest()
        point = self._mounts / name
        return f"{self._private} && mkdir {point} && mount --bind {self._export} {point}"

    def nova_options(self, host: LibvirtHost) -> Options:
        return {"libvirt": {"nfs_mount_point_base": self._mounts}}

    def prepare_host(self, host: LibvirtHost) -> None:
        host.run(["sh", "-c", self._private])

    def fill(self, volume: str, content: Path) -> None:
        file = self._export / f"volume-{volume}"
        size = file.stat().st_size
        with open(content, "rb") as source, open(file, "r+b") as target:
            shutil.copyfileobj(source, target, 16 << 20)
            if target.tell() > size:
                raise ValueError(f"{content} is larger than volume {volume}")

    @property
    def _private(self) -> str:
        """A command: the mount points are each host's own. One that a host removes would take the
        other's mount with it.
        """
        return f"mount -t tmpfs tmpfs {self._mounts}"

    @property
    def _share(self) -> str:
        return f"127.0.0.1:{self._export}"
