# SPDX-License-Identifier: Apache-2.0
"""When a requester that is given up is closed, and when a new one takes over."""

import threading
import uuid
import warnings
from unittest import mock

from nova_dmigrate import exception
from nova_dmigrate.rpc import messages, requester
from tests import base

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used

    from nova_dmigrate.rpc import broker


class Closable:
    def __init__(self) -> None:
        self.closed = threading.Event()

    def cleanup(self) -> None:
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
        self.requester.give_up()
        self.requester.end()
        self.assertFalse(self.transport.closed.wait(0.1))
        self.requester.end()
        self.assertTrue(self.transport.closed.wait(60))

    def test_one_is_replaced_once_it_is_not_young(self) -> None:
        # Nobody serves there: the driver waits for an answer until the time is over
        way = broker.BrokerTransport(str(uuid.uuid4()), "fake://nobody/", messages.AGENT)
        self.addCleanup(way.close)
        first = way._requester
        self.assertRaises(exception.AgentUnreachable, way.call, "ping", "r", {}, 0.2)
        self.assertIs(first, way._requester)
        with mock.patch.object(requester, "_YOUNG", 0.0):
            self.assertRaises(exception.AgentUnreachable, way.call, "ping", "r", {}, 0.2)
        self.assertIsNot(first, way._requester)
