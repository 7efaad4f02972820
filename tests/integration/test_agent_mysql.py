# SPDX-License-Identifier: Apache-2.0
"""The agent as a client of genuine servers: from the oldest that it knows to the newest."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

from nova_dmigrate import exception
from nova_dmigrate.agent import (
    database,
    describe,
    flushing,
    hot_pages,
    hotlist,
    hotlist_keeper,
    hotlist_server,
    ledger,
    preparation,
    processes,
    service,
)
from nova_dmigrate.rpc import messages
from tests import base
from tests.lab import chroots, databases, loop, mysql56


class AnyServer(base.TestCase):
    """What the agent asks of a server and changes in it, as a user who may do just that."""

    FLAVOUR: ClassVar[str]
    VERSION: ClassVar[tuple[int, ...]]
    socket: ClassVar[Path]
    _stack: ClassVar[contextlib.ExitStack]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(databases.available())
        with contextlib.ExitStack() as stack:
            cls.socket = stack.enter_context(cls.running())
            statements = database.grants(cls.FLAVOUR, cls.VERSION)
            mysql56.execute(
                cls.socket,
                *(statement.replace("PASSWORD", "a password") for statement in statements),
                "CREATE USER 'nobody'@'localhost' IDENTIFIED BY 'a password'",
            )
            cls._stack = stack.pop_all()

    @classmethod
    def running(cls) -> AbstractContextManager[Path]:
        """A server; the path of its socket."""
        raise NotImplementedError

    @classmethod
    def tearDownClass(cls) -> None:
        cls._stack.close()
        super().tearDownClass()

    def login(self, user: str, password: str) -> database.Login:
        uids = processes.user_ids(["mysql"])
        return database.Login(str(self.socket), user, password, uids=uids)

    def connect(self, user: str = database.DEFAULT_USER) -> database.Database:
        opened = database.connect(self.login(user, "a password"))
        self.addCleanup(opened.close)
        return opened

    def test_it_is_recognised(self) -> None:
        opened = self.connect()
        version = opened.version[: len(self.VERSION)]
        self.assertEqual((self.FLAVOUR, self.VERSION), (opened.flavour, version))
        self.assertIsNotNone(opened.pid)
        self.assertGreater(opened.pool().total, 1000)

    def test_the_documented_grants_are_enough_and_less_is_told(self) -> None:
        self.assertTrue(self.connect().may_set_globals())
        nobody = self.connect("nobody")
        self.assertFalse(nobody.may_set_globals())
        self.assertIn("no-grant", [each.code for each in describe.inspect_server(nobody)])
        error = self.assertRaises(
            exception.ServerError, nobody.set_global, flushing.CAPACITY, "300"
        )
        self.assertEqual("privilege", error.kwargs["code"])

    def test_the_grants_are_told_before_the_user_exists(self) -> None:
        directory = self.make_directory()
        configuration = directory / "agent.conf"
        configuration.write_text(
            f"[agent]\nsocket = {self.socket}\nsql_user = not_yet\nstate_directory = {directory}\n"
        )
        printed = subprocess.run(
            [sys.executable, "-m", "nova_dmigrate.cmd.agent"]
            + [f"--config-file={configuration}", "grants"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
        self.assertEqual(0, printed.returncode, printed.stderr)
        statements = database.grants(self.FLAVOUR, self.VERSION, "not_yet")
        self.assertEqual([f"{each};" for each in statements], printed.stdout.splitlines())
        mysql56.execute(self.socket, *statements)
        self.addCleanup(mysql56.execute, self.socket, "DROP USER 'not_yet'@'localhost'")
        with database.connect(self.login("not_yet", "PASSWORD")) as opened:
            self.assertTrue(opened.may_set_globals())

    def test_its_health_tells_what_it_has_done(self) -> None:
        login = self.login(database.DEFAULT_USER, "a password")
        before = describe.inspect_health(login)
        mysql56.execute(self.socket, *["COMMIT"] * 3, *["SELECT 1"] * 20)
        after = describe.inspect_health(login)
        self.assertTrue(after.healthy, after.message)
        for one, other, least in (
            (before.commits, after.commits, 3),
            (before.queries, after.queries, 23),
        ):
            assert one is not None and other is not None
            self.assertGreaterEqual(other - one, least)
        assert after.latency_ms is not None
        self.assertGreater(after.latency_ms, 0)

    def test_a_wrong_password_is_told(self) -> None:
        login = self.login(database.DEFAULT_USER, "wrong")
        error = self.assertRaises(exception.ServerError, database.connect, login)
        self.assertEqual("login", error.kwargs["code"])

    def test_settings_are_changed_and_put_back(self) -> None:
        opened = self.connect()
        before = opened.variables(flushing.ORDER)
        prepared = preparation.Preparation(
            ledger.LedgerFile(self.make_directory() / "preparation.json"),
            lambda: [opened.login],
            lambda socket: opened.login,
            database.connect,
        )
        state = prepared.prepare(messages.PrepareArguments(seconds=1))
        self.assertEqual(0, float(opened.variables(flushing.ORDER)[flushing.HIGH_WATER]))
        self.assertEqual("idle", prepared.restore(state.lease_id).state)
        self.assertEqual(before, opened.variables(flushing.ORDER))

    def test_a_list_of_hot_pages_is_kept_and_loaded(self) -> None:
        settings = service.AgentSettings(
            state_directory=self.make_directory(),
            selector=processes.Selector(socket=str(self.socket)),
            login=self.login(database.DEFAULT_USER, "a password"),
            hot_pages=hot_pages.HotPagesSettings(hotlist_keeper.ListSettings(interval=3600)),
        )
        (server,) = service.Servers(settings).find()
        before = self.connect().variables(hotlist_server.NAMES)
        path = Path(server.path("ib_buffer_pool"))
        path.unlink(missing_ok=True)
        pages = service.make_hot_pages(settings)
        pages.start()
        self.addCleanup(pages.stop)
        while not path.exists():
            time.sleep(0.1)
        with path.open("rb") as file:
            listed = hotlist.decode(file).size
        self.assertGreater(listed, 100)
        pages.warm_up()
        while pages.warm_up_state().state in messages.WARM_UP_UNFINISHED:
            time.sleep(0.1)
        state = pages.warm_up_state()
        self.assertEqual(("done", listed), (state.state, state.loaded), state.message)
        self.assertEqual(before, self.connect().variables(hotlist_server.NAMES))


@contextlib.contextmanager
def on_a_volume(make: Callable[[Path, loop.LoopVolume], databases.Server]) -> Iterator[Path]:
    with databases.running(make) as (server, _):
        yield server.socket


class MySQL56Test(AnyServer):
    FLAVOUR = "mysql"
    VERSION = (5, 6, 24)

    @classmethod
    def running(cls) -> AbstractContextManager[Path]:
        base.require(mysql56.available())
        return on_a_volume(mysql56.MySQL56)


class MySQL9Test(AnyServer):
    FLAVOUR = "mysql"
    VERSION = (9,)

    @classmethod
    def running(cls) -> AbstractContextManager[Path]:
        return on_a_volume(chroots.MySQL9)


class MariaDB105Test(AnyServer):
    FLAVOUR = "mariadb"
    VERSION = (10, 5)

    @classmethod
    def running(cls) -> AbstractContextManager[Path]:
        return on_a_volume(chroots.MariaDB105)


class MariaDB11Test(AnyServer):
    FLAVOUR = "mariadb"
    VERSION = (11, 8)

    @classmethod
    def running(cls) -> AbstractContextManager[Path]:
        return on_a_volume(chroots.MariaDB11)


# Only its subclasses have a server.
del AnyServer
