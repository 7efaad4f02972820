# SPDX-License-Identifier: Apache-2.0
"""The agent as a process, a real RabbitMQ and a real MariaDB; each of them is killed."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import amqp

from nova_dmigrate import exception
from nova_dmigrate.agent import database, flushing
from nova_dmigrate.buffermap import MapLimits
from nova_dmigrate.rpc import client, isolation, messages
from nova_dmigrate.rpc.dispatcher import Dispatcher
from tests import base
from tests.fetched_map import fetch_map
from tests.lab import databases, processes, tls_broker
from tests.lab.broker import HOST_USER, Broker

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.rpc import broker as rpc_broker

# At DEBUG they tell of every byte
for chatty in ("amqp", "oslo.messaging", "oslo_messaging", "stevedore"):
    logging.getLogger(chatty).setLevel(logging.INFO)

ONE, OTHER = str(uuid.uuid4()), str(uuid.uuid4())
PASSWORD = "a password"
SETTINGS = client.ClientSettings(timeout=5, attempts=6)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of a condition; the test's own time-out bounds it further."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        with contextlib.suppress(exception.RpcError, databases.DatabaseError):
            value = condition()
            if value:
                return value
        time.sleep(0.1)
    raise AssertionError(f"never came: {what}")


class Agent:
    """nova-dmigrate-agent serve, as a process."""

    def __init__(self, directory: Path, url: str, socket: Path, volume: str) -> None:
        (directory / "password").write_text(PASSWORD + "\n")
        self.configuration = directory / "agent.conf"
        self.configuration.write_text(
            f"[DEFAULT]\ntransport_url = {url}\n"
            f"[agent]\ninstance = {ONE}\nstate_directory = {directory / 'state'}\n"
            f"socket = {socket}\nsql_password_file = {directory / 'password'}\n"
            f"volume_names = {volume}:the-volume\n"
        )
        self.log = directory / "agent.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> list[str]:
        program = [sys.executable, "-W", "ignore", "-m", "nova_dmigrate.cmd.agent"]
        return [*program, "--config-file", str(self.configuration), *arguments]

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = processes.spawn(
                self.command("serve"), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self) -> None:
        assert self.process is not None
        processes.end(self.process)

    def terminate(self) -> int:
        assert self.process is not None
        return processes.terminate(self.process, 30)


class AgentRpcTest(base.TestCase):
    resources: ClassVar[contextlib.ExitStack]
    broker: ClassVar[Broker]
    server: ClassVar[databases.MariaDB]
    agent: ClassVar[Agent]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(databases.available() or tls_broker.available())
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(processes.workspace())
            cls.server, volume = stack.enter_context(
                databases.mariadb(pool="48M", options=["innodb-log-file-size=64M"])
            )
            cls._fill_server()
            cls.broker = stack.enter_context(Broker([ONE, OTHER]))
            cls.agent = Agent(directory, cls.broker.url(ONE), cls.server.socket, volume.name)
            cls.agent.start()
            stack.callback(lambda: cls.agent.kill())
            cls.resources = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.resources.close()
        super().tearDownClass()

    @classmethod
    def _fill_server(cls) -> None:
        for statement in database.grants("mariadb", (10, 11)):
            cls.server.sql(statement.replace("PASSWORD", PASSWORD))
        cls.server.fill(tables=1, rows=20000)

    def setUp(self) -> None:
        super().setUp()
        transport = rpc_broker.BrokerTransport(ONE, self.broker.host_url(ONE), messages.AGENT)
        self.client = client.AgentClient(ONE, transport, SETTINGS)
        self.addCleanup(self.client.close)
        self.addOnException(lambda *_: self._attach_log())
        self.incarnation = wait_for(self.client.ping, "an answer").incarnation

    def _attach_log(self) -> None:
        tail = self.agent.log.read_text(errors="replace")[-8000:]
        sys.stderr.write(f"\n--- agent's log ---\n{tail}\n")

    def settings(self) -> dict[str, str]:
        names = ", ".join(f"'{name}'" for name in flushing.ORDER)
        text = self.server.sql(f"SHOW GLOBAL VARIABLES WHERE Variable_name IN ({names})")
        return dict(line.split("\t") for line in text.splitlines())

    def dirty(self) -> None:
        self.server.sql("UPDATE sbtest1 SET k = k + 1, pad = REVERSE(pad)", "sbtest")

    def prepare(self, lease_seconds: float = 600) -> messages.LeaseState:
        state = self.client.prepare(seconds=20, lease_seconds=lease_seconds)
        self.addCleanup(self.client.restore, state.lease_id)
        return state

    def wait_for_new_agent(self) -> None:
        wait_for(lambda: self.client.ping().incarnation != self.incarnation, "a new agent")

    def settle(self) -> None:
        """The table is in the pool, and the pool on the volume."""
        self.server.sql("SELECT COUNT(DISTINCT pad) FROM sbtest1", "sbtest")
        state = self.prepare()
        wait_for(lambda: self.client.renew(state.lease_id).reached, "few dirty pages")

    # What is asked

    def test_the_agent_describes_the_server_and_may_prepare_it(self) -> None:
        description = self.client.describe()
        (server,) = description.servers
        self.assertEqual("mariadb", server.flavour)
        self.assertEqual(48 << 20, server.pool_bytes)
        codes = {finding.code for finding in description.findings}
        self.assertIn("may-prepare", codes)
        self.assertFalse(codes & {"no-login", "no-grant", "no-server", "no-answer"}, codes)

    def test_a_map_arrives_in_chunks_that_can_be_asked_for_again(self) -> None:
        self.settle()
        settings = client.ClientSettings(timeout=5, attempts=6, chunk_bytes=4096)
        small = client.AgentClient(ONE, self.client._caller._transport, settings)
        fetched = fetch_map(small, MapLimits(max_chunk_bytes=4096))
        (volume,) = fetched.volumes
        self.assertEqual("the-volume", volume.volume_id)
        self.assertGreater(volume.page_count, 1000)

    def test_health_tells_that_the_server_answers(self) -> None:
        health = self.client.health()
        self.assertEqual([True], [server.healthy for server in health.servers])
        self.assertEqual(0, health.moves)

    def test_prepare_has_dirty_pages_written_and_restore_puts_everything_back(self) -> None:
        before = self.settings()
        self.dirty()
        self.assertGreater(self.server.dirty_pages(), 100)
        state = self.prepare()
        self.assertNotEqual(before, self.settings())
        wait_for(lambda: self.client.renew(state.lease_id).reached, "few dirty pages")
        self.assertEqual("idle", self.client.restore(state.lease_id).state)
        self.assertEqual(before, self.settings())

    def test_a_lease_that_nobody_renews_ends(self) -> None:
        before = self.settings()
        state = self.prepare(lease_seconds=1)
        wait_for(lambda: self.settings() == before, "settings as before")
        self.assertRaises(exception.AgentRefused, self.client.renew, state.lease_id)

    def test_a_setting_that_somebody_else_has_changed_stays(self) -> None:
        before = self.settings()
        state = self.prepare()
        self.server.sql(f"SET GLOBAL {flushing.HIGH_WATER} = 33")
        self.addCleanup(
            self.server.sql, f"SET GLOBAL {flushing.HIGH_WATER} = {before[flushing.HIGH_WATER]}"
        )
        self.client.restore(state.lease_id)
        after = self.settings()
        self.assertEqual(33, float(after[flushing.HIGH_WATER]))
        for name in set(before) - {flushing.HIGH_WATER}:
            self.assertEqual(before[name], after[name], name)

    def test_the_operator_is_told_that_all_is_well(self) -> None:
        self.settle()
        done = subprocess.run(
            self.agent.command("check", "--json"), capture_output=True, text=True, check=False
        )
        told = json.loads(done.stdout)
        problems = [each for each in told["findings"] if each["severity"] == "problem"]
        self.assertEqual([], problems)
        self.assertEqual(0, done.returncode, done.stderr)
        self.assertGreater(told["mapped_share"], 0)

    # What is killed

    def test_an_agent_killed_with_a_lease_is_succeeded_by_one_that_restores(self) -> None:
        before = self.settings()
        state = self.prepare()
        self.agent.kill()
        self.assertNotEqual(before, self.settings())
        self.agent.start()
        self.wait_for_new_agent()
        self.assertEqual(state.lease_id, self.client.renew(state.lease_id).lease_id)
        self.client.restore(state.lease_id)
        self.assertEqual(before, self.settings())

    def test_a_map_is_fetched_although_the_agent_is_killed_midway(self) -> None:
        self.settle()
        real, killed = self.client._caller._transport.call, []

        def call(method: str, request_id: str, arguments: dict[str, Any], timeout: float) -> Any:
            if method == "map_chunk" and arguments["index"] == 1 and not killed:
                self.agent.kill()
                killed.append(arguments["map_id"])
                self.agent.start()
            return real(method, request_id, arguments, timeout)

        transport = self.client._caller._transport
        transport.call = call  # type: ignore[method-assign]
        settings = client.ClientSettings(timeout=5, attempts=12, chunk_bytes=4096)
        fetched = fetch_map(
            client.AgentClient(ONE, transport, settings), MapLimits(max_chunk_bytes=4096)
        )
        self.assertEqual(1, len(killed))
        self.assertGreater(fetched.page_count, 1000)

    def test_the_lease_of_a_killed_agent_ends_with_its_successor(self) -> None:
        before = self.settings()
        self.prepare(lease_seconds=1)
        self.agent.kill()
        self.agent.start()
        wait_for(lambda: self.settings() == before, "settings as before")

    def test_the_operator_can_restore_what_a_killed_agent_has_left(self) -> None:
        before = self.settings()
        self.prepare()
        self.agent.kill()
        subprocess.run(self.agent.command("restore"), check=True, capture_output=True)
        self.assertEqual(before, self.settings())
        self.agent.start()
        self.wait_for_new_agent()

    def test_an_agent_whose_note_is_damaged_changes_nothing_until_the_operator_has_seen_to_it(
        self,
    ) -> None:
        before = self.settings()
        self.prepare()
        self.agent.kill()
        state = self.agent.configuration.parent / "state"
        for path in state.glob("preparation.*"):
            os.truncate(path, path.stat().st_size // 2)
        restored = subprocess.run(
            self.agent.command("restore"), capture_output=True, text=True, check=False
        )
        aside = sorted(state.glob("preparation.*"))
        self.assertEqual(1, restored.returncode)
        self.assertEqual(2, len(aside))
        for path in aside:
            self.assertIn(str(path), restored.stderr)

        self.agent.start()
        self.wait_for_new_agent()
        lowered = self.settings()
        error = self.assertRaises(exception.AgentRefused, self.client.prepare)
        self.assertEqual("lost-ledger", error.kwargs["code"])
        self.assertEqual(lowered, self.settings())
        self.assertIn("lost-ledger", [each.code for each in self.client.describe().findings])

        for name in reversed(flushing.ORDER):
            if name in before:
                self.server.sql(f"SET GLOBAL {name} = {before[name]}")
        for path in aside:
            path.unlink()
        self.client.restore(self.prepare().lease_id)
        self.assertEqual(before, self.settings())

    def test_an_agent_that_is_told_to_end_restores_first(self) -> None:
        before = self.settings()
        self.prepare()
        self.assertEqual(0, self.agent.terminate())
        self.assertEqual(before, self.settings())
        self.agent.start()
        self.wait_for_new_agent()

    def test_nothing_is_restored_over_the_settings_of_a_restarted_server(self) -> None:
        state = self.prepare()
        self.server.kill()
        self.server.start()
        # The operator's choice after the crash happens to be what the agent had set
        self.server.sql(f"SET GLOBAL {flushing.HIGH_WATER} = 0")
        after = self.settings()
        self.assertEqual("idle", self.client.restore(state.lease_id).state)
        self.assertEqual(after, self.settings())
        self.server.sql(f"SET GLOBAL {flushing.HIGH_WATER} = 90")

    def test_a_server_that_is_down_is_told_and_its_settings_are_its_own_afterwards(self) -> None:
        state = self.prepare()
        self.server.kill()
        self.assertFalse(self.client.health().servers[0].healthy)
        self.assertEqual("idle", self.client.restore(state.lease_id).state)
        self.assertRaises(exception.AgentRefused, self.client.prepare)
        self.server.start()
        wait_for(lambda: self.client.health().servers[0].healthy, "a healthy server")

    def test_a_broker_that_is_killed_costs_time_only(self) -> None:
        before = self.settings()
        state = self.prepare()
        self.broker.kill()
        self.assertRaises(
            exception.AgentUnreachable,
            client.AgentClient(
                ONE, self.client._caller._transport, client.ClientSettings(timeout=1, attempts=1)
            ).ping,
        )
        self.broker.start()
        wait_for(self.client.ping, "an answer over the new broker")
        self.assertEqual(self.incarnation, self.client.ping().incarnation)
        self.client.restore(state.lease_id)
        self.assertEqual(before, self.settings())


class Handler:
    def ping(self, arguments: messages.Nothing) -> messages.Pong:
        return messages.Pong("1", messages.VERSION, "one")


class IsolationTest(base.TestCase):
    """What a guest can do at the broker, with the permissions of the documentation."""

    broker: ClassVar[Broker]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(tls_broker.available())
        cls.broker = Broker([ONE, OTHER]).__enter__()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.broker.close()
        super().tearDownClass()

    def make_client(self, url: str, instance: str = ONE, timeout: float = 60) -> client.AgentClient:
        """:param timeout: seconds for one answer."""
        transport = rpc_broker.BrokerTransport(instance, url, messages.AGENT)
        made = client.AgentClient(instance, transport, client.ClientSettings(timeout, attempts=1))
        self.addCleanup(made.close)
        return made

    def serve(self, instance: str) -> rpc_broker.BrokerServer:
        server = rpc_broker.BrokerServer(
            instance,
            Dispatcher(Handler(), messages.AGENT),
            rpc_broker.make_conf(),
            self.broker.url(instance),
        )
        server.start()
        self.addCleanup(server.stop)
        self.assertTrue(server.wait_until_serving(60))
        return server

    def connect(self, instance: str, user: str | None = None) -> amqp.Connection:
        user = user or isolation.guest_user(instance)
        connection = amqp.Connection(
            f"127.0.0.1:{self.broker.port}",
            user,
            user,
            virtual_host=isolation.virtual_host(instance),
            login_method="PLAIN",
        )
        connection.connect()
        self.addCleanup(connection.close)
        return connection

    def assert_refused(self, action: Callable[[amqp.Channel], Any], code: int = 403) -> None:
        channel = self.connect(ONE).channel()
        error = self.assertRaises(amqp.exceptions.AMQPError, action, channel)
        self.assertEqual(code, error.reply_code)

    def test_the_hosts_reach_each_agent_by_its_own_virtual_host(self) -> None:
        self.serve(ONE)
        self.assertEqual("one", self.make_client(self.broker.host_url(ONE)).ping().incarnation)

    def test_an_instance_without_an_agent_is_noticed_at_once(self) -> None:
        asked = self.make_client(self.broker.host_url(OTHER), OTHER)
        error = self.assertRaises(exception.AgentUnreachable, asked.ping)
        self.assertIn("no agent is connected", str(error))

    def test_a_guest_cannot_enter_the_virtual_host_of_another(self) -> None:
        intruder = isolation.guest_user(ONE)
        error = self.assertRaises(amqp.exceptions.NotAllowed, self.connect, OTHER, intruder)
        self.assertEqual(530, error.reply_code)
        asked = self.make_client(self.broker.url(OTHER, intruder), OTHER, timeout=5)
        error = self.assertRaises(exception.AgentUnreachable, asked.ping)
        self.assertIn("refused", str(error))

    def test_a_guest_cannot_answer_for_another(self) -> None:
        server = rpc_broker.BrokerServer(
            OTHER,
            Dispatcher(Handler(), messages.AGENT),
            rpc_broker.make_conf(),
            self.broker.url(OTHER, isolation.guest_user(ONE)),
        )
        server.start()
        self.addCleanup(server.stop)
        asked = self.make_client(self.broker.host_url(OTHER), OTHER)
        self.assertRaises(exception.AgentUnreachable, asked.ping)
        self.assertFalse(server.wait_until_serving(1))

    def test_a_wrong_password_is_refused(self) -> None:
        url = self.broker.url(ONE, isolation.guest_user(ONE), "wrong")
        asked = self.make_client(url, timeout=5)
        error = self.assertRaises(exception.AgentUnreachable, asked.ping)
        self.assertIn("ACCESS_REFUSED", str(error))

    def test_what_a_host_leaves_at_the_broker_soon_makes_room(self) -> None:
        def left() -> list[str]:
            host = isolation.virtual_host(OTHER)
            listed = self.broker.control("list_queues", "-p", host, "name", "consumers")
            rows = (line.split() for line in listed.splitlines())
            return [name for name, count in rows if name.startswith("reply_") and count == "0"]

        self.serve(OTHER)
        asked = self.make_client(self.broker.host_url(OTHER), OTHER)
        wait_for(asked.ping, "an answer")
        asked.close()
        wait_for(left, "nobody waits for answers there")
        wait_for(lambda: not left(), "its queue is gone")

    def test_a_guest_cannot_read_the_answers_that_the_hosts_expect(self) -> None:
        self.serve(ONE)
        host = self.make_client(self.broker.host_url(ONE))
        host.ping()
        queues = self.broker.control("list_queues", "-p", isolation.virtual_host(ONE), "name")
        (reply,) = (name for name in queues.split() if name.startswith("reply_"))
        self.assert_refused(lambda channel: channel.basic_get(reply))
        self.assert_refused(lambda channel: channel.basic_consume(reply))
        self.assert_refused(lambda channel: channel.queue_purge(reply))
        self.assert_refused(lambda channel: channel.queue_delete(reply))

    def test_a_guest_cannot_make_other_queues_or_exchanges_or_ask_as_a_host(self) -> None:
        reply = "reply_" + uuid.uuid4().hex
        self.assert_refused(lambda channel: channel.queue_declare("anything"))
        self.assert_refused(lambda channel: channel.queue_declare(reply))
        self.assert_refused(lambda channel: channel.exchange_declare("anything", "topic"))
        self.assert_refused(lambda channel: channel.queue_declare("dmigrate-agentx"))

        def publish(channel: amqp.Channel) -> None:
            channel.confirm_select()
            channel.basic_publish_confirm(amqp.Message("x"), "amq.topic", "dmigrate-agent")

        self.assert_refused(publish)

    def test_requests_during_a_reconnection_are_all_answered(self) -> None:
        server = self.serve(ONE)
        asked = self.make_client(self.broker.host_url(ONE))
        asked.ping()
        server.reconnect()
        for _ in range(40):
            asked.ping()
        self.assertTrue(server.wait_until_serving(60))
        asked.ping()

    def test_the_documented_commands_give_what_the_definitions_give(self) -> None:
        third = str(uuid.uuid4())
        for arguments in isolation.commands(third, "password", HOST_USER):
            self.broker.control(*arguments)
        vhosts = [isolation.virtual_host(instance) for instance in (third, ONE)]
        made, defined = (
            self.broker.control("list_permissions", "-p", vhost).replace(vhost, "guest")
            for vhost in vhosts
        )
        self.assertEqual(sorted(defined.splitlines()), sorted(made.splitlines()))
        policies, expected = (
            self.broker.control("list_policies", "-p", vhost).replace(vhost, "vhost")
            for vhost in vhosts
        )
        self.assertEqual(expected, policies)
        for arguments in isolation.removal(third):
            self.broker.control(*arguments)
