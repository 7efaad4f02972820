# SPDX-License-Identifier: Apache-2.0
"""What the security chapter says is what the code does; the unit file allows what it needs."""

import configparser
import shlex
from pathlib import Path

from nova_dmigrate.agent import database, describe
from nova_dmigrate.conf import buffer_map
from nova_dmigrate.rpc import isolation
from tests import base

ROOT = Path(__file__).parents[3]
INSTANCE = "01234567-89ab-cdef-0123-456789abcdef"


class SecurityChapterTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.text = (ROOT / "doc/source/admin/security.rst").read_text()

    def commands(self) -> list[list[str]]:
        return [
            shlex.split(line.partition("rabbitmqctl ")[2].replace("UUID", INSTANCE))
            for line in self.text.splitlines()
            if line.strip().startswith("# rabbitmqctl ")
        ]

    def test_the_commands_are_those_of_the_code(self) -> None:
        expected = isolation.commands(INSTANCE, "PASSWORD", "nova-dmigrate")
        self.assertEqual(expected + isolation.removal(INSTANCE), self.commands())

    def test_the_table_of_permissions_is_that_of_the_code(self) -> None:
        for permissions in (isolation.GUEST, isolation.HOST):
            for pattern in vars(permissions).values():
                self.assertIn(f"``{pattern}``", self.text)

    def test_the_statements_are_those_of_the_code(self) -> None:
        for flavour, version in (("mysql", (8, 0)), ("mysql", (5, 6)), ("mariadb", (10, 11))):
            statements = [f"   {each};" for each in database.grants(flavour, version)]
            self.assertIn("\n".join(statements), self.text)


class UnitFileTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read(ROOT / "etc/systemd/nova-dmigrate-agent.service")
        self.service = parser["Service"]

    def test_the_capabilities_are_those_that_the_agent_looks_for(self) -> None:
        granted = set(self.service["CapabilityBoundingSet"].split())
        self.assertEqual(set(describe._CAPABILITIES), granted)
        security = (ROOT / "doc/source/admin/security.rst").read_text()
        for name in granted:
            self.assertIn(f"``{name}``", security)

    def test_the_largest_map_that_hosts_take_fits(self) -> None:
        allowed = {"M": 20, "G": 30}
        limit = self.service["MemoryMax"]
        bytes_allowed = int(limit[:-1]) << allowed[limit[-1]]
        pages = {option.name: option.default for option in buffer_map.OPTIONS}["max_pages"]
        # As measured (scale.rst): 24 bytes a frame of 16 KiB, and the program's 75 MB; twice that
        self.assertGreater(bytes_allowed, 2 * (24 * pages // 4 + 75_000_000))

    def test_a_dead_agent_comes_back_and_a_stopped_one_has_time_to_restore(self) -> None:
        self.assertEqual("always", self.service["Restart"])
        self.assertGreaterEqual(int(self.service["TimeoutStopSec"]), 30)
        self.assertTrue(self.service["ExecStart"].endswith("nova-dmigrate-agent serve"))

    def test_what_the_agent_uses_is_not_locked_away(self) -> None:
        for family in ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"):
            self.assertIn(family, self.service["RestrictAddressFamilies"].split())
        self.assertIn("process_vm_readv", self.service["SystemCallFilter"].split())
        for hiding in ("PrivateTmp", "PrivateUsers", "ProtectProc", "PrivateNetwork"):
            self.assertNotIn(hiding, self.service)
