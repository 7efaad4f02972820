# SPDX-License-Identifier: Apache-2.0
"""The demo's clients must be able to find what they look for: lost commits and downtimes."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from tests import base
from tests.lab import databases
from tests.lab.databases import MariaDB
from tests.lab.demo.clients import Server
from tests.lab.demo.ledger import Ledger, LedgerCheck
from tests.lab.demo.load import Load, sysbench
from tests.lab.demo.probe import Probe
from tests.lab.processes import workspace
from tests.lab.relays import wait_until

_ROWS = 1000
#: Commits a second, so that some are always on their way.
_RATE = 200


class DemoClientTests(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        base.require(databases.available())
        self._ends = contextlib.ExitStack()
        self.addCleanup(self._ends.close)
        self.directory = self._ends.enter_context(workspace())

    def start(self, *options: str) -> tuple[MariaDB, Server]:
        """A server of this machine, and how clients reach it."""
        running, _ = self._ends.enter_context(databases.mariadb(options=options))
        running.sql("CREATE USER 'load'@localhost IDENTIFIED BY 'load'")
        running.sql("GRANT ALL ON *.* TO 'load'@localhost")
        return running, Server(socket=str(running.socket))

    def crash(self, running: MariaDB) -> None:
        """Kill the server and start it again: it recovers what it has on its volume."""
        os.kill(running.pid, signal.SIGKILL)
        running.stop()
        running.start()

    @contextlib.contextmanager
    def ledger_of_a_crash(self, *options: str) -> Iterator[LedgerCheck]:
        running, server = self.start(*options)
        with Ledger(server, self.directory, _RATE) as ledger:
            before = ledger.check().acknowledged
            wait_until(lambda: ledger.check().acknowledged > before + 50, "it commits")
            self.crash(running)
            after = ledger.check().acknowledged
            wait_until(lambda: ledger.check().acknowledged > after, "it commits again")
        yield ledger.check()

    def test_a_server_that_keeps_its_commits_has_lost_none_in_a_crash(self) -> None:
        with self.ledger_of_a_crash("innodb-flush-log-at-trx-commit=1") as found:
            self.assertEqual((0, 0), (found.lost, found.wrong))
            self.assertTrue(found.ok)

    def test_commits_that_a_server_loses_in_a_crash_are_told(self) -> None:
        options = ("innodb-flush-log-at-trx-commit=0", "innodb-flush-log-at-timeout=600")
        with self.ledger_of_a_crash(*options) as found:
            self.assertGreater(found.lost, 0)
            self.assertFalse(found.ok)

    def test_rows_that_no_commit_has_left_so_are_told(self) -> None:
        running, server = self.start()
        with Ledger(server, self.directory, _RATE) as ledger:
            wait_until(lambda: ledger.check().acknowledged > 50, "it commits")
        self.assertTrue(ledger.check().ok)
        running.sql("UPDATE ledger.entries SET body = REVERSE(body) WHERE id = 3")
        running.sql("DELETE FROM ledger.entries WHERE id = 5")
        found = ledger.check()
        self.assertEqual(1, found.wrong)
        self.assertGreaterEqual(found.lost, 1)
        self.assertFalse(found.ok)

    def test_a_server_that_stands_still_is_silent_for_so_long(self) -> None:
        running, server = self.start()
        with Probe(server, self.directory) as probe:
            # Enough of them that their median is not the silence itself
            wait_until(lambda: len(probe.answers()) > 10, "it has answered for a while")
            begin = time.monotonic()
            os.kill(running.pid, signal.SIGSTOP)
            stopped = time.monotonic()
            time.sleep(1)
            continued = time.monotonic()
            os.kill(running.pid, signal.SIGCONT)
            count = len(probe.answers())
            wait_until(lambda: len(probe.answers()) > count, "it answers again")
            silence = probe.silence(begin, time.monotonic())
        self.assertLessEqual(silence.begin, stopped)
        self.assertGreaterEqual(silence.end, continued)
        self.assertGreaterEqual(silence.downtime, 1 - silence.ordinary)
        # It is over, and so it is none of what comes later
        later = probe.silence(silence.end, silence.end)
        self.assertLess(later.downtime, silence.downtime)

    def test_a_load_goes_on_when_its_server_is_back(self) -> None:
        running, server = self.start()
        running.fill(4, _ROWS)
        with Load(server, sysbench(server, "oltp_read_write", _ROWS), self.directory) as load:
            begin = time.monotonic()
            wait_until(lambda: len(load.reports()) > 3, "it works")
            self.assertGreater(load.tps(begin, time.monotonic()), 0)
            self.crash(running)
            count = len(load.reports())
            wait_until(lambda: load.reports()[count:, 1].any(), "it works again")
            recovered = load.recovered(begin, 0.001)
            self.assertIsNotNone(recovered)

    def test_a_load_that_waits_for_an_answer_can_begin_anew(self) -> None:
        running, server = self.start()
        running.fill(4, _ROWS)
        with Load(server, sysbench(server, "oltp_read_write", _ROWS), self.directory) as load:
            os.kill(running.pid, signal.SIGSTOP)
            try:
                former = load._process
                load.begin_anew()
                wait_until(lambda: load._process is not former, "there is another program")
            finally:
                os.kill(running.pid, signal.SIGCONT)
            count = len(load.reports())
            wait_until(lambda: load.reports()[count:, 1].any(), "it works again")
