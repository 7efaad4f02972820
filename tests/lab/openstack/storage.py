# SPDX-License-Identifier: Apache-2.0
"""Where volumes are: what each kind of storage has to have, and a directory that is shared as by
NFS.
"""

import hashlib
import shutil
from pathlib import Path
from types import TracebackType
from typing import Protocol

from tests.lab.libvirt_host import LibvirtHost
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.openstack.configuration import Options


class Storage(Protocol):
    """A kind of storage for Cinder's volumes. A context manager.

    ``name``: of Cinder's backend, which is a group of its configuration, and of the volume type.
    """

    name: str

    def __enter__(self) -> "Storage": ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None: ...  # fmt: skip

    def cinder_options(self) -> Options:
        """Of cinder-volume."""

    def cinder_setup(self) -> str:
        """Commands of a shell before cinder-volume starts, in a mount namespace of its own."""

    def nova_options(self) -> Options:
        """Of nova-compute."""

    def dmigrate_options(self) -> Options:
        """Of DMigrate, on a compute host."""

    def prepare_host(self, host: LibvirtHost) -> None:
        """Make a host a client of it, before its nova-compute starts."""

    def fill(self, volume: str, content: Path) -> None:
        """Write a volume's content, as somebody does who restores it from elsewhere.

        :param volume: its id; it is new and not attached.
        :param content: a raw image, not larger than the volume.
        """


class Kind(Protocol):
    """Makes a storage."""

    name: str

    def __call__(self, directory: Path, hosts: LibvirtHosts) -> Storage:
        """:param directory: of the cloud."""


class SharedDirectory:
    """Files in a directory: Cinder's NFS driver, with a client of NFS that is the lab's own
    (``programs/mount``).
    """

    name = "nfs"

    def __init__(self, directory: Path, hosts: LibvirtHosts) -> None:
        here = directory / self.name
        self._export = here / "export"
        self._mounts = here / "mounts"
        self._shares = here / "shares"
        for each in (self._export, self._mounts):
            each.mkdir(parents=True)
        self._shares.write_text(f"{self._share}\n")

    def __enter__(self) -> "SharedDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        """It goes with the cloud's directory."""

    def cinder_options(self) -> Options:
        return {
            self.name: {
                "volume_driver": "cinder.volume.drivers.nfs.NfsDriver",
                "volume_backend_name": self.name,
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

    def nova_options(self) -> Options:
        return {"libvirt": {"nfs_mount_point_base": self._mounts}}

    def dmigrate_options(self) -> Options:
        return {"host": {"volume_directories": self._mounts}}

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
