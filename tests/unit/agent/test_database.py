# SPDX-License-Identifier: Apache-2.0
"""What of a database server can be said without one."""

import os
import socket
import threading

import pymysql

from nova_dmigrate import exception
from nova_dmigrate.agent import database, flushing
from nova_dmigrate.agent.database import PoolStatus
from tests import base
from tests.unit.agent.fakes import DEFAULTS


class Cursor:
    """Answers by the beginning of the statement."""

    def __init__(self, answers, said) -> None:  # type: ignore[no-untyped-def]
        self._answers, self._said, self._rows = answers, said, []

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def execute(self, statement: str, arguments: object = None) -> None:
        self._said.append(statement)
        for beginning, rows in self._answers.items():
            if statement.startswith(beginning):
                if isinstance(rows, Exception):
                    raise rows
                self._rows = rows
                return
        self._rows = []

    def fetchall(self):  # type: ignore[no-untyped-def]
        return self._rows


class Connection:
    def __init__(self, answers, version: str = "8.0.36") -> None:  # type: ignore[no-untyped-def]
        self.answers = {"SELECT @@version_comment": [("Source", version)], **answers}
        self.said: list[str] = []
        self.version = version

    def cursor(self):  # type: ignore[no-untyped-def]
        return Cursor(self.answers, self.said)

    def get_server_info(self) -> str:
        return self.version


def open_database(answers, version: str = "8.0.36") -> database.Database:  # type: ignore[no-untyped-def]
    return database.Database(database.Login("/run/x.sock"), Connection(answers, version))


class GreetingTest(base.TestCase):
    """What listens at a socket need not be a database server."""

    def greet(self, said: bytes) -> tuple[str, tuple[int, int, int]]:
        path = str(self.make_directory() / "server.sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen(1)

            def answer() -> None:
                with listener.accept()[0] as connection:
                    connection.sendall(said)

            thread = threading.Thread(target=answer)
            thread.start()
            self.addCleanup(thread.join)
            return database.greet(database.Login(path, uids=frozenset((os.getuid(),))))

    def test_a_server_tells_what_it_is_before_any_login(self) -> None:
        said = b"\x4a\0\0\0\x0a8.0.36-0ubuntu\0rest"
        self.assertEqual(("mysql", (8, 0, 36)), self.greet(said))

    def test_anything_else_is_an_error(self) -> None:
        for said in (b"", b"220 ESMTP", b"\x4a\0\0\0\x0a", b"\x10\0\0\0\xff\x10\x04"):
            error = self.assertRaises(exception.ServerError, self.greet, said)
            self.assertIn("does not greet", str(error))
        login = database.Login("/nonexistent/server.sock")
        error = self.assertRaises(exception.ServerError, database.greet, login)
        self.assertEqual("gone", error.kwargs["code"])


class VersionTest(base.TestCase):
    def test_flavour_and_version_are_read_from_what_servers_call_themselves(self) -> None:
        for text, expected in {
            "5.6.24": ("mysql", (5, 6, 24)),
            "5.7.44-log": ("mysql", (5, 7, 44)),
            "8.0.36-0ubuntu0.22.04.1": ("mysql", (8, 0, 36)),
            "9.7.0 MySQL Community Server - GPL": ("mysql", (9, 7, 0)),
            "8.0.35-27 Percona Server": ("mysql", (8, 0, 35)),
            "10.5.22-MariaDB": ("mariadb", (10, 5, 22)),
            "5.5.5-10.11.6-MariaDB-0+deb12u1": ("mariadb", (10, 11, 6)),
            "11.8.2-MariaDB-log": ("mariadb", (11, 8, 2)),
            "5.7": ("mysql", (5, 7, 0)),
            "nonsense": ("mysql", (0, 0, 0)),
        }.items():
            self.assertEqual(expected, database.parse_version(text), text)

    def test_each_flavour_gets_the_finest_privilege_that_it_knows(self) -> None:
        for (flavour, version), privilege in {
            ("mysql", (5, 6, 24)): "SUPER",
            ("mysql", (5, 7, 1)): "SUPER",
            ("mysql", (8, 0, 36)): "SYSTEM_VARIABLES_ADMIN",
            ("mysql", (9, 7, 0)): "SYSTEM_VARIABLES_ADMIN",
            ("mariadb", (10, 5, 1)): "SUPER",
            ("mariadb", (11, 8, 2)): "SUPER",
        }.items():
            statements = database.grants(flavour, version)
            self.assertIn(f"GRANT {privilege} ON *.* TO 'nova_dmigrate'@'localhost'", statements[1])
        self.assertRaises(ValueError, database.grants, "mysql", (8, 0, 1), "x'; DROP")


class DatabaseTest(base.TestCase):
    def test_only_numbers_and_names_of_variables_become_statements(self) -> None:
        opened = open_database({})
        opened.set_global("innodb_io_capacity", "400")
        opened.set_global("innodb_max_dirty_pages_pct", "90.000000")
        opened.set_global("innodb_max_dirty_pages_pct", "0.5")
        self.assertEqual(
            [
                "SET GLOBAL innodb_io_capacity = 400",
                "SET GLOBAL innodb_max_dirty_pages_pct = 90",
                "SET GLOBAL innodb_max_dirty_pages_pct = 0.500000",
            ],
            opened._connection.said[1:],
        )
        self.assertRaises(ValueError, opened.set_global, "x = 1, y", "1")
        self.assertRaises(ValueError, opened.set_global, "innodb_io_capacity", "1; DROP")

    def test_a_refusal_for_want_of_a_privilege_is_told_from_others(self) -> None:
        for number, code in {
            1227: "privilege",
            1045: "login",
            2013: "gone",
            1193: "failed",
        }.items():
            error = pymysql.err.OperationalError(number, "a sentence")
            opened = open_database({"SET GLOBAL": error})
            raised = self.assertRaises(
                exception.ServerError, opened.set_global, "innodb_io_capacity", "1"
            )
            self.assertEqual(code, raised.kwargs["code"])
            self.assertIn("/run/x.sock: a sentence", str(raised))

    def test_a_server_that_is_not_there_is_a_server_error(self) -> None:
        login = database.Login(str(self.make_directory() / "nothing.sock"))
        error = self.assertRaises(exception.ServerError, database.connect, login)
        self.assertEqual("gone", error.kwargs["code"])

    def test_own_grants_tell_whether_settings_can_be_changed(self) -> None:
        for grant, expected in {
            "GRANT SUPER ON *.* TO `nova_dmigrate`@`localhost`": True,
            "GRANT USAGE ON *.* TO `nova_dmigrate`@`localhost`": False,
            "GRANT SYSTEM_VARIABLES_ADMIN ON *.* TO `u`@`localhost`": True,
            "GRANT SELECT, SUPER, PROCESS ON *.* TO `u`@`localhost`": True,
            "GRANT PROCESS, SELECT ON *.* TO `super`@`localhost`": False,
            "GRANT ALL PRIVILEGES ON *.* TO 'root'@'localhost' WITH GRANT OPTION": True,
        }.items():
            opened = open_database({"SHOW GRANTS": [(grant,)]})
            self.assertIs(expected, opened.may_set_globals(), grant)

    def test_without_innodbs_status_there_is_no_pool(self) -> None:
        error = self.assertRaises(exception.ServerError, open_database({}).pool)
        self.assertIn("InnoDB", str(error))

    def test_status_is_read_by_name_whatever_its_case(self) -> None:
        rows = [
            ("innodb_page_size", "16384"),
            ("INNODB_BUFFER_POOL_PAGES_TOTAL", "100"),
            ("Innodb_buffer_pool_pages_data", "50"),
            ("Innodb_buffer_pool_pages_dirty", "5"),
            ("Something", "1"),
        ]
        pool = open_database({"SHOW GLOBAL STATUS": rows}).pool()
        self.assertEqual(PoolStatus(16384, 100, 50, 5), pool)
        self.assertEqual((0.1, 0.5), (pool.dirty_share, pool.filled_share))


class PlanTest(base.TestCase):
    def test_no_change_clamps_another_in_the_order_in_which_they_are_made(self) -> None:
        pool = PoolStatus(16384, 100000, 90000, 80000)
        for kind, values in DEFAULTS.items():
            names = dict(zip(flushing.ORDER, values))
            variables = {name: value for name, value in names.items() if value is not None}
            plan = flushing.plan(variables, pool, 10, 1 << 30)
            order = [name for name in flushing.ORDER if name in plan]
            self.assertEqual(order, list(plan), kind)
            after = {**variables, **plan}
            self.assertLessEqual(int(after[flushing.CAPACITY]), int(after[flushing.CAPACITY_MAX]))

    def test_what_is_right_already_is_not_changed(self) -> None:
        variables = {flushing.LOW_WATER: "0.000000", flushing.HIGH_WATER: "0.000000"}
        self.assertEqual({}, flushing.plan(variables, PoolStatus(16384, 9, 9, 9), 1, 1))
