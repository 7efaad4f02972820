# SPDX-License-Identifier: Apache-2.0
"""What goes on besides in the demo's scenarios comes and goes, or the scenario has failed."""

import contextlib
import os
import shutil
import types
from pathlib import Path
from typing import Any

import fixtures

from tests import base
from tests.lab.demo import remote_volume, troubles
from tests.lab.demo.clients import ClientError
from tests.lab.hosts import HostPair
from tests.lab.image import create_disk
from tests.lab.processes import inmates
from tests.lab.relays import wait_until

#: MB/s of the network.
_NETWORK = 2.0


class TroublesTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        base.require("only root can make the lab's hosts" if os.geteuid() else None)
        self.link = HostPair()
        self.addCleanup(self.link.close)
        # Until the end, so that a busy machine does not miss it
        self.useFixture(fixtures.MonkeyPatch("tests.lab.demo.troubles.STAYS", 600))

    def stage(self, network: float = _NETWORK) -> Any:
        """What troubles need of one: its hosts, and where its guest is."""
        a, b = self.link.a, self.link.b
        hosts = types.SimpleNamespace(
            link=self.link,
            other=lambda host: b if host is a else a,
            shape=lambda rate: self.link.shape(rate * 1e6),
        )
        guest = types.SimpleNamespace(domain=types.SimpleNamespace(host=a))
        return types.SimpleNamespace(
            hosts=hosts, guests=[guest], shape=types.SimpleNamespace(network=network)
        )

    def limits(self) -> list[str]:
        """What the network carries at this moment, as the kernel tells it."""
        show = ["tc", "qdisc", "show", "dev", "eth0", "root"]
        return [each.run(show).stdout for each in (self.link.a, self.link.b)]

    def test_a_network_gets_narrow_when_so_much_was_sent_and_wide_again(self) -> None:
        stage = self.stage()
        stage.hosts.shape(_NETWORK)
        wide = self.limits()
        with troubles.background_traffic(stage), troubles.narrow_network(stage):
            wait_until(lambda: self.limits() != wide, "it is narrow")
            self.assertIn("rate 3200Kbit", self.limits()[0])
        self.assertEqual(wide, self.limits())

    def test_a_trouble_that_never_comes_is_told(self) -> None:
        narrow = troubles.narrow_network(self.stage())
        narrow.__enter__()
        error = self.assertRaises(ClientError, narrow.__exit__, None, None, None)
        self.assertIn("never came", str(error))

    def test_a_trouble_that_cannot_be_made_is_told(self) -> None:
        # A network that carries nothing at all
        narrow = troubles.narrow_network(self.stage(network=0.0))
        narrow.__enter__()
        error = self.assertRaises(ClientError, narrow.__exit__, None, None, None)
        self.assertIn("did not come", str(error))

    def test_traffic_that_ends_by_itself_is_told(self) -> None:
        traffic = troubles.background_traffic(self.stage())
        traffic.__enter__()
        sender = wait_until(lambda: list(inmates(self.link.a.namespace)), "somebody sends")
        os.kill(sender[0], 9)
        wait_until(lambda: not inmates(self.link.a.namespace), "nobody sends")
        error = self.assertRaises(ClientError, traffic.__exit__, None, None, None)
        self.assertIn("ended by itself", str(error))
        self.assertEqual({}, inmates(self.link.b.namespace))

    def remote(self, server: str) -> tuple[Any, Path]:
        """A stage, and where its guest has its volume at the destination.

        :param server: what the shell does before what serves the volume starts.
        """
        directory = self.make_directory()
        program = shutil.which("qemu-storage-daemon")
        base.require(None if program else "there is no qemu-storage-daemon")
        own = directory / "bin" / "qemu-storage-daemon"
        own.parent.mkdir()
        own.write_text(
            f'#!/bin/sh\ncase "$*" in *nbd-server*) {server} ;; esac\nexec {program} "$@"\n'
        )
        own.chmod(0o755)
        self.useFixture(fixtures.EnvironmentVariable("PATH", f"{own.parent}:{os.environ['PATH']}"))
        stage = self.stage()
        domain = stage.guests[0].domain
        domain.spec = types.SimpleNamespace(disk=create_disk(directory / "volume.raw", 4))
        domain.volume = directory / "device"
        domain.volume.touch()
        stage.storage = contextlib.ExitStack()
        self.addCleanup(stage.storage.close)
        return stage, domain.volume

    def test_a_volume_is_there_over_the_link_however_late_it_is_served(self) -> None:
        stage, volume = self.remote("sleep 2")
        disk = stage.guests[0].domain.spec.disk
        with remote_volume.shared_link(stage):
            self.assertTrue(volume.is_block_device())
            self.assertEqual(disk.read_bytes(), volume.read_bytes())
            with open(volume, "r+b", buffering=0) as device:
                device.write(b"anew")
                os.fsync(device.fileno())
            self.assertEqual(b"anew", disk.read_bytes()[:4])
        self.assertTrue(volume.is_file())

    def test_a_volume_that_nobody_serves_is_told(self) -> None:
        stage, _ = self.remote("exit 1")
        link = remote_volume.shared_link(stage)
        error = self.assertRaises(ClientError, link.__enter__)
        self.assertIn("has ended before the volume is served", str(error))
        self.assertEqual({}, inmates(self.link.b.namespace))
