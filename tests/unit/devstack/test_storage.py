# SPDX-License-Identifier: Apache-2.0
"""Ceph and NFS as Cinder's backends, by devstack's own plugins for them."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests import base
from tests.unit.devstack.node import ALL_IN_ONE, COMPUTE, Call, Node


class CephTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.node = Node(self.make_directory(), COMPUTE)
        self.node.variables["DEVSTACK_PLUGINS"] = "devstack-plugin-ceph,nova-dmigrate"

    def test_relays_get_the_bindings_of_ceph(self) -> None:
        self.node.run("stack pre-install")
        self.assertEqual([("python3-rados", "python3-rbd")], self.node.called("install_package"))

    def test_guests_write_through(self) -> None:
        nova_conf = Path(self.node.path("etc/nova/nova.conf"))
        nova_conf.write_text("[libvirt]\ndisk_cachemodes = network=writeback\n")
        self.node.run("stack post-config")
        text = nova_conf.read_text()
        self.assertIn("disk_cachemodes = network=none\n", text)
        self.assertNotIn("writeback", text)

    def test_it_can_be_switched_off_and_on(self) -> None:
        self.node.variables["NOVA_DMIGRATE_CEPH"] = "False"
        self.node.run("stack pre-install")
        self.assertEqual([], self.node.called("install_package"))
        self.node.variables |= {"NOVA_DMIGRATE_CEPH": "True", "DEVSTACK_PLUGINS": "nova-dmigrate"}
        self.node.run("stack pre-install")
        self.assertEqual([("python3-rados", "python3-rbd")], self.node.called("install_package"))


class NFSTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.node = Node(self.make_directory(), ALL_IN_ONE)
        self.node.variables |= {
            "DEVSTACK_PLUGINS": "devstack-plugin-nfs,nova-dmigrate",
            "NOVA_DMIGRATE_NFS_CLIENTS": "192.0.2.11 192.0.2.12",
        }
        self.exports = Path(self.node.path("exports.d/nova-dmigrate.exports"))

    def test_all_hosts_may_mount_the_volumes(self) -> None:
        self.node.run("stack post-config")
        options = "(rw,no_root_squash,no_subtree_check)"
        self.assertEqual(
            f"/srv/nfs1 192.0.2.11{options} 192.0.2.12{options}\n", self.exports.read_text()
        )
        self.assertIn(("-ra",), self.node.called("exportfs"))

    def test_the_directory_is_that_of_the_other_plugin(self) -> None:
        self.node.variables["NFS_EXPORT_DIR"] = "/srv/volumes"
        self.node.run("stack post-config")
        self.assertTrue(self.exports.read_text().startswith("/srv/volumes "))

    def test_the_share_has_a_name_that_is_good_on_all_hosts(self) -> None:
        cinder_conf = Path(self.node.path("etc/cinder/cinder.conf"))
        cinder_conf.write_text("[nfs]\nnas_host = localhost\nnas_share_path = /srv/nfs1\n")
        self.node.run("stack post-config")
        self.assertEqual(
            "[nfs]\nnas_host = 192.0.2.11\nnas_share_path = /srv/nfs1\n", cinder_conf.read_text()
        )

    def test_a_compute_host_gets_the_client_alone(self) -> None:
        self.node.variables |= {
            "ENABLED_SERVICES": COMPUTE,
            "DEVSTACK_PLUGINS": "nova-dmigrate",
            "NOVA_DMIGRATE_NFS": "True",
        }
        self.assertEqual([("nfs-common",)], self._installed("noble"))
        self.assertEqual([("nfs-utils",)], self._installed("rhel9"))
        # It may have volumes, but not of this kind, and no program to export with
        self.exports.parent.rmdir()
        self.node.stack()
        self.assertEqual([], self.node.called("exportfs"))

    def test_relays_may_read_below_novas_mounts(self) -> None:
        self.node.run("stack post-config")
        text = Path(self.node.path("etc/nova-dmigrate/nova-dmigrate.conf")).read_text()
        self.assertIn(f",{self.node.path('data/nova')}\n", text)

    def test_nobody_may_mount_them_after_unstacking(self) -> None:
        self.node.stack()
        self.node.run("unstack")
        self.assertFalse(self.exports.exists())
        self.assertIn(("-ra",), self.node.called("exportfs"))

    def test_volumes_outlive_novas_directory(self) -> None:
        """Which devstack removes, with all that is below it, after the plugin's phase."""
        base.require(None if os.geteuid() == 0 else "only root can mount")
        share = self.make_directory()
        (share / "volume-1").write_text("of all nodes")
        mnt = Path(self.node.path("data/nova/mnt"))
        (mnt / "5f3c9f6e").mkdir(parents=True)
        (mnt / "unmounted").mkdir()
        self.node.variables["ENABLED_SERVICES"] = COMPUTE
        self.node.stack()
        # As guests' volumes are that still run
        with self._mounted(share, mnt / "5f3c9f6e") as mounted, (mounted / "volume-1").open():
            self.node.run("unstack")
            self.assertIn(("umount", "-l", str(mounted)), self.node.called("sudo"))
            shutil.rmtree(self.node.path("data/nova"))
        self.assertEqual("of all nodes", (share / "volume-1").read_text())
        # Where no volume is mounted there is nothing to do
        self.node.run("unstack")
        self.assertNotIn("umount", [call[0] for call in self.node.called("sudo")])

    @contextlib.contextmanager
    def _mounted(self, source: Path, place: Path) -> Iterator[Path]:
        mounting = subprocess.run(["mount", "--bind", source, place], check=False)
        base.require(None if mounting.returncode == 0 else "this root may not mount")
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", place], capture_output=True, check=False)

    def test_without_it_nothing_is_exported(self) -> None:
        self.node.variables["DEVSTACK_PLUGINS"] = "nova-dmigrate"
        self.node.stack()
        self.node.run("unstack")
        self.assertEqual([], self.node.called("exportfs"))
        self.assertFalse(self.exports.exists())

    def _installed(self, distribution: str) -> list[Call]:
        self.node.variables["DISTRO"] = distribution
        self.node.stack()
        return self.node.called("install_package")
