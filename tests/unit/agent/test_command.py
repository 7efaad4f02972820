# SPDX-License-Identifier: Apache-2.0
"""nova-dmigrate-agent: what it prints, and its exit status."""

import contextlib
import io
import json
from typing import Any

import fixtures
import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.agent import describe, maps
from nova_dmigrate.buffermap import BufferMap, MapLimits, VolumeExtents
from nova_dmigrate.cmd import agent
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.rpc import messages
from tests import base
from tests.unit.agent.fakes import FakeServerMap

SERVER = messages.Server("/var/lib/mysql", "mysql", "8.0.36", 1 << 30, 16384, 0.97, 0.031)
WELL = Finding("may-prepare", Severity.OK, "it can be prepared")
TROUBLE = Finding("no-grant", Severity.PROBLEM, "it cannot be prepared")


def make_map() -> BufferMap:
    pages = np.arange(512, dtype=np.uint64) * 4096
    extents = VolumeExtents("a-volume", 1 << 30, pages, pages, np.full(512, 4096))
    return BufferMap.build([extents])


class CommandTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        directory = self.make_directory()
        self.file = directory / "agent.conf"
        self.file.write_text(f"[agent]\nstate_directory = {directory / 'state'}\n")
        self.findings: tuple[Finding, ...] = (WELL,)
        self.built: Any = make_map()
        self.of_the_map = Finding("a-note", Severity.NOTE, "something")
        self.patch("nova_dmigrate.agent.describe.inspect", self.inspect)
        self.patch("nova_dmigrate.agent.service.Servers.build_map", lambda _: self.build())
        self.patch("nova_dmigrate.cmd.agent._set_up_logging", lambda *_, **__: None)

    def patch(self, name: str, value: Any) -> None:
        self.useFixture(fixtures.MonkeyPatch(name, value))

    def inspect(self, *_: object) -> describe.Inspection:
        return describe.Inspection((SERVER,), self.findings, 4 << 20, 0.5)

    def build(self) -> Any:
        if isinstance(self.built, Exception):
            raise self.built
        return maps.GuestMap([FakeServerMap([self.built], [self.of_the_map])])

    def run_command(self, *arguments: str) -> tuple[int, str]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = agent.main(["--config-file", str(self.file), *arguments])
        return status, printed.getvalue()

    def test_check_tells_the_share_and_the_findings(self) -> None:
        status, text = self.run_command("check")
        self.assertEqual(0, status, text)
        self.assertIn("mysql 8.0.36 in /var/lib/mysql: pool 1024 MiB, 97% filled, 3.1%", text)
        self.assertIn("50% of the guest's memory", text)
        self.assertIn("ok: it can be prepared [may-prepare]", text)
        self.assertIn("note: something [a-note]", text)

    def test_check_fails_when_something_is_missing(self) -> None:
        self.findings = (WELL, TROUBLE)
        status, text = self.run_command("check", "--no-map")
        self.assertEqual(1, status)
        self.assertIn("PROBLEM: it cannot be prepared [no-grant]", text)
        self.findings = (WELL,)
        self.built = exception.ServerNotFound(reason="none runs here")
        status, text = self.run_command("check", "--json")
        self.assertEqual(1, status)
        codes = [found["code"] for found in json.loads(text)["findings"]]
        self.assertEqual(["may-prepare", "no-map"], codes)

    def test_map_tells_what_is_in_it_and_writes_it(self) -> None:
        file = self.make_directory() / "map"
        status, text = self.run_command("map", "--summary", "--output", str(file))
        self.assertEqual(0, status, text)
        self.assertIn("volume a-volume: 512 guest pages", text)
        self.assertEqual(512, BufferMap.load(file, MapLimits()).page_count)
        told = json.loads(self.run_command("map", "--json")[1])
        self.assertEqual((512, {"a-volume": 512}), (told["pages"], told["volumes"]))

    def test_map_fails_with_the_reason_when_there_is_a_problem(self) -> None:
        self.of_the_map = Finding("nothing-mapped", Severity.PROBLEM, "nothing can be read")
        status, text = self.run_command("map")
        self.assertEqual(1, status)
        self.assertIn("PROBLEM: nothing can be read [nothing-mapped]", text)
        self.assertEqual(1, self.run_command("map", "--json")[0])

    def test_grants_without_a_server_tell_why(self) -> None:
        self.patch("nova_dmigrate.agent.service.Servers.logins", lambda _: [])
        status, text = self.run_command("grants")
        self.assertEqual(1, status)
        self.assertIn("no server tells its version (none has a socket): name it with", text)

    def test_grants_are_printed_for_a_named_version(self) -> None:
        status, text = self.run_command("grants", "--flavour", "mysql", "--version", "5.7")
        self.assertEqual(0, status)
        self.assertIn("GRANT SUPER ON *.* TO 'nova_dmigrate'@'localhost'", text)

    def test_grants_for_a_version_that_is_none_are_wrong_usage(self) -> None:
        for version in ("banana", "8", "8.banana", "", "8.0banana"):
            status, text = self.run_command("grants", "--flavour", "mysql", "--version", version)
            self.assertEqual(2, status, version)
            self.assertIn(f"{version!r} is no version such as 5.7", text)
        for version in ("10.11.6-MariaDB-0+deb12u1", "10.5"):
            arguments = ("grants", "--flavour", "mariadb", "--version", version)
            self.assertEqual(0, self.run_command(*arguments)[0], version)
        status, text = self.run_command("grants", "--version", "8.0")
        self.assertEqual(2, status)
        self.assertIn("--version is of use with --flavour alone", text)

    def test_the_accounts_of_servers_are_those_of_the_configuration(self) -> None:
        config = agent.make_config(["check"], [str(self.file)])
        self.assertEqual(("mysql",), agent.settings_from(config).selector.users)
        self.file.write_text("[agent]\nserver_users = mysql, 999\n")
        config = agent.make_config(["check"], [str(self.file)])
        self.assertEqual(("mysql", "999"), agent.settings_from(config).selector.users)

    def test_restore_without_anything_to_restore_is_well(self) -> None:
        status, text = self.run_command("restore")
        self.assertEqual((0, "nothing of this lease is changed\n"), (status, text))

    def test_a_lost_ledger_is_trouble_as_long_as_it_is_there(self) -> None:
        state = self.file.parent / "state"
        state.mkdir()
        (state / "preparation.json").write_text("{")
        aside = state / "preparation.unreadable-1"
        for _ in range(2):
            status, text = self.run_command("restore")
            self.assertEqual(1, status)
            self.assertIn(str(aside), text)
        status, text = self.run_command("check", "--no-map")
        self.assertEqual(1, status)
        self.assertIn("[lost-ledger]", text)
        aside.unlink()
        self.assertEqual(0, self.run_command("restore")[0])
        self.assertEqual(0, self.run_command("check", "--no-map")[0])

    def test_wrong_usage_and_wrong_configuration_are_told_apart_from_trouble(self) -> None:
        for arguments in (["nonsense"], [], ["check", "--nonsense"]):
            self.assertEqual(2, self.run_command(*arguments)[0], arguments)
        self.file.write_text("[agent]\nsql_password_file = /nonexistent\n")
        status, text = self.run_command("check")
        self.assertEqual(2, status)
        self.assertIn("sql_password_file", text)
        self.file.write_text("[agent]\nmax_lease = 0\n")
        self.assertEqual(2, self.run_command("check")[0])

    def test_an_instance_that_is_no_uuid_is_wrong_configuration(self) -> None:
        self.file.write_text("[agent]\ninstance = mine\n")
        status, text = self.run_command("serve")
        self.assertEqual(2, status)
        self.assertIn("[agent]instance", text)
