# SPDX-License-Identifier: Apache-2.0
"""How the database fares, as agents behind sockets tell it that do what the test wants."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.migration import database_series
from nova_dmigrate.migration.database_series import DatabaseSample, DatabaseSeries
from nova_dmigrate.rpc import channel, messages
from nova_dmigrate.rpc.client import AgentClient, ClientSettings
from tests import base
from tests.lab.agent_port import agent_at

INSTANCE = "an-instance"
PATIENCE = 60.0


@dataclasses.dataclass(frozen=True)
class OldServerHealth:
    """As agents of version 1.1 have it."""

    name: str = "/run/one.sock"
    healthy: bool = True
    message: str = ""
    uptime: float = 1.0
    dirty_share: float = 0.0
    threads_running: int = 1


class Agent:
    """Tells of the servers that it is given, when it is let.

    :ivar servers: what it tells, each as the commits and queries of a server by name.
    """

    def __init__(self, **servers: tuple[int, int]) -> None:
        self.servers = servers
        self.asked = 0
        self.let = threading.Event()
        self.let.set()

    def health(self, arguments: messages.Nothing) -> Any:
        self.asked += 1
        self.let.wait(PATIENCE)
        servers = tuple(
            messages.ServerHealth(name, True, "", 1.0, 0.0, 1, *counts, latency_ms=1.5)
            for name, counts in self.servers.items()
        )
        return messages.Health("the-agent", 0, None, servers)


class OldAgent(Agent):
    def health(self, arguments: messages.Nothing) -> Any:
        return dataclasses.replace(super().health(arguments), servers=(OldServerHealth(),))


class LockedOut(Agent):
    """The server does not let it in."""

    def health(self, arguments: messages.Nothing) -> Any:
        refused = messages.ServerHealth("one", False, "denied", None, None, None)
        return dataclasses.replace(super().health(arguments), servers=(refused,))


class DatabaseSeriesTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory()
        self.timeout = 1.0
        self.addCleanup(lambda: self.assertEqual([], threads()))

    def client(self, name: str) -> AgentClient:
        path = str(self.directory / name)
        transport = channel.ChannelTransport(INSTANCE, lambda: channel.open_port(path))
        return AgentClient(INSTANCE, transport, ClientSettings(timeout=self.timeout))

    @contextlib.contextmanager
    def agent(self, agent: Agent, name: str = "source") -> Iterator[Agent]:
        with agent_at(self.directory / name, agent):
            yield agent
            agent.let.set()

    @contextlib.contextmanager
    def series(self) -> Iterator[DatabaseSeries]:
        made = DatabaseSeries(
            lambda: self.client("source"), lambda: self.client("destination"), interval=0.02
        )
        made.start()
        try:
            yield made
        finally:
            made.stop()

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            self.assertLess(time.monotonic(), end, what)
            time.sleep(0.01)

    def wait_for(self, series: DatabaseSeries, more: int = 1) -> DatabaseSample:
        """So many further samples; the last of them."""
        count = len(series.samples) + more
        self.wait(lambda: len(series.samples) >= count, "samples come")
        return series.samples[-1]

    def test_counters_become_what_was_done_since_the_first_sample(self) -> None:
        with self.agent(Agent(one=(100, 1000), other=(7, 70))) as agent, self.series() as series:
            self.wait_for(series, 2)
            agent.servers = {"one": (110, 1200), "other": (8, 80)}
            last = self.wait_for(series, 2)
        first = series.samples[0]
        self.assertEqual((0, 0, 1.5), (first.commits, first.queries, first.latency_ms))
        self.assertEqual((11, 210), (last.commits, last.queries))
        moments = [each.moment for each in series.samples]
        self.assertEqual(sorted(moments), moments)

    def test_a_server_that_is_started_anew_counts_on(self) -> None:
        with self.agent(Agent(one=(100, 1000))) as agent, self.series() as series:
            self.wait_for(series)
            agent.servers = {"one": (5, 50)}
            self.wait_for(series, 2)
            agent.servers = {"one": (6, 60)}
            last = self.wait_for(series, 2)
        self.assertEqual((1, 10), (last.commits, last.queries))

    def test_an_older_agent_is_asked_once_and_its_answer_is_understood(self) -> None:
        self.timeout = PATIENCE
        with self.agent(OldAgent()) as agent:
            with self.client("source") as client:
                (server,) = client.health().servers
            self.assertEqual((True, None, None), (server.healthy, server.commits, server.queries))
            with self.series() as series:
                self.wait(lambda: not threads(), "it is given up")
                self.assertEqual(2, agent.asked)
        self.assertEqual((), series.samples)

    def test_an_agent_that_may_not_log_in_does_not_try_again_and_again(self) -> None:
        self.timeout = PATIENCE
        with self.agent(LockedOut()) as agent, self.series() as series:
            self.wait(lambda: not threads(), "it is given up")
            self.assertEqual(1, agent.asked)
        self.assertEqual((), series.samples)

    def test_an_agent_that_is_away_for_a_while_costs_points_and_nothing_else(self) -> None:
        with self.series() as series:
            with self.agent(Agent(one=(1, 10))):
                self.wait_for(series)
                self.assertFalse(series.astray)
            self.wait(lambda: series.astray, "it is missed")
            with self.agent(Agent(one=(2, 30))):
                last = self.wait_for(series)
        self.assertEqual((1, 20), (last.commits, last.queries))

    def test_after_the_switchover_the_agent_is_asked_where_the_guest_is(self) -> None:
        with (
            self.agent(Agent(one=(1, 10))) as before,
            self.agent(Agent(one=(5, 50)), "destination") as after,
        ):
            with self.series() as series:
                self.wait_for(series)
                self.assertEqual(0, after.asked)
                # It does not answer any more, as the guest has gone
                before.let.clear()
                self.wait(lambda: series.astray, "it is missed")
                series.moved()
                self.assertFalse(series.astray)
                moved = time.monotonic()
            # It has gone on for a while, though it was stopped at once
            after_it = [each for each in series.samples if each.moment > moved]
        self.assertGreater(len(after_it), 1)
        self.assertEqual({(4, 40)}, {(each.commits, each.queries) for each in after_it})

    def test_an_answer_of_the_source_that_is_late_is_none(self) -> None:
        with (
            self.agent(Agent(one=(1, 10))) as before,
            self.agent(Agent(one=(5, 50)), "destination"),
            self.series() as series,
        ):
            self.wait_for(series)
            asked = before.asked
            before.let.clear()
            self.wait(lambda: before.asked > asked, "it is asked")
            count = len(series.samples)
            series.moved()
            self.wait_for(series)
            before.let.set()
            last = self.wait_for(series, 2)
            self.wait(lambda: len(threads()) == 1, "the source is left")
        self.assertEqual((4, 40), (last.commits, last.queries))
        self.assertEqual(
            {(4, 40)}, {(each.commits, each.queries) for each in series.samples[count:]}
        )

    def test_the_destination_is_asked_though_it_takes_its_time(self) -> None:
        self.timeout = PATIENCE
        with (
            self.agent(Agent(one=(1, 10))),
            self.agent(Agent(one=(5, 50)), "destination") as after,
        ):
            with self.series() as series:
                self.wait_for(series)
                after.let.clear()
                series.moved()
                threading.Timer(database_series._AFTER + 0.5, after.let.set).start()
            last = series.samples[-1]
        self.assertEqual((4, 40), (last.commits, last.queries))

    def test_it_ends_while_the_agent_hangs(self) -> None:
        with self.agent(Agent(one=(1, 10))) as agent:
            agent.let.clear()
            with self.series() as series:
                self.wait(lambda: agent.asked, "it is asked")
            self.assertEqual((), series.samples)

    def test_it_ends_where_nobody_is(self) -> None:
        with self.series() as series:
            self.wait(lambda: series.astray, "nobody answers")
            series.moved()
        self.assertEqual((), series.samples)

    def test_that_it_breaks_is_nobodys_trouble(self) -> None:
        def broken() -> AgentClient:
            raise exception.ConfigurationError(reason="no such broker")

        series = DatabaseSeries(broken, broken)
        series.start()
        series.stop()
        self.assertEqual((), series.samples)

    def test_what_was_never_started_can_be_stopped(self) -> None:
        series = DatabaseSeries(lambda: self.client("source"), lambda: self.client("source"))
        series.stop()
        self.assertEqual((), series.samples)

    def test_a_long_series_keeps_its_slow_moments(self) -> None:
        samples = [DatabaseSample(at, at, 10 * at, 9.0 if at == 2 else 1.0) for at in range(5)]
        self.assertEqual(
            [
                DatabaseSample(1, 1, 10, 1.0),
                DatabaseSample(3, 3, 30, 9.0),
                DatabaseSample(4, 4, 40, 1.0),
            ],
            database_series.thinned(samples),
        )


def threads() -> list[threading.Thread]:
    """Those of series."""
    return [each for each in threading.enumerate() if each.name == "database-series"]
