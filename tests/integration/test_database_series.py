# SPDX-License-Identifier: Apache-2.0
"""How a real MariaDB fares, by the agent as a process, over a real RabbitMQ."""

import contextlib
import dataclasses
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

from nova_dmigrate.agent import database
from nova_dmigrate.migration.database_series import DatabaseSeries
from nova_dmigrate.report import history
from nova_dmigrate.rpc import client, messages
from tests import base
from tests.integration import test_agent_rpc
from tests.integration.test_agent_rpc import ONE, PASSWORD, wait_for
from tests.lab import databases, processes, tls_broker
from tests.lab.broker import Broker
from tests.unit.migration.summaries import RELAYED
from tests.unit.migration.test_database_series import threads

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.rpc import broker as rpc_broker

#: Statements of one of sysbench's transactions, BEGIN and COMMIT included.
STATEMENTS = 20


class DatabaseSeriesTest(base.TestCase):
    _resources: ClassVar[contextlib.ExitStack]
    broker: ClassVar[Broker]
    server: ClassVar[databases.MariaDB]
    agent: ClassVar[test_agent_rpc.Agent]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(databases.available() or tls_broker.available())
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(processes.workspace())
            cls.server, volume = stack.enter_context(
                databases.mariadb(pool="48M", options=["innodb-log-file-size=64M", "log-bin=log"])
            )
            for statement in database.grants("mariadb", (10, 11)):
                cls.server.sql(statement.replace("PASSWORD", PASSWORD))
            cls.server.fill(tables=1, rows=2000)
            cls.broker = stack.enter_context(Broker([ONE]))
            url = cls.broker.url(ONE)
            cls.agent = test_agent_rpc.Agent(directory, url, cls.server.socket, volume.name)
            with cls.agent.configuration.open("a") as file:
                file.write("hot_list_interval = 0\n")  # nothing else of it logs in
            cls.agent.start()
            stack.callback(lambda: cls.agent.kill())
            cls._resources = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls._resources.close()
        super().tearDownClass()

    def setUp(self) -> None:
        super().setUp()
        self.addOnException(
            lambda *_: sys.stderr.write(self.agent.log.read_text(errors="replace")[-8000:])
        )
        with self.client() as asked:
            wait_for(asked.ping, "an answer")

    def client(self, timeout: float = 5) -> client.AgentClient:
        transport = rpc_broker.BrokerTransport(ONE, self.broker.host_url(ONE), messages.AGENT)
        return client.AgentClient(ONE, transport, client.ClientSettings(timeout=timeout))

    @contextlib.contextmanager
    def series(self, timeout: float = 5) -> Iterator[DatabaseSeries]:
        """:param timeout: seconds for one answer."""
        made = DatabaseSeries(
            lambda: self.client(timeout), lambda: self.client(timeout), interval=0.2
        )
        made.start()
        try:
            yield made
        finally:
            made.stop()
            self.assertEqual([], threads())

    def more(self, series: DatabaseSeries, count: int = 3) -> None:
        count += len(series.samples)
        wait_for(lambda: len(series.samples) >= count, "samples")

    def drawn(self, series: DatabaseSeries) -> dict[str, Any]:
        """What a report draws of it."""
        rows = tuple({"t": each.moment, **dataclasses.asdict(each)} for each in series.samples)
        summary = dataclasses.replace(RELAYED, series={"database": rows})
        made: dict[str, Any] = history.run_of(summary)["series"]
        return made

    def committed(self) -> int:
        return int(self.server.sql("SHOW GLOBAL STATUS LIKE 'Com_commit'").split()[1])

    def test_transactions_and_statements_are_counted_as_the_server_does(self) -> None:
        with self.series() as series:
            self.more(series)
            before = self.committed()
            with self.server.load("--threads=2", "--table-size=2000"):
                self.more(series, 5)
            self.more(series, 2)
            committed = self.committed() - before
        last = series.samples[-1]
        self.assertGreater(committed, 0)
        self.assertEqual(committed, last.commits)
        self.assertGreaterEqual(last.queries, STATEMENTS * committed)
        made = self.drawn(series)
        self.assertGreater(max(rate for _, rate in made["tps"]), 0)
        self.assertGreater(max(rate for _, rate in made["qps"]), 0)
        self.assertEqual(len(series.samples), len(made["latency_ms"]))
        self.assertGreater(min(value for _, value in made["latency_ms"]), 0)

    def test_statements_that_commit_themselves_are_seen_as_well(self) -> None:
        with self.series() as series:
            self.more(series)
            self.server.sql("UPDATE sbtest1 SET k = k + 1 WHERE id = 7; " * 50, "sbtest")
            self.more(series)
        self.assertEqual(0, series.samples[-1].commits)
        made = self.drawn(series)
        self.assertNotIn("tps", made)
        self.assertGreaterEqual(series.samples[-1].queries, 50)

    def test_an_agent_that_is_killed_on_the_way_goes_on_when_it_is_back(self) -> None:
        with self.series() as series:
            self.more(series)
            self.agent.kill()
            self.addCleanup(self.ensure_agent)
            wait_for(lambda: series.astray, "it is missed")
            count = len(series.samples)
            self.server.sql("UPDATE sbtest1 SET k = k + 1 WHERE id = 7; " * 50, "sbtest")
            self.assertEqual(count, len(series.samples))
            self.agent.start()
            self.more(series)
        # What was done meanwhile is not lost
        grown = series.samples[count].queries - series.samples[count - 1].queries
        self.assertGreaterEqual(grown, 50)

    def ensure_agent(self) -> None:
        assert self.agent.process is not None
        if self.agent.process.poll() is not None:
            self.agent.start()

    def test_a_server_that_is_killed_on_the_way_goes_on_when_it_is_back(self) -> None:
        with self.series() as series:
            self.more(series)
            self.server.kill()
            time.sleep(1)
            self.server.start()
            self.more(series)
        for name in ("commits", "queries"):
            counted = [getattr(each, name) for each in series.samples]
            self.assertEqual(sorted(counted), counted)

    def test_an_agent_without_an_account_tries_once(self) -> None:
        (password,) = self.agent.configuration.parent.glob("password")
        password.write_text("wrong\n")
        self.agent.kill()
        self.agent.start()

        def right() -> None:
            password.write_text(PASSWORD + "\n")
            self.agent.kill()
            self.agent.start()

        self.addCleanup(right)
        with self.client() as asked:
            wait_for(asked.ping, "an answer")
        before = self.refused()
        # An answer that comes late would be asked for once more, and not in vain
        with self.series(timeout=80) as series:
            wait_for(lambda: not threads(), "it is given up")
        self.assertEqual((), series.samples)
        self.assertEqual(1, self.refused() - before)

    def refused(self) -> int:
        text = self.server.sql("SHOW GLOBAL STATUS LIKE 'Access_denied_errors'")
        return int(text.split()[1])
