# SPDX-License-Identifier: Apache-2.0
"""What the chapter on the host service says is what the code does; the unit file fits."""

import configparser
import shlex
from pathlib import Path

from nova_dmigrate.conf import host
from nova_dmigrate.rpc import isolation
from tests import base

ROOT = Path(__file__).parents[3]


class ChapterTest(base.TestCase):
    def test_the_commands_are_those_of_the_code(self) -> None:
        text = (ROOT / "doc/source/admin/host.rst").read_text()
        commands = [
            shlex.split(line.partition("rabbitmqctl ")[2])
            for line in text.splitlines()
            if line.strip().startswith("# rabbitmqctl ")
        ]
        user = ["add_user", "nova-dmigrate", "PASSWORD"]
        self.assertEqual([user, *isolation.service_commands("nova-dmigrate")], commands)


class UnitFileTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read(ROOT / "etc/systemd/nova-dmigrate-host.service")
        self.service = parser["Service"]
        self.defaults = {option.name: option.default for option in host.OPTIONS}

    def test_relays_survive_the_service(self) -> None:
        self.assertEqual("process", self.service["KillMode"])
        self.assertEqual("always", self.service["Restart"])
        # Their sockets, too
        self.assertEqual("yes", self.service["RuntimeDirectoryPreserve"])
        self.assertEqual("0711", self.service["RuntimeDirectoryMode"])

    def test_there_is_time_to_drain(self) -> None:
        self.assertGreater(int(self.service["TimeoutStopSec"]), self.defaults["drain_timeout"])

    def test_the_directories_are_those_of_the_options(self) -> None:
        state, sockets = self.service["StateDirectory"], self.service["RuntimeDirectory"]
        self.assertEqual(f"/var/lib/{state}", self.defaults["state_directory"])
        self.assertEqual(f"/run/{sockets}", self.defaults["socket_directory"])

    def test_what_relays_use_is_not_locked_away(self) -> None:
        chapter = (ROOT / "doc/source/admin/host.rst").read_text()
        for name in self.service["CapabilityBoundingSet"].split():
            self.assertIn(f"``{name}``", chapter)
        for family in ("AF_UNIX", "AF_INET", "AF_INET6"):
            self.assertIn(family, self.service["RestrictAddressFamilies"].split())
        self.assertEqual("block-* r", self.service["DeviceAllow"])
        for hiding in ("PrivateTmp", "PrivateDevices", "ProtectProc", "PrivateNetwork"):
            self.assertNotIn(hiding, self.service)
