# SPDX-License-Identifier: Apache-2.0
"""Leases of relays while nobody can renew them."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import amqp

from nova_dmigrate import exception
from nova_dmigrate.rpc import isolation
from nova_dmigrate.rpc.host_messages import HOST
from tests.integration import host_base
from tests.lab import broker, processes
from tests.lab.host_services import ServedRelay
from tests.lab.relays import wait_until

#: Seconds of a lease that is short, though not over before an outage is noticed, and of an outage
#: that it does not outlast.
LEASE = 10.0
LONG = 20.0
#: Asks a service twice, and tells the queue for its answers after the first one.
ASKER = """
import sys
from nova_dmigrate import exception
from nova_dmigrate.rpc.broker import BrokerTransport
from nova_dmigrate.rpc.host_client import HostClient
from nova_dmigrate.rpc.host_messages import HOST

transport = BrokerTransport(sys.argv[1], sys.argv[2], HOST)
with HostClient(sys.argv[1], transport, timeout=12) as client:
    def ask():
        try:
            client.session("none")
        except exception.HostRefused as error:
            return error
    ask()
    print(transport._requesters._current._transport._driver._reply_q, flush=True)
    sys.stdin.readline()
    print(ask(), flush=True)
"""


class OutageTest(host_base.Hosts):
    @classmethod
    def options(cls) -> dict[str, object]:
        return {}

    def relays(self) -> list[int]:
        return self.one.relays() + self.two.relays()

    def renew(self, relay: ServedRelay) -> None:
        """Renew the lease of a relay that runs. As who keeps a lease does, this asks again: an
        answer that was on its way when the broker ended never comes.
        """

        def runs() -> bool:
            with contextlib.suppress(exception.HostUnreachable):
                self.assertEqual("running", relay.renew().state)
                return True
            return False

        wait_until(runs, "a relay's lease is renewed")

    def test_an_outage_of_the_broker_that_is_longer_than_leases_ends_nothing(self) -> None:
        waiting, moving = (self.pair().open() for _ in range(2))
        migration = self.fake(moving)
        migration.send(0.5)
        pids = self.relays()
        self.assertEqual(4, len(pids))
        for pair in (waiting, moving):
            pair.renew(LEASE)
        self.broker.kill()
        time.sleep(LONG)
        self.assertEqual(pids, self.relays())
        migration.send(0.5)
        self.broker.start()
        for service in (self.one, self.two):
            with service.client() as client:
                wait_until(lambda each=service, asked=client: each._answers(asked), "it answers")
        # Who has been away as well has all of a lease to come back
        for pair in (waiting, moving):
            self.renew(pair.source)
            self.renew(pair.destination)
        migration.finish()
        migration.close()
        # And from then on leases count again
        waiting.renew(1)
        moving.close_sessions()
        self.assert_nothing_left()

    def test_a_service_that_starts_without_a_broker_ends_nothing(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.5)
        pair.renew(LEASE)
        pids = self.relays()
        self.broker.kill()
        for service in (self.one, self.two):
            service.kill()
            service.process = service.spawn()
        time.sleep(LONG)
        self.assertEqual(pids, self.relays())
        self.broker.start()
        for service in (self.one, self.two):
            with service.client() as client:
                wait_until(lambda each=service, asked=client: each._answers(asked), "it answers")
        self.renew(pair.source)
        migration.finish()

    def test_a_destination_does_not_end_what_its_source_goes_on_with(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.5)
        pair.renew(LEASE)
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            pair.source.renew()
            time.sleep(0.5)
        # With a lease again, its end is still told when somebody asks for it late
        self.assertEqual("running", pair.destination.renew().state)
        migration.finish()

    def test_a_destination_ends_with_its_source_whose_lease_is_over(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.5)
        pair.renew(LEASE)
        self.assertTrue(migration.broken())
        migration.close()
        self.assert_nothing_left()

    def test_a_destination_that_waits_ends_with_its_own_lease(self) -> None:
        pair = self.pair()
        pair.open_destination()
        pair.destination.wait("running")
        pair.destination.client.renew(pair.order.session_id, LEASE)
        self.assert_nothing_left()

    @contextlib.contextmanager
    def channel(self) -> Iterator[Any]:
        """To the broker, as another one of the host services."""
        user = broker.HOST_USER
        with (
            amqp.Connection(
                f"127.0.0.1:{self.broker.port}", user, user, virtual_host=isolation.SERVICES
            ) as connection,
            connection.channel() as channel,
        ):
            yield channel

    def test_who_had_no_queue_for_an_answer_is_answered_when_it_asks_again(self) -> None:
        argv = [sys.executable, "-W", "ignore", "-c", ASKER, "two", self.broker.services_url()]
        asker = processes.spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(processes.end, asker)
        assert asker.stdin and asker.stdout and self.two.process
        answers = asker.stdout.readline().decode().strip()
        self.assertTrue(answers, "the first question had no answer")
        self.two.process.send_signal(signal.SIGSTOP)
        self.addCleanup(self.two.process.send_signal, signal.SIGCONT)
        with self.channel() as channel:
            # Gets what the stopped service gets
            overheard, _, _ = channel.queue_declare(f"{HOST.topic}.overheard", exclusive=True)
            channel.queue_bind(overheard, HOST.exchange, f"{HOST.topic}.two")
            asker.stdin.write(b"\n")
            asker.stdin.flush()
            wait_until(lambda: channel.basic_get(overheard), "the question is at the broker")
            # As when the broker is back, and the queue is not yet
            asker.send_signal(signal.SIGSTOP)
            channel.queue_delete(answers)
        self.two.process.send_signal(signal.SIGCONT)
        dropped = f"{answers} doesn't exist, drop reply"
        wait_until(lambda: dropped in self.two.log_file.read_text(), "the answer is dropped")
        asker.send_signal(signal.SIGCONT)
        self.assertIn(b"there is no session none", asker.stdout.read())
        self.assertEqual(1, self.two.log_file.read_text().count(dropped))
