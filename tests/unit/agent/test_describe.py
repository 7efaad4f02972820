# SPDX-License-Identifier: Apache-2.0
"""What the agent says of its guest."""

from __future__ import annotations

from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.agent import describe
from nova_dmigrate.agent.database import Login
from nova_dmigrate.agent.processes import ServerProcess
from nova_dmigrate.findings import Severity
from nova_dmigrate.rpc import fields, messages
from tests import base
from tests.unit.agent.fakes import FakeDatabase, FakeServer


class Described(FakeDatabase):
    grants = True
    settings = {"innodb_flush_method": "O_DIRECT", "innodb_buffer_pool_size": "33554432"}
    server_version = "8.0.36"

    def may_set_globals(self) -> bool:
        return self.grants

    def variables(self, names: Any) -> dict[str, str]:
        return {name: self.settings[name] for name in names if name in self.settings}

    def __enter__(self) -> Described:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def process(socket: str | None = "/run/one.sock") -> ServerProcess:
    return ServerProcess(1, 1, "/usr/sbin/mysqld", "/var/lib/mysql", "/", socket, 0)


def login(server: ServerProcess) -> Login | None:
    return None if server.socket is None else Login(server.socket)


class DescribeTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.server = FakeServer()
        self.made: type[Described] = type("Mine", (Described,), {})

    def inspect(self, *processes: ServerProcess) -> describe.Inspection:
        return describe.inspect(
            lambda: processes,
            login,
            lambda login: self.made(self.server, login),  # type: ignore[arg-type, return-value]
        )

    def codes(self, inspection: describe.Inspection) -> set[str]:
        return {each.code for each in inspection.findings if each.severity is not Severity.OK}

    def test_a_server_that_is_all_right_is_described(self) -> None:
        inspection = self.inspect(process())
        (server,) = inspection.servers
        self.assertEqual(
            (32 << 20, 16384, 0.5, 0.5),
            (
                server.pool_bytes,
                server.page_bytes,
                server.filled_share,
                server.dirty_share,
            ),
        )
        self.assertEqual(set(), self.codes(inspection) - {"no-capability"})
        self.assertAlmostEqual(500 * 16384 / inspection.memory_bytes, inspection.expected_share)
        self.assertEqual(0, self.server.connections)

    def test_the_description_passes_the_checks_of_the_other_side(self) -> None:
        told = fields.to_dict(self.inspect(process()).to_message())
        self.assertEqual("mysql", fields.parse(messages.Description, told).servers[0].flavour)

    def test_a_missing_privilege_is_a_finding_with_the_statement_that_helps(self) -> None:
        self.made.grants = False
        inspection = self.inspect(process())
        (found,) = [each for each in inspection.findings if each.code == "no-grant"]
        self.assertIn("GRANT SYSTEM_VARIABLES_ADMIN ON *.* TO", found.message)

    def test_a_server_that_writes_through_the_page_cache_is_noted(self) -> None:
        for settings, noted in (
            ({"innodb_flush_method": "fsync"}, True),
            ({"innodb_flush_method": ""}, True),
            ({"innodb_flush_method": "O_DIRECT_NO_FSYNC"}, False),
            ({"innodb_flush_method": "O_DIRECT", "innodb_data_file_buffering": "OFF"}, False),
            ({"innodb_flush_method": "O_DIRECT", "innodb_data_file_buffering": "ON"}, True),
        ):
            self.made.settings = settings
            self.assertIs(noted, "not-o-direct" in self.codes(self.inspect(process())), settings)

    def test_troubles_are_findings(self) -> None:
        def nothing() -> list[ServerProcess]:
            raise exception.ServerNotFound(reason="none runs here")

        self.assertIn("no-server", self.codes(describe.inspect(nothing, login)))
        self.assertIn("no-socket", self.codes(self.inspect(process(socket=None))))

        def refused(login: Login) -> Any:
            raise exception.ServerError(server="x", reason="denied", code="login")

        found = describe.inspect(lambda: [process()], login, refused)
        self.assertIn("no-login", self.codes(found))

        def nowhere(server: ServerProcess) -> Login:
            raise exception.ServerError(server="x", reason="links in a circle", code="gone")

        self.assertIn("no-answer", self.codes(describe.inspect(lambda: [process()], nowhere)))

    def test_each_missing_capability_is_told_with_its_purpose(self) -> None:
        self.assertEqual([], describe.missing_capabilities("CapEff:\t000001ffffffffff\n"))
        found = describe.missing_capabilities("Name:\tx\nCapEff:\t00000000000800c4\n")
        self.assertEqual(1, len(found))
        self.assertIn("CAP_SYS_ADMIN", found[0].message)
        self.assertEqual(5, len(describe.missing_capabilities("")))

    def test_health_tells_of_a_server_that_does_not_answer(self) -> None:
        def refused(login: Login) -> Any:
            raise exception.ServerError(server="x", reason="refused", code="gone")

        health = describe.inspect_health(Login("/run/one.sock"), refused)
        self.assertEqual((False, None), (health.healthy, health.uptime))
        self.assertIn("refused", health.message)
        well = describe.inspect_health(
            Login("/run/one.sock"),
            lambda login: self.made(self.server, login),  # type: ignore[arg-type, return-value]
        )
        self.assertEqual((True, 1000.0, 0.5), (well.healthy, well.uptime, well.dirty_share))
        self.assertEqual((7, 90, 1.5), (well.commits, well.queries, well.latency_ms))
