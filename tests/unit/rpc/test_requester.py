# SPDX-License-Identifier: Apache-2.0
"""When requesters are replaced, and closed."""

import subprocess
import sys
import threading
from unittest import mock

from nova_dmigrate.rpc import requester
from tests import base


class Closable:
    """Its first closing fails as often as it is told."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.closed = threading.Event()

    def cleanup(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("broken pipe")
        self.closed.set()


class RequesterTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.transport = Closable()
        self.requester = requester.Requester(self.transport, None)

    def test_one_that_nobody_uses_is_closed_at_once(self) -> None:
        self.requester.begin()
        self.requester.end()
        self.assertFalse(self.transport.closed.is_set())
        self.requester.give_up()
        self.assertTrue(self.transport.closed.wait(60))

    def test_one_is_closed_behind_the_last_who_waits(self) -> None:
        for _ in range(2):
            self.requester.begin()
        self.assertIsNone(self.requester.give_up())
        self.requester.end()
        self.assertFalse(self.transport.closed.wait(0.1))
        self.requester.end()
        self.assertTrue(self.transport.closed.wait(60))

    def test_a_connection_that_breaks_does_not_keep_the_others_open(self) -> None:
        self.transport.failures = 1
        self.requester.give_up()
        self.assertTrue(self.transport.closed.wait(60))

    def test_there_is_hope_for_a_while_after_the_first_request(self) -> None:
        with mock.patch.object(requester, "_YOUNG", 0.0):
            self.assertFalse(self.requester.hopeless(stuck=False))
            self.requester.begin()
            self.assertTrue(self.requester.hopeless(stuck=False))
            # It may still be connecting
            self.assertFalse(self.requester.hopeless(stuck=True))
            self.requester.reached = True
            self.assertTrue(self.requester.hopeless(stuck=True))
        self.assertFalse(self.requester.hopeless(stuck=False))


class RequestersTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.checks = 0
        self.made: list[Closable] = []
        self.requesters = requester.Requesters(self.make)

    def make(self) -> requester.Requester:
        self.made.append(Closable())
        return requester.Requester(self.made[-1], None)

    def check(self) -> None:
        self.checks += 1

    def take(self) -> requester.Requester:
        taken = self.requesters.take(self.check)
        assert taken is not None
        return taken

    def test_one_that_has_been_reached_is_not_checked(self) -> None:
        self.take().reached = True
        self.take()
        self.assertEqual(1, self.checks)

    def test_no_more_than_a_crowd_waits_for_a_connection(self) -> None:
        for _ in range(requester._CROWD):
            taken = self.take()
        self.assertIsNone(self.requesters.take(self.check))
        taken.reached = True
        self.assertIs(taken, self.take())

    def test_one_without_hope_is_replaced_once(self) -> None:
        first = self.take()
        self.requesters.doubt(first, stuck=False)
        self.assertIs(first, self.take())
        with mock.patch.object(requester, "_YOUNG", 0.0):
            for _ in range(2):
                self.requesters.doubt(first, stuck=False)
        self.assertIsNot(first, self.take())
        self.assertEqual(2, len(self.made))
        for _ in range(2):
            first.end()
        self.assertTrue(self.made[0].closed.wait(60))
        self.assertFalse(self.made[1].closed.is_set())

    def test_when_it_is_closed_nothing_is_made_any_more(self) -> None:
        first = self.take()
        self.requesters.close()
        self.assertIsNone(self.requesters.take(self.check))
        with mock.patch.object(requester, "_YOUNG", 0.0):
            self.requesters.doubt(first, stuck=False)
        self.assertEqual(1, len(self.made))
        first.end()
        self.assertTrue(self.made[0].closed.wait(60))


#: Asks a broker that takes connections and says nothing. What waits for it ends with the process.
SILENCE = """
import contextlib
import socket
import threading

from nova_dmigrate import exception
from nova_dmigrate.rpc import broker, messages

with socket.create_server(("127.0.0.1", 0), backlog=128) as silent:
    url = f"rabbit://u:p@127.0.0.1:{silent.getsockname()[1]}/v"
    way = broker.BrokerTransport("i", url, messages.AGENT)
    for number in range(12):
        with contextlib.suppress(exception.AgentUnreachable):
            way.call("ping", str(number), {}, 0.1)
            raise AssertionError("it answers")
    print(sum(each.name == "rpc-ping" for each in threading.enumerate()))
    way.close()
"""


class SilenceTest(base.TestCase):
    def test_few_threads_wait_for_a_broker_that_never_speaks(self) -> None:
        argv = [sys.executable, "-W", "ignore", "-c", SILENCE]
        ended = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
        self.assertEqual(requester._CROWD, int(ended.stdout))
