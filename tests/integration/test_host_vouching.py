# SPDX-License-Identifier: Apache-2.0
"""The source's host vouches for volumes: a stranger's is not read, whoever names it to whom."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

from nova_dmigrate.rpc import host_messages
from tests import base
from tests.integration import host_base
from tests.lab import processes
from tests.lab.host_services import ServedPair
from tests.lab.libvirt_hosts import LibvirtHosts

#: For libvirt's hypervisor for tests, which runs whatever it is told of.
NODE = """
<node>
  <cpu><mhz>1000</mhz><model>i686</model><active>1</active><nodes>1</nodes><sockets>1</sockets>
    <cores>1</cores><threads>1</threads></cpu>
  <memory>8192000</memory>
  <domain type='test'>
    <name>database</name>
    <uuid>{uuid}</uuid>
    <memory>65536</memory>
    <vcpu>1</vcpu>
    <os><type>hvm</type></os>
    <devices>
      <disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>
        <source file='{disk}'/><target dev='vda' bus='virtio'/><serial>own</serial></disk>
    </devices>
  </domain>
</node>
"""


class VouchingTest(host_base.Hosts):
    libvirt: ClassVar[contextlib.ExitStack]
    node: ClassVar[Path]
    uri: ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        if os.geteuid():
            base.require("only root can make the lab's libvirt")
        cls.libvirt = contextlib.ExitStack()
        try:
            directory = cls.libvirt.enter_context(processes.workspace())
            hosts = cls.libvirt.enter_context(LibvirtHosts(directory))
            cls.node = directory / "node.xml"
            socket = hosts.a.outside(Path("/run/libvirt/libvirt-sock"))
            cls.uri = f"test+unix://{cls.node}?socket={socket}"
            super().setUpClass()
        except BaseException:
            cls.libvirt.close()
            raise

    @classmethod
    def tearDownClass(cls) -> None:
        super().tearDownClass()
        cls.libvirt.close()

    @classmethod
    def options(cls) -> dict[str, object]:
        return {"host__libvirt_uri": cls.uri}

    def setUp(self) -> None:
        super().setUp()
        self.own, self.strange = self.place / "own", self.place / "strange"
        for path in (self.own, self.strange):
            path.write_bytes(bytes(4096))

    def begun(self, *, instance: str | None = None, **volumes: Path) -> ServedPair:
        """The relay at the destination runs, told of these volumes, by their identifiers.

        :param instance: the only one that the source's libvirt knows; the pair's own if None.
        """
        pair = self.pair(volumes=volumes)
        self.node.write_text(NODE.format(uuid=instance or pair.order.instance, disk=self.own))
        pair.open_destination()
        pair.destination.wait("running")
        return pair

    def assert_strange(self, pair: ServedPair, name: str, path: Path) -> None:
        why = self.assert_refused("volume-not-allowed", pair.open_source)
        self.assertIn(f"volume {name} at {path}", why)
        self.assertIn(f"instance {pair.order.instance}", why)
        self.assertEqual([], self.one.relays())

    def change(self, pair: ServedPair, **changes: Any) -> None:
        """What the source is told differs from what the destination was."""
        pair.order = dataclasses.replace(pair.order, **changes)

    def test_the_guests_own_volumes_are_read(self) -> None:
        pair = self.begun(own=self.own)
        pair.open_source()
        pair.source.wait("running")
        migration = self.fake(pair)
        migration.finish()
        pair.close_sessions()
        self.assert_nothing_left()

    def test_a_strangers_volume_is_refused(self) -> None:
        self.assert_strange(self.begun(own=self.own, other=self.strange), "other", self.strange)

    def test_a_strangers_volume_under_the_name_of_an_own_one_is_refused(self) -> None:
        self.assert_strange(self.begun(own=self.strange), "own", self.strange)

    def test_a_source_that_was_told_of_others_has_no_destination(self) -> None:
        pair = self.begun(own=self.strange)
        own = host_messages.Volume("own", "block", str(self.own))
        for volumes in ((own,), ()):
            with self.subTest(volumes=volumes):
                self.change(pair, volumes=volumes)
                pair.open_source()
                self.assertIn("the token is wrong", pair.source.wait("failed").message)
                self.assertEqual("running", pair.destination.renew().state)
                pair.source.client.close_session(pair.order.session_id)

    def test_what_the_destination_has_connected_itself_is_known_by_its_identifier(self) -> None:
        elsewhere = self.place / "elsewhere"
        elsewhere.write_bytes(bytes(4096))
        pair = self.begun(own=elsewhere)
        pair.open_source(volumes_connected=True)
        pair.source.wait("running")
        pair.close_sessions()
        other = self.begun(other=elsewhere)
        self.assert_refused("volume-not-allowed", lambda: other.open_source(volumes_connected=True))

    def test_a_guest_that_libvirt_does_not_know_has_no_volumes(self) -> None:
        pair = self.begun(instance="3f6c1d0a-2f80-4c9e-8a3e-1f2f0f6d1c11", own=self.own)
        why = self.assert_refused("disks-unknown", pair.open_source)
        self.assertIn(pair.order.instance, why)
