# SPDX-License-Identifier: Apache-2.0
"""Volumes of all kinds, from what Cinder says of them to what the destination's relay may read."""

import copy
import itertools
import uuid
from typing import Any

import fixtures
from lxml import etree
from nova import utils
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt.libvirt.driver import CONF
from os_brick.initiator import connector

from tests.functional import base

_DEVICE = "a device of the destination"
_NFS = {"export": "192.0.2.1:/volumes", "name": "volume-1", "options": None}
_RBD = {
    "name": "volumes/volume-1",
    "hosts": ["192.0.2.2", "192.0.2.3"],
    "ports": ["6789", "6789"],
    "cluster_name": "ceph",
    "auth_enabled": True,
    "auth_username": "cinder",
    "secret_type": "ceph",
    "secret_uuid": "457eb676-33da-42ec-9a8c-9293d545c337",
}
#: By name: what Cinder says, kind and data; the driver that reads it, and where.
READ: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "iscsi": ("iscsi", {"target_lun": 1}, "block", _DEVICE),
    "fibre_channel": ("fibre_channel", {"target_wwn": ["5005"]}, "block", _DEVICE),
    "nvme": ("nvmeof", {"target_nqn": "nqn.2016-06.io.example:1"}, "block", _DEVICE),
    "nfs": ("nfs", {**_NFS, "format": "raw"}, "block", "volume-1"),
    "nfs_of_no_format": ("nfs", dict(_NFS, name="volume-2"), "block", "volume-2"),
    "rbd": (
        "rbd",
        _RBD,
        "rbd",
        "volumes/volume-1?id=cinder&cluster=ceph&mon_host=192.0.2.2:6789,192.0.2.3:6789",
    ),
}
#: The same of those that are not read; what is said of them.
UNREAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "qcow2_on_nfs": ("nfs", {**_NFS, "format": "qcow2"}, "of format qcow2"),
    "luks": ("iscsi", {"target_lun": 1, "encrypted": True}, "is encrypted"),
    "unknown": ("fake", {}, "fake"),
}
#: Cinder's, of encrypted volumes.
_ENCRYPTION = {
    "provider": "luks",
    "control_location": "front-end",
    "cipher": "aes-xts-plain64",
    "key_size": 256,
    # The one that Nova's manager of one key has
    "encryption_key_id": "00000000-0000-0000-0000-000000000000",
}


class VolumesCase(base.MigrationTest):
    def setUp(self):
        super().setUp()
        for host in self.hosts.values():
            host.hello_changes = {"drivers": ("block", "rbd", "nbd")}
        #: Paths of each volume's devices, in the order in which they were connected.
        self.devices_of: dict[str, list[str]] = {}
        numbers = itertools.count()

        def connect(connector: Any, properties: Any, *more: Any) -> dict[str, str]:
            path = f"/dev/disk/by-path/{next(numbers)}"
            self.devices_of.setdefault(properties["volume_id"], []).append(path)
            return {"path": path}

        for each in connector.unix_connector_list:
            self.useFixture(fixtures.MonkeyPatch(f"{each}.connect_volume", connect))
        for name in ("mount", "umount"):
            self.useFixture(fixtures.MockPatch(f"nova.virt.libvirt.volume.mount.{name}"))
        self._keep_secrets()

    def _keep_secrets(self) -> None:
        """What encrypted volumes need of Cinder, of Nova's manager of keys, and of libvirt."""

        def define(connection: Any, xml: str) -> Any:
            secret = etree.fromstring(xml)
            if secret.find("uuid") is None:
                etree.SubElement(secret, "uuid").text = str(uuid.uuid4())
            return original(connection, etree.tostring(secret, encoding="unicode"))

        original = fakelibvirt.Connection.secretDefineXML
        self.useFixture(
            fixtures.MonkeyPatch("nova.tests.fixtures.libvirt.Connection.secretDefineXML", define)
        )
        self.flags(fixed_key="00" * 32, group="key_manager")
        self.useFixture(fixtures.MockPatch("os_brick.encryptors.luks.is_luks", return_value=True))
        self.useFixture(
            fixtures.MockPatch(
                "nova.volume.cinder.API.get_volume_encryption_metadata", return_value=_ENCRYPTION
            )
        )

    def with_volumes(self, *rows: Any) -> Any:
        """A server with volumes of these rows."""
        return self.make_server(
            connections=[
                {"driver_volume_type": row[0], "data": copy.deepcopy(row[1])} for row in rows
            ]
        )

    def place(self, volume: str, location: str) -> str:
        """Where the destination has it."""
        if location == _DEVICE:
            source, destination = self.devices_of[volume]
            self.assertNotEqual(source, destination)
            return destination
        if location.startswith("volume-"):
            share = utils.get_hash_str(_NFS["export"])
            return f"{CONF.libvirt.nfs_mount_point_base}/{share}/{location}"
        return location


class VolumesTest(VolumesCase):
    def test_each_that_can_be_read_is_and_no_other(self):
        # The agent has its map of the first
        server = self.with_volumes(*READ.values(), *UNREAD.values())
        self.move(server)
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))
        wanted = {
            volume[:20]: (row[2], self.place(volume, row[3]))
            for volume, row in zip(self.volumes, READ.values(), strict=False)
        }
        for host in ("src", "dest"):
            (order,) = self.hosts[host].orders
            ordered = {each.volume_id: (each.driver, each.location) for each in order.volumes}
            self.assertEqual(wanted, ordered, host)


def _test(row: Any) -> Any:
    def test(self: VolumesTest) -> None:
        server = self.with_volumes(row)
        self.move(server)
        self.assertNotIn("migrate_uri", self.calls[0])
        self.assertEqual([], self.orders)
        self.event(server)
        (summary,) = self.summaries()
        self.assertEqual("no-volumes", summary.fallback_reason)
        self.assertIn(row[2], summary.fallback_message)

    return test


for _name, _row in UNREAD.items():
    setattr(VolumesTest, f"test_alone_it_makes_an_ordinary_migration_{_name}", _test(_row))


class RequiredTest(VolumesCase):
    EXTRA_SPECS = {"dmigrate:policy": "required"}

    def test_volumes_of_which_none_can_be_read_are_refused_before_anything_is_done(self):
        server = self.with_volumes(UNREAD["luks"])
        self.migrate(server, refused=True)
        self._wait_for_migration_status(server, ["error"])
        event = self.event(server, "compute_check_can_live_migrate_destination")
        self.assertIn("nova-dmigrate is required, but no disk can be read", event["details"])
        self.assertEqual([], self.calls)
        self.assertEqual([], self.orders)
