# SPDX-License-Identifier: Apache-2.0
"""What the tests of this package stand on."""

from concurrent import futures
from typing import Any

import testtools
from nova.tests.fixtures.nova import ReaderWriterLock
from oslo_messaging._drivers import impl_fake

from nova_dmigrate.rpc import broker
from nova_dmigrate.rpc.host_client import HostClient
from nova_dmigrate.rpc.host_messages import HOST
from tests.functional import base, services


class CellsTest(testtools.TestCase):
    def test_who_reads_does_not_wait_behind_who_waits_to_write(self):
        lock = ReaderWriterLock()
        with futures.ThreadPoolExecutor(2) as pool:
            with lock.read_lock():
                writer = pool.submit(self.hold, lock.write_lock)
                while not lock._pending_writers:
                    self.assertFalse(writer.done())
                self.assertTrue(pool.submit(self.hold, lock.read_lock).result(20))
                self.assertFalse(writer.done())
            self.assertTrue(writer.result(20))

    def hold(self, held: Any) -> bool:
        with held():
            return True


class StandInTest(base.MigrationTest):
    def client(self, host: str) -> HostClient:
        return HostClient(host, broker.BrokerTransport(host, services.URL, HOST))

    def test_a_connection_that_is_closed_takes_no_message_of_others_along(self):
        host = services.Host("late", "/nowhere")
        with self.client("late") as late, futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(late.hello, 20)
            self.wait_for(lambda: self.queued("late"))
            self.client("src").close()
            self.useFixture(services.Served("late", host, HOST))
            self.assertEqual("late", answer.result(20).host)

    def test_what_goes_wrong_while_libvirt_migrates_is_told_at_once(self):
        self.during = lambda: self.assertEqual(1, 2)
        server = self.make_server()
        error = self.assertRaises(self.failureException, self.move, server)
        self.assertIn("1 != 2", str(error))
        # What Nova still puts back would wait for what the test takes away
        self.failed_during.clear()
        self.settled(server)

    def queued(self, host: str) -> Any:
        """Requests to a host service that it has not fetched."""
        exchange = impl_fake.FakeExchangeManager._exchanges[HOST.exchange]
        return exchange._server_queues.get((HOST.topic, host))
