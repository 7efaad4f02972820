# SPDX-License-Identifier: Apache-2.0
"""Any user of a guest can start a process that looks like a database server.

It gets no password, and what it does harms no genuine server beside it.
"""

import contextlib
import os
import pwd
import socket
import time
from collections.abc import Sequence
from typing import ClassVar

import fixtures

from nova_dmigrate import exception
from nova_dmigrate.agent import database, flushing, options, processes, service
from nova_dmigrate.rpc import messages
from tests import base
from tests.lab import databases, impostor, mysql56

PASSWORD = "a secret that nobody may know"
UID = pwd.getpwnam(impostor.USER).pw_uid
BOTH = ("mysql", impostor.USER)


class ImpostorTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        base.require(None if os.geteuid() == 0 else "needs root")

    def start(self, how: str, prefix: Sequence[str] = ()) -> impostor.Impostor:
        context = impostor.running(self.make_directory(), how, prefix)
        self.addCleanup(context.__exit__, None, None, None)
        return context.__enter__()

    def login(self, found: impostor.Impostor, *uids: int) -> exception.ServerError:
        login = database.Login(str(found.socket), password=PASSWORD, uids=frozenset(uids))
        return self.assertRaises(exception.ServerError, database.connect, login)

    def test_it_is_not_taken_for_a_server_and_the_operator_is_told(self) -> None:
        found = self.start("mysql_clear_password")
        selector = processes.Selector(pid=found.pid)
        error = self.assertRaises(exception.ServerNotFound, processes.find_servers, selector)
        self.assertIn(
            f"process {found.pid} looks like a server but runs as user nobody", str(error)
        )
        self.assertIn("[agent]server_users", str(error))

    def test_a_server_of_a_named_user_is_found(self) -> None:
        found = self.start("mysql_clear_password")
        for user in (impostor.USER, str(UID)):
            selector = processes.Selector(pid=found.pid, users=("no-such-user", user))
            (server,) = processes.find_servers(selector)
            self.assertEqual((UID, str(found.socket)), (server.uid, server.socket))

    def test_a_user_namespace_makes_it_nobody_else(self) -> None:
        # Within, it is root
        found = self.start("mysql_clear_password", ["unshare", "--user", "--map-root-user"])
        selector = processes.Selector(pid=found.pid, users=("mysql", "root"))
        error = self.assertRaises(exception.ServerNotFound, processes.find_servers, selector)
        self.assertIn("runs as user nobody", str(error))
        self.assertEqual("login", self.login(found).kwargs["code"])

    def test_nothing_is_said_to_who_listens_in_a_servers_place(self) -> None:
        found = self.start("mysql_clear_password")
        error = self.login(found, UID + 1)
        self.assertEqual("login", error.kwargs["code"])
        self.assertIn(f"user {UID} listens there", str(error))
        self.assertEqual(b"", found.told())
        login = database.Login(str(found.socket), password=PASSWORD)
        self.assertRaises(exception.ServerError, database.greet, login)
        self.assertEqual(b"", found.told())

    def test_no_server_gets_the_password_in_the_clear(self) -> None:
        for plugin in ("mysql_clear_password", "dialog"):
            found = self.start(plugin)
            error = self.login(found, UID)
            self.assertIn("asks for the password in the clear", str(error))
            told = found.told()
            self.assertIn(database.DEFAULT_USER.encode(), told)
            self.assertNotIn(PASSWORD.encode(), told)

    def test_a_way_of_links_that_leads_to_itself_is_an_error_of_that_server(self) -> None:
        found = self.start("loop")
        (server,) = processes.find_servers(processes.Selector(pid=found.pid, users=BOTH))
        error = self.assertRaises(exception.ServerError, getattr, server, "socket_path")
        self.assertIn(str(found.socket), str(error))

    def test_socket_activation_by_root_is_no_impostor(self) -> None:
        path = str(self.make_directory() / "server.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            reached = database._reach(database.Login(path, uids=frozenset((UID,))))
            reached.close()


class BesideTest(base.TestCase):
    """A genuine server, and beside it one under a named account that does all it can."""

    server: ClassVar[databases.MariaDB]
    volume: ClassVar[databases.LoopVolume]
    _stack: ClassVar[contextlib.ExitStack]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(databases.available())
        with contextlib.ExitStack() as stack:
            cls.server, cls.volume = stack.enter_context(databases.mariadb())
            cls.server.fill(tables=1, rows=50000)
            cls.server.flush()
            mysql56.execute(
                cls.server.socket,
                *(
                    statement.replace("PASSWORD", PASSWORD)
                    for statement in database.grants("mariadb", (10, 11))
                ),
            )
            cls._stack = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls._stack.close()
        super().tearDownClass()

    def agent(self, *pids: int) -> service.AgentService:
        """An agent to which no other processes exist: other tests may have servers of their own."""
        real = processes.find_servers

        def find(selector: processes.Selector) -> list[processes.ServerProcess]:
            return [server for server in real(selector) if server.pid in pids]

        self.useFixture(fixtures.MonkeyPatch("nova_dmigrate.agent.processes.find_servers", find))
        settings = service.AgentSettings(
            self.make_directory() / "state",
            processes.Selector(users=BOTH),
            database.Login("", password=PASSWORD, timeout=5),
            mapping=options.MapOptions(volume_names={self.volume.name: "a-volume"}),
        )
        made = service.AgentService(settings)
        self.addCleanup(made.preparation.restore)
        return made

    def start(self, how: str) -> impostor.Impostor:
        context = impostor.running(self.make_directory(), how)
        self.addCleanup(context.__exit__, None, None, None)
        return context.__enter__()

    def settings(self) -> list[str]:
        names = ", ".join(f"@@{name}" for name in (flushing.CAPACITY, flushing.HIGH_WATER))
        return self.server.sql(f"SELECT {names}").split()

    def check(self, agent: service.AgentService) -> None:
        """Everything that the agent does comes to pass in the genuine server."""
        nothing = messages.Nothing()
        before = self.settings()
        described = agent.describe(nothing)
        self.assertEqual(["mariadb"], [each.flavour for each in described.servers])
        self.assertIn(True, [each.healthy for each in agent.health(nothing).servers])
        state = agent.prepare(messages.PrepareArguments(seconds=1, lease_seconds=60))
        self.assertNotEqual(before, self.settings())
        self.assertEqual("idle", agent.restore(messages.LeaseArguments(state.lease_id)).state)
        self.assertEqual(before, self.settings())
        agent.prepare(messages.PrepareArguments(seconds=1, lease_seconds=1))
        end = time.monotonic() + 30
        while agent.preparation.active and time.monotonic() < end:
            time.sleep(0.2)
            agent.tick()
        self.assertEqual(before, self.settings())
        self.assertNotIn("Trouble", self.log.output)
        built = agent._servers.build_map()
        built.run()
        self.assertGreater(built.pages["a-volume"], 1000)

    def test_a_socket_that_leads_to_itself(self) -> None:
        found = self.start("loop")
        agent = self.agent(self.server.pid, found.pid)
        self.check(agent)
        self.assertIn(
            "no-answer", [each.code for each in agent.describe(messages.Nothing()).findings]
        )

    def test_a_server_that_refuses(self) -> None:
        found = self.start("mysql_clear_password")
        agent = self.agent(self.server.pid, found.pid)
        self.check(agent)
        health = agent.health(messages.Nothing()).servers
        self.assertEqual([False, True], sorted(each.healthy for each in health))

    def test_a_server_that_lets_us_in_but_not_change_anything(self) -> None:
        create, _ = database.grants("mariadb", (10, 11))
        with databases.mariadb() as (other, _):
            mysql56.execute(other.socket, create.replace("PASSWORD", PASSWORD))
            agent = self.agent(self.server.pid, other.pid)
            names = f"@@{flushing.CAPACITY}, @@{flushing.HIGH_WATER}"
            theirs, ours = other.sql(f"SELECT {names}"), self.settings()
            state = agent.prepare(messages.PrepareArguments(seconds=1, lease_seconds=60))
            self.assertIn("SUPER", state.message)
            self.assertNotEqual(ours, self.settings())
            self.assertEqual(theirs, other.sql(f"SELECT {names}"))
            self.assertEqual("idle", agent.restore(messages.LeaseArguments(state.lease_id)).state)
            self.assertEqual(ours, self.settings())
            self.assertEqual(
                ["no-grant"],
                [
                    each.code
                    for each in agent.describe(messages.Nothing()).findings
                    if each.code == "no-grant"
                ],
            )

    def test_one_that_is_alone_and_cannot_be_reached_is_told(self) -> None:
        agent = self.agent(self.start("loop").pid)
        health = agent.health(messages.Nothing()).servers
        self.assertEqual([False], [each.healthy for each in health])
        self.assertIn("server.sock", health[0].message)
        arguments = messages.PrepareArguments(seconds=1)
        self.assertRaises(exception.ServerError, agent.prepare, arguments)

    def test_a_map_goes_on_without_a_server_that_has_ended(self) -> None:
        found = self.start("loop")
        built = self.agent(self.server.pid, found.pid)._servers.build_map()
        found.end()
        built.run()
        self.assertGreater(built.pages["a-volume"], 1000)
        self.assertIn("no-map", [each.code for each in built.findings])

    def test_a_server_that_ends_meanwhile_is_skipped(self) -> None:
        found = self.start("mysql_clear_password")
        agent = self.agent(self.server.pid, found.pid)
        servers = agent._servers.find()
        self.assertEqual({self.server.pid, found.pid}, {each.pid for each in servers})
        found.end()
        agent._servers.find = lambda: servers  # type: ignore[method-assign]
        described = agent.describe(messages.Nothing())
        self.assertEqual(["mariadb"], [each.flavour for each in described.servers])
        health = agent.health(messages.Nothing()).servers
        self.assertIn(True, [each.healthy for each in health])
