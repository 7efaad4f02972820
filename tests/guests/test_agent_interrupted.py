# SPDX-License-Identifier: Apache-2.0
"""The agent in a real guest when one of the parties goes: host, agent, server, port."""

import contextlib
import time
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar

from nova_dmigrate import exception
from nova_dmigrate.rpc import channel, lines, messages
from tests.guests import guests
from tests.guests.guests import HEAVIER, LIGHT
from tests.lab.relays import wait_until

PATIENCE = 60.0
LEASE_SECONDS = 8.0


class TestInterruptions(guests.DatabaseGuestTestCase):
    LAYOUT: ClassVar[dict[str, Any]] = {"layout": "partition"}

    @contextlib.contextmanager
    def connection(self) -> Iterator[lines.LineStream]:
        """A host's connection to the port, as bare as it can be."""
        stream = lines.LineStream(channel.open_port(str(self.guest.agent_path)))
        try:
            yield stream
        finally:
            stream.close()

    def send(self, stream: lines.LineStream, method: str, **arguments: Any) -> str:
        """Send a request once; its id."""
        number = uuid.uuid4().hex
        request = {
            "id": number,
            "version": messages.VERSION,
            "method": method,
            "request_id": number,
            "arguments": arguments,
        }
        self.assertTrue(stream.send(request, time.monotonic() + PATIENCE))
        return number

    def received(self, stream: lines.LineStream, seconds: float = PATIENCE) -> Any:
        """The id of the next answer, None if there is none in time."""
        line = stream.receive(time.monotonic() + seconds)
        answer = None if line is None else lines.decode(line)
        return None if answer is None else answer["id"]

    def kill(self, name: str) -> None:
        self.guest.run(
            f'pid=$(</run/{name}.pid); kill -9 "$pid"; while [ -d /proc/$pid ]; do :; done'
        )

    # The host goes

    def test_each_host_that_comes_at_once_is_answered_exactly_once(self) -> None:
        # Often: the guest's kernel may tell of one host that goes after the next one has asked
        for _ in range(150):
            with self.connection() as stream:
                number = self.send(stream, "ping")
                self.assertEqual(number, self.received(stream))
        with self.connection() as stream:
            self.assertIsNone(self.received(stream, 1))

    def test_a_host_that_goes_without_its_answer_costs_the_next_one_nothing(self) -> None:
        for _ in range(5):
            with self.connection() as stream:
                hasty = self.send(stream, "describe")
            with self.connection() as stream:
                patient = self.send(stream, "ping")
                answers = [self.received(stream)]
                while answers[-1] == hasty:
                    answers.append(self.received(stream))
                self.assertEqual(patient, answers[-1])
                self.assertLessEqual(len(answers), 2)

    def test_an_agent_to_whom_nobody_listens_does_not_use_the_processor(self) -> None:
        # While it sends it would give up only after 30 s: it is to be idle long before.
        idle = """
            ticks() {
                read -r -a stat </proc/$(</run/agent.pid)/stat
                echo $((stat[13] + stat[14]))
            }
            for _ in {1..10}; do
                before=$(ticks)
                sleep 2
                if [ $(($(ticks) - before)) -lt 100 ]; then exit 0; fi
            done
            exit 1
        """
        with self.guest.agent() as client:
            client.ping()  # it has the port open
        self.guest.run("kill -STOP $(</run/agent.pid)")
        with self.connection() as stream:
            self.send(stream, "ping")
            time.sleep(1)  # the request arrives; nobody will be there for its answer
        self.guest.run("kill -CONT $(</run/agent.pid)")
        self.guest.run(idle)

    # The agent goes

    def test_an_agent_killed_while_it_prepares_puts_settings_back_when_it_is_back(self) -> None:
        client = self.agent()
        incarnation = client.ping().incarnation
        before = self.settings()
        with self.work(HEAVIER):
            begun = client.prepare(dirty_share=0.0, seconds=300, lease_seconds=300)
            self.assertEqual("flushing", begun.state)
            self.assertNotEqual(before, self.settings())
            self.kill("agent")
            self.guest.run("start_agent")
            # The lease goes on, and ends when nobody renews it
            self.assertNotEqual(incarnation, client.ping().incarnation)
            self.assertNotEqual(before, self.settings())
            client.renew(begun.lease_id, LEASE_SECONDS)
            wait_until(lambda: self.settings() == before, "settings are put back")
            self.assertGreaterEqual(self.map_and_compare(client), 0.95)

    def test_an_agent_killed_amid_a_request_to_prepare_leaves_nothing_changed(self) -> None:
        before = self.settings()
        for _ in range(3):
            with self.connection() as stream:
                arguments = {"dirty_share": 0.01, "seconds": 60.0, "lease_seconds": LEASE_SECONDS}
                self.send(stream, "prepare", **arguments)
                self.kill("agent")
            self.guest.run("start_agent")
            with self.guest.agent() as client:
                client.ping()
            wait_until(lambda: self.settings() == before, "settings are put back")
        client = self.agent()
        state = self.prepare(client)
        self.assertEqual("idle", client.restore(state.lease_id).state)
        self.assertEqual(before, self.settings())

    # The server goes

    def test_a_server_killed_while_it_is_prepared_comes_back_with_its_own_settings(self) -> None:
        client = self.agent()
        before = self.settings()
        with self.work(LIGHT):
            begun = client.prepare(dirty_share=0.0, seconds=300, lease_seconds=300)
            self.assertNotEqual(before, self.settings())
            self.kill("server")
            error = self.assertRaises(
                exception.AgentRefused, client.prepare, seconds=1, lease_seconds=300
            )
            self.assertIn("run", str(error))
            self.guest.run("start_server && read_tables", timeout=300)
            self.assertEqual(before, self.settings())
            self.assertEqual("idle", client.restore(begun.lease_id).state)
            self.assertEqual(before, self.settings())
        with self.work(LIGHT):
            state = self.prepare(client)
            self.assertTrue(state.reached, state)
            self.assertGreaterEqual(self.map_and_compare(client), 0.95)
            self.assertEqual("idle", client.restore(state.lease_id).state)
        self.assertEqual(before, self.settings())

    # The port goes

    def ports(self) -> str:
        """The names of the guest's ports, of which one may be going."""
        return self.guest.run("cat /sys/class/virtio-ports/*/name || true")

    def test_the_agent_comes_back_with_its_port(self) -> None:
        with self.guest.agent() as client:
            incarnation = client.ping().incarnation
        self.guest.qmp("device_del", id="agent-port")
        wait_until(
            lambda: channel.PORT_NAME not in self.ports(),
            "the port goes",
        )
        self.guest.qmp(
            "device_add",
            driver="virtserialport",
            id="agent-port",
            chardev="agent",
            name=channel.PORT_NAME,
        )
        wait_until(
            lambda: channel.PORT_NAME in self.ports(),
            "the port comes",
        )
        self.guest.run("link_ports")
        self.assertEqual(incarnation, self.agent().ping().incarnation)
