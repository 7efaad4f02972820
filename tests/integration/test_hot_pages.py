# SPDX-License-Identifier: Apache-2.0
"""A real server that dies under load, and the list of its hot pages; the agent is killed, too."""

import contextlib
import os
import pwd
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from nova_dmigrate.agent import database, flushing, hotlist, hotlist_server
from tests import base
from tests.lab import databases, processes
from tests.lab.loop import run

PASSWORD = "a password"
NAMES = (*flushing.ORDER, hotlist_server.FILENAME, hotlist_server.DUMP_SHARE)
# Writes a list so long that it takes seconds
WRITE_LONG_LIST = """
import sys
import numpy as np
from nova_dmigrate.agent import cancellation, hotlist_file, processes
(server,) = processes.find_servers(processes.Selector(socket=sys.argv[1]))
place = hotlist_file.Place()
with hotlist_file.ListDirectory(server, place) as directory:
    pages = np.arange(int(sys.argv[2]), dtype=np.uint64) + (np.uint64(4294967295) << np.uint64(32))
    directory.replace(place.name, pages, cancellation.Cancellation())
"""


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of a condition; the test's own time-out bounds it further."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        with contextlib.suppress(databases.DatabaseError, OSError, ValueError):
            value = condition()
            if value:
                return value
        time.sleep(0.1)
    raise AssertionError(f"never came: {what}")


class Agent:
    """nova-dmigrate-agent with one server, which no host asks."""

    def __init__(
        self, directory: Path, socket: Path, user: str, interval: float, rate: int = 100
    ) -> None:
        (directory / "password").write_text(PASSWORD + "\n")
        self._configuration = directory / "agent.conf"
        self._configuration.write_text(
            "[agent]\ninstance = 01234567-89ab-cdef-0123-456789abcdef\n"
            f"transport = channel\nchannel_path = {directory / 'no-port'}\n"
            f"state_directory = {directory / 'state'}\nsocket = {socket}\nsql_user = {user}\n"
            f"sql_password_file = {directory / 'password'}\n"
            f"hot_list_interval = {interval}\nwarm_up_rate = {rate}\n"
        )
        self.state = directory / "state"
        self.log = directory / "agent.log"
        self._process: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> list[str]:
        program = [sys.executable, "-W", "ignore", "-m", "nova_dmigrate.cmd.agent"]
        return [*program, "--config-file", str(self._configuration), *arguments]

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        with self.log.open("ab") as log:
            self._process = processes.spawn(
                self.command("serve"), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            yield
        finally:
            processes.terminate(self._process, 30)

    def kill(self) -> None:
        assert self._process is not None
        processes.end(self._process)

    def told(self, text: str) -> bool:
        return text in self.log.read_text(errors="replace")


class HotPagesTest(base.TestCase):
    server: ClassVar[databases.MariaDB]
    volume: ClassVar[databases.LoopVolume]
    _stack: ClassVar[contextlib.ExitStack]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(databases.available())
        with contextlib.ExitStack() as stack:
            # It does not load by itself: what is in its pool after a start was asked for
            options = ["innodb-log-file-size=64M", "innodb-buffer-pool-load-at-startup=OFF"]
            cls.server, cls.volume = stack.enter_context(
                databases.mariadb(megabytes=512, options=options, pool="64M")
            )
            for statement in database.grants("mariadb", (10, 11)):
                cls.server.sql(statement.replace("PASSWORD", PASSWORD))
            cls.server.fill(tables=2, rows=60000)
            cls._stack = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls._stack.close()
        super().tearDownClass()

    def setUp(self) -> None:
        super().setUp()
        self.list = Path(f"/proc/{self.volume.holder_pid}/root{self.server.datadir}/ib_buffer_pool")
        for path in self.list.parent.glob("ib_buffer_pool*"):
            path.unlink()
        self.settings = self.shown(*NAMES)
        self.agents: list[Agent] = []
        self.addOnException(lambda *_: self._attach_logs())

    def _attach_logs(self) -> None:
        for agent in self.agents:
            if agent.log.exists():
                sys.stderr.write(f"\n--- agent's log ---\n{agent.log.read_text()[-8000:]}\n")

    def agent(
        self, user: str = database.DEFAULT_USER, interval: float = 3600.0, rate: int = 100
    ) -> Agent:
        made = Agent(self.make_directory(), self.server.socket, user, interval, rate)
        self.agents.append(made)
        return made

    def shown(self, *names: str) -> dict[str, str]:
        quoted = ", ".join(f"'{name}'" for name in names)
        text = self.server.sql(f"SHOW GLOBAL VARIABLES WHERE Variable_name IN ({quoted})")
        return dict(line.split("\t") for line in text.splitlines())

    def in_pool(self) -> int:
        return int(
            self.server.sql("SHOW GLOBAL STATUS LIKE 'Innodb_buffer_pool_pages_data'").split()[1]
        )

    def read(self) -> set[int]:
        with self.list.open("rb") as file:
            return set(hotlist.decode(file).tolist())

    def warm(self) -> None:
        for table in ("sbtest1", "sbtest2"):
            self.server.sql(f"SELECT COUNT(DISTINCT pad) FROM {table}", "sbtest")

    def make_list(self, agent: Agent, more_than: int) -> int:
        """Have the agent make a list; how many pages are on it."""
        with agent.serving():
            wait_for(lambda: agent.told("Listed"), "a list")
        count = len(self.read())
        self.assertGreater(count, more_than)
        return count

    def dumped(self) -> set[int]:
        """What the server itself says is in its pool."""
        then = self.list.stat().st_mtime_ns
        share = self.settings[hotlist_server.DUMP_SHARE]
        self.server.sql("SET GLOBAL innodb_buffer_pool_dump_pct = 100")
        self.server.sql("SET GLOBAL innodb_buffer_pool_dump_now = ON")
        wait_for(lambda: self.list.stat().st_mtime_ns != then, "a dump")
        self.server.sql(f"SET GLOBAL innodb_buffer_pool_dump_pct = {share}")
        return self.read()

    def assert_all_put_back(self) -> None:
        self.assertEqual(self.settings, self.shown(*NAMES))
        self.assertEqual(["ib_buffer_pool"], [p.name for p in self.list.parent.glob("ib_buffer*")])

    def start_again(self) -> None:
        """The server dies under load, and another one recovers from what it has left."""
        # What recovery has to do fills the pool, too: let it be little
        self.server.flush()
        argv = self.server.sysbench("run", "--time=0", "--tables=1", "--table-size=1000")
        load = processes.spawn(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            time.sleep(1)
            self.server.kill()
        finally:
            processes.end(load)
        self.server.start()

    def test_the_list_is_the_servers_own_with_an_account(self) -> None:
        self.warm()
        self.make_list(self.agent(), 1000)
        status = self.list.stat()
        user = pwd.getpwnam("mysql")
        self.assertEqual((user.pw_uid, user.pw_gid), (status.st_uid, status.st_gid))
        self.assertEqual(0o640, stat.S_IMODE(status.st_mode))
        found = self.read()
        self.assertGreater(len(found & self.dumped()), 0.85 * len(found))
        self.assert_all_put_back()

    def test_without_an_account_the_memory_tells(self) -> None:
        self.warm()
        agent = self.agent(user="nobody_here")
        self.make_list(agent, 1000)
        self.assertTrue(agent.told("as told by its memory"))
        found, known = self.read(), self.dumped()
        self.assertGreater(len(found & known), 0.9 * len(found))
        self.assertGreater(len(found & known), 0.8 * len(known))
        self.assert_all_put_back()

    def test_a_server_killed_under_load_has_its_pool_again_when_it_was_warmed_up(self) -> None:
        self.warm()
        agent = self.agent()
        listed = self.make_list(agent, 1000)
        self.start_again()
        cold = self.in_pool()
        self.assertLess(cold, 0.5 * listed)
        done = subprocess.run(
            agent.command("warm-up"), capture_output=True, text=True, check=False, timeout=120
        )
        self.assertEqual(0, done.returncode, done.stderr)
        self.assertIn(" pages are in memory", done.stdout)
        self.assertGreater(self.in_pool(), 0.9 * listed)
        self.assert_all_put_back()

    def test_the_agent_that_runs_is_asked_by_the_command(self) -> None:
        self.warm()
        agent = self.agent()
        listed = self.make_list(agent, 1000)
        self.start_again()
        with agent.serving():
            wait_for(lambda: agent.told("nova-dmigrate-agent"), "the agent")
            done = subprocess.run(
                agent.command("warm-up"), capture_output=True, text=True, check=False, timeout=120
            )
        self.assertEqual(0, done.returncode, done.stderr)
        self.assertGreater(self.in_pool(), 0.9 * listed)
        self.assert_all_put_back()

    def test_without_an_account_a_warm_up_is_an_error_that_says_what_to_do(self) -> None:
        self.warm()
        agent = self.agent(user="nobody_here")
        self.make_list(agent, 1000)
        done = subprocess.run(
            agent.command("warm-up"), capture_output=True, text=True, check=False, timeout=120
        )
        self.assertEqual(1, done.returncode)
        self.assertIn("nova-dmigrate-agent grants", done.stderr)

    def test_an_agent_killed_in_a_warm_up_is_succeeded_by_one_that_ends_it(self) -> None:
        self.warm()
        listed = self.make_list(self.agent(), 1000)
        self.start_again()
        # 4 MiB/s: several seconds for it
        agent = self.agent(interval=0, rate=4)
        with agent.serving():
            wait_for(lambda: agent.told("nova-dmigrate-agent"), "the agent")
            asked = processes.spawn(agent.command("warm-up"), stdout=subprocess.DEVNULL)
            self.addCleanup(processes.end, asked)
            wait_for(
                lambda: (
                    '"state": "running"' in (agent.state / "warm-up.json").read_text()
                    and '"loaded": 0' not in (agent.state / "warm-up.json").read_text()
                ),
                "a warm-up that is under way",
            )
            agent.kill()
        saved = self.list.with_name("ib_buffer_pool.dmigrate-saved")
        self.assertEqual(listed, saved.read_bytes().count(b"\n"))
        half = self.in_pool()
        self.assertLess(half, 0.9 * listed)
        with agent.serving():
            self.assertEqual(0, asked.wait(60))
        self.assertGreater(self.in_pool(), 0.9 * listed)
        self.assert_all_put_back()

    def test_an_agent_killed_while_it_writes_leaves_the_old_list_whole(self) -> None:
        self.warm()
        self.make_list(self.agent(), 1000)
        before = self.list.read_bytes()
        fresh = self.list.with_name("ib_buffer_pool.new")
        writer = processes.spawn(
            [sys.executable, "-c", WRITE_LONG_LIST, str(self.server.socket), "4000000"],
            cwd=Path(__file__).parents[2],
        )
        try:
            wait_for(lambda: fresh.stat().st_size > 1 << 20, "a list that is being written")
        finally:
            processes.end(writer)
        self.assertGreater(fresh.stat().st_size, 1 << 20)
        self.assertEqual(before, self.list.read_bytes())
        # The server takes the old one; the next agent replaces it
        agent = self.agent(interval=1)
        with agent.serving():
            wait_for(lambda: agent.told("Listed"), "another list")
        self.assertFalse(fresh.exists())

    def test_a_full_volume_keeps_the_old_list_and_its_last_room(self) -> None:
        self.warm()
        self.make_list(self.agent(), 1000)
        before = self.list.read_bytes()
        ballast = self.list.with_name("ballast")
        free = os.statvfs(self.list.parent)
        # Root may use what is reserved: leave the server less than the agent wants to spare
        size = free.f_bavail * free.f_frsize - (20 << 20)
        path = str(self.server.datadir / "ballast")
        run([*self.volume.enter, "fallocate", "-l", str(size), path])
        self.addCleanup(ballast.unlink)
        agent = self.agent(interval=1)
        with agent.serving():
            wait_for(lambda: agent.told("of room left"), "the agent's refusal")
        self.assertEqual(before, self.list.read_bytes())
        # And where it does not look before: 40 MB do not fit
        written = subprocess.run(
            [sys.executable, "-c", WRITE_LONG_LIST, str(self.server.socket), "2000000"],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertIn("No space left on device", written.stderr)
        self.assertEqual(before, self.list.read_bytes())
        self.assert_nothing_beside()

    def assert_nothing_beside(self) -> None:
        self.assertEqual(["ib_buffer_pool"], [p.name for p in self.list.parent.glob("ib_buffer*")])

    def test_a_server_that_does_not_run_keeps_its_directory_as_it_is(self) -> None:
        self.warm()
        self.make_list(self.agent(), 1000)
        self.server.kill()
        before = {path.name: path.stat().st_mtime_ns for path in self.list.parent.iterdir()}
        with self.agent(interval=0.5).serving():
            time.sleep(4)
        after = {path.name: path.stat().st_mtime_ns for path in self.list.parent.iterdir()}
        self.server.start()
        self.assertEqual(before, after)
