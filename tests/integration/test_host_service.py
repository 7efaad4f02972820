# SPDX-License-Identifier: Apache-2.0
"""Host services, and their broker, are stopped, killed, or not there."""

import contextlib
import dataclasses
import signal
import time
import warnings

from nova_dmigrate import exception
from nova_dmigrate.rpc.dispatcher import Dispatcher
from nova_dmigrate.rpc.host_client import HostClient
from nova_dmigrate.rpc.host_messages import HOST, SessionState
from tests.integration.host_base import Hosts, ended
from tests.lab import processes
from tests.lab.broker import free_ports
from tests.lab.relays import PATIENCE, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.rpc.broker import BrokerServer, BrokerTransport, make_conf

#: What "within two seconds" may become on a machine that is busy with other things.
SOON = 15.0


class ServiceLifeTest(Hosts):
    """Services, and the broker, are stopped and killed."""

    @classmethod
    def options(cls) -> dict[str, object]:
        # A broker that starts anew on a busy machine takes a minute now and then
        return {**super().options(), "host__max_lease": 600}

    def test_relays_survive_their_service_and_its_successor_takes_them_over(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.3)
        before = self.one.relays() + self.two.relays()
        for service in (self.one, self.two):
            service.kill()
        migration.send(0.5)
        for service in (self.one, self.two):
            service.start()
        self.assertEqual(before, self.one.relays() + self.two.relays())
        state = pair.source.renew()
        self.assertEqual("running", state.state)
        self.assertEqual(pair.destination.renew().port, pair.destination.renew().port)
        migration.finish()
        migration.close()
        self.assertEqual(["delivered"] * 2, [each.state for each in pair.close_sessions()])
        self.assert_nothing_left()

    def test_a_relay_that_ends_without_its_service_has_ended_for_its_successor(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        pids = self.one.relays() + self.two.relays()
        for service in (self.one, self.two):
            service.kill()
        migration.send()
        migration.close()
        for pid in pids:
            wait_until(lambda each=pid: ended(each), "the relay ends")
        for service in (self.one, self.two):
            service.start()
        for state in pair.close_sessions():
            self.assertEqual("delivered", state.state, state)
        self.assert_nothing_left()

    def test_a_successor_ends_relays_that_nobody_asks_for(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.5)
        pair.renew(2)
        for service in (self.one, self.two):
            service.kill()
        for service in (self.one, self.two):
            service.start()
        self.assertTrue(migration.broken())
        migration.close()
        self.assert_nothing_left()

    def test_a_queue_survives_its_service(self) -> None:
        pairs = [self.pair(wait_seconds=300) for _ in range(4)]
        for pair in pairs:
            pair.open_destination()
        self.two.relays()
        self.two.kill()
        self.two.start()
        states = [pair.destination.renew() for pair in pairs]
        self.assertEqual([0, 0, 1, 2], [state.queue_position for state in states])
        pairs[0].destination.client.close_session(pairs[0].order.session_id)
        pairs[2].destination.wait("running")

    def test_a_service_that_is_stopped_waits_for_its_migrations_only(self) -> None:
        running, other, queued = (self.pair(wait_seconds=300) for _ in range(3))
        # Before the pairs are closed
        self.addCleanup(self.two.start)
        running.open()
        other.open_destination()
        queued.open_destination()
        migration = self.fake(running)
        migration.send(0.5)
        self.two.terminate()
        host = self.client_of(self.two)
        wait_until(lambda: host.hello(PATIENCE).draining, "the service is being stopped")
        self.assertIn("stopped", queued.destination.wait("failed").message)
        self.assert_refused("draining", self.pair().open_destination)
        other.destination.client.close_session(other.order.session_id)
        migration.send(0.5)
        self.assertEqual("running", running.destination.renew().state)
        # The destination's service ends with its last relay
        migration.finish(running.source)
        self.assertEqual(0, self.two.wait())

    def test_a_service_that_has_waited_long_enough_leaves_its_relays_alone(self) -> None:
        self.restart(self.two, host__drain_timeout=1)
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.5)
        self.two.terminate()
        self.assertEqual(0, self.two.wait())
        self.assertEqual(1, len(self.two.relays()))
        self.two.configure(**self.options())
        self.two.start()
        migration.finish()

    def test_a_second_signal_ends_the_service_at_once(self) -> None:
        pair = self.pair()
        self.addCleanup(self.two.start)
        pair.open_destination()
        pair.destination.wait("running")
        self.two.terminate()
        host = self.client_of(self.two)
        wait_until(lambda: host.hello(PATIENCE).draining, "the service is being stopped")
        self.two.terminate()
        self.assertEqual(0, self.two.wait())
        self.assertEqual(1, len(self.two.relays()))

    def test_there_is_one_service_for_a_directory(self) -> None:
        second = self.one.spawn()
        self.assertEqual(2, second.wait(PATIENCE))
        processes.end(second)
        self.assertIn("another host service is running", self.one.last_words())

    def test_a_broker_that_is_killed_costs_no_migration(self) -> None:
        pair = self.pair(lease_seconds=600).open()
        migration = self.fake(pair)
        migration.send(0.5)
        self.broker.kill()
        begin = time.monotonic()
        self.assertRaises(exception.HostUnreachable, pair.source.client.hello)
        self.assertLess(time.monotonic() - begin, SOON)
        migration.send(0.5)
        self.broker.start()

        def renewed() -> SessionState | None:
            with contextlib.suppress(exception.HostUnreachable):
                pair.destination.renew()
                return pair.source.renew()
            return None

        state = wait_until(renewed, "the services answer over the new broker")
        self.assertEqual("running", state.state)
        migration.finish()
        for service in (self.one, self.two):
            told = service.log_file.read_text().count("is unreachable")
            # Of several connections with an attempt every few seconds: once a minute
            self.assertIn(told, (1, 2), service.last_words())

    # Who is not there

    def test_a_host_without_the_service_is_known_soon(self) -> None:
        transport = BrokerTransport("three", self.broker.services_url(), HOST)
        asked = HostClient("three", transport)
        self.addCleanup(asked.close)
        begin = time.monotonic()
        error = self.assertRaises(exception.HostUnreachable, asked.hello)
        self.assertLess(time.monotonic() - begin, SOON)
        self.assertIn("Host three: no host service is connected", str(error))

    def test_a_service_that_says_nothing_is_known_soon(self) -> None:
        assert self.two.process is not None
        self.two.process.send_signal(signal.SIGSTOP)
        self.addCleanup(self.two.process.send_signal, signal.SIGCONT)
        host = self.client_of(self.two)
        begin = time.monotonic()
        error = self.assertRaises(exception.HostUnreachable, host.hello)
        self.assertLess(time.monotonic() - begin, SOON)
        self.assertIn("no answer in time", str(error))

    def test_a_broker_that_is_not_there_is_known_soon(self) -> None:
        url = f"rabbit://u:p@127.0.0.1:{free_ports(1)[0]}/v"
        asked = HostClient("two", BrokerTransport("two", url, HOST))
        self.addCleanup(asked.close)
        begin = time.monotonic()
        error = self.assertRaises(exception.HostUnreachable, asked.hello)
        self.assertLess(time.monotonic() - begin, SOON)
        self.assertIn("no broker can be reached", str(error))

    def test_a_service_of_another_major_version_is_known_soon(self) -> None:
        later = dataclasses.replace(HOST, version="2.0")
        server = BrokerServer(
            "later", Dispatcher(object(), later), make_conf(), self.broker.services_url()
        )
        server.start()
        self.addCleanup(server.stop)
        self.assertTrue(server.wait_until_serving(PATIENCE))
        asked = HostClient("later", BrokerTransport("later", self.broker.services_url(), HOST))
        self.addCleanup(asked.close)
        begin = time.monotonic()
        self.assert_refused("version", asked.hello)
        self.assertLess(time.monotonic() - begin, SOON)
