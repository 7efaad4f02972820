# SPDX-License-Identifier: Apache-2.0
"""What goes on besides in the demo's scenarios comes and goes, or the scenario has failed."""

import os
import types
from typing import Any

import fixtures

from tests import base
from tests.lab.demo import troubles
from tests.lab.demo.clients import ClientError
from tests.lab.hosts import HostPair
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
