# SPDX-License-Identifier: Apache-2.0
"""The broker's transport as far as it can be tested without one: oslo.messaging's fake driver."""

import contextlib
import dataclasses
import re
import socket
import subprocess
import sys
import textwrap
import uuid
import warnings

from nova_dmigrate import exception
from nova_dmigrate.rpc import client, isolation, messages
from nova_dmigrate.rpc.dispatcher import Dispatcher
from tests import base
from tests.unit.rpc.test_dispatcher import Handler

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used

    from nova_dmigrate.rpc import broker


class BrokerTest(base.TestCase):
    def test_a_broker_that_is_not_there_is_noticed_at_once(self) -> None:
        transport = broker.BrokerTransport("i", "rabbit://u:p@127.0.0.1:1/v", messages.AGENT)
        self.addCleanup(transport.close)
        error = self.assertRaises(exception.AgentUnreachable, transport.call, "ping", "r", {}, 60)
        self.assertIn("no broker can be reached", str(error))

    def test_a_broker_that_is_silent_does_not_keep_the_next_one_from_being_tried(self) -> None:
        with contextlib.ExitStack() as stack:
            silent = stack.enter_context(socket.socket())
            silent.bind(("127.0.0.1", 0))
            silent.listen(0)
            # Its queue is full: whoever connects now hears nothing
            for _ in range(8):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(silent.getsockname())
            open_one = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports = [each.getsockname()[1] for each in (silent, open_one)]
            addresses = ",".join(f"u:p@127.0.0.1:{port}" for port in ports)
            transport = broker.BrokerTransport("i", f"rabbit://{addresses}/v", messages.AGENT)
            stack.callback(transport.close)
            # Longer than the test may take
            transport._check_broker(3600)
            transport._addresses.pop()
            error = self.assertRaises(exception.AgentUnreachable, transport._check_broker, 0.2)
            self.assertIn("no broker can be reached", str(error))

    def test_requests_pass_through_oslo_messaging(self) -> None:
        instance = str(uuid.uuid4())
        handler = Handler()
        server = broker.BrokerServer(
            instance, Dispatcher(handler, messages.AGENT), broker.make_conf(), "fake://one/"
        )
        server.start()
        self.addCleanup(server.stop)
        self.assertTrue(server.wait_until_serving(60))
        transport = broker.BrokerTransport(instance, "fake://one/", messages.AGENT)
        self.addCleanup(transport.close)
        asked = client.AgentClient(instance, transport)
        self.assertEqual("abc", asked.ping().incarnation)
        handler.error = RuntimeError("broken")
        error = self.assertRaises(exception.AgentRefused, asked.ping)
        self.assertIn("RuntimeError: broken", str(error))

    def test_the_endpoint_has_the_protocols_methods_and_no_others(self) -> None:
        endpoint = broker.Endpoint(Dispatcher(Handler(), messages.AGENT))
        for method in messages.METHODS:
            self.assertTrue(callable(getattr(endpoint, method)))
        public = {name for name in dir(endpoint) if not name.startswith("_")}
        self.assertEqual({"target"}, public)
        self.assertFalse(hasattr(endpoint, "other"))

    def test_an_agent_of_another_version_is_told_as_such(self) -> None:
        instance = str(uuid.uuid4())
        other = dataclasses.replace(messages.AGENT, version="2.0")
        server = broker.BrokerServer(
            instance, Dispatcher(Handler(), other), broker.make_conf(), "fake://three/"
        )
        server.start()
        self.addCleanup(server.stop)
        self.assertTrue(server.wait_until_serving(60))
        transport = broker.BrokerTransport(instance, "fake://three/", messages.AGENT)
        self.addCleanup(transport.close)
        asked = client.AgentClient(instance, transport)
        error = self.assertRaises(exception.AgentRefused, asked.ping)
        self.assertEqual("version", error.kwargs["code"])

    def test_an_older_agent_serves_what_it_has(self) -> None:
        instance = str(uuid.uuid4())
        methods = {name: each for name, each in messages.METHODS.items() if each.since == "1.0"}
        older = dataclasses.replace(messages.AGENT, version="1.0", methods=methods)
        server = broker.BrokerServer(
            instance, Dispatcher(Handler(), older), broker.make_conf(), "fake://four/"
        )
        server.start()
        self.addCleanup(server.stop)
        self.assertTrue(server.wait_until_serving(60))
        transport = broker.BrokerTransport(instance, "fake://four/", messages.AGENT)
        self.addCleanup(transport.close)
        asked = client.AgentClient(instance, transport)
        self.assertEqual("abc", asked.ping().incarnation)
        error = self.assertRaises(exception.AgentRefused, asked.warm_up)
        self.assertEqual("version", error.kwargs["code"])

    def test_one_that_is_left_open_does_not_keep_the_process_from_its_end(self) -> None:
        # The interpreter closes it when it takes the module apart
        code = """
        import contextlib

        from nova_dmigrate.rpc import broker, messages

        @contextlib.contextmanager
        def opened():
            transport = broker.BrokerTransport("i", "fake:/", messages.AGENT)
            try:
                yield
            finally:
                print("closing", flush=True)
                transport.close()

        way = opened()
        way.__enter__()
        """
        argv = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
        ended = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
        self.assertEqual("closing\n", ended.stdout)

    def test_no_class_of_the_other_sides_choice_is_allowed(self) -> None:
        transport = broker.BrokerTransport("i", "fake://two/", messages.AGENT)
        self.addCleanup(transport.close)
        driver = transport._requesters._current._transport._driver
        self.assertEqual([], driver._allowed_remote_exmods)


class IsolationTest(base.TestCase):
    def test_only_uuids_become_names_at_the_broker(self) -> None:
        for name in ("", "*", "a", "../x", str(uuid.uuid4()).upper(), str(uuid.uuid4()) + "\n"):
            self.assertRaises(ValueError, isolation.virtual_host, name)

    def test_the_agents_names_are_allowed_and_the_hosts_are_not(self) -> None:
        instance = str(uuid.uuid4())
        agent = [
            messages.AGENT.topic,
            f"{messages.AGENT.topic}.{instance}",
            f"{messages.AGENT.topic}_fanout",
            f"{messages.AGENT.topic}_fanout_{uuid.uuid4().hex}",
        ]
        reply = f"reply_{uuid.uuid4().hex}"
        for pattern in (isolation.GUEST.configure, isolation.GUEST.write, isolation.GUEST.read):
            for name in agent:
                self.assertTrue(re.search(pattern, name), (pattern, name))
            for name in (reply, "other", "amq.topic", f"x{messages.AGENT.topic}"):
                self.assertFalse(re.search(pattern, name), (pattern, name))
        for pattern in (isolation.HOST.configure, isolation.HOST.write, isolation.HOST.read):
            self.assertTrue(re.search(pattern, reply))
            for name in agent:
                self.assertFalse(re.search(pattern, name), (pattern, name))
