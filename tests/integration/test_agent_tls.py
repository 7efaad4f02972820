# SPDX-License-Identifier: Apache-2.0
"""The agent as a process, and a RabbitMQ that takes nothing but TLS with certificates."""

import contextlib
import logging
import os
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path
from typing import ClassVar

from nova_dmigrate import exception
from nova_dmigrate.rpc import client, messages
from tests import base
from tests.lab import processes, tls_broker
from tests.unit.relay.wire.certificates import Authority

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.rpc import broker as rpc_broker

# At DEBUG they tell of every byte
for chatty in ("amqp", "oslo.messaging", "oslo_messaging", "stevedore"):
    logging.getLogger(chatty).setLevel(logging.INFO)

ONE = str(uuid.uuid4())
QUICK = client.ClientSettings(timeout=3, attempts=1)


class TlsTest(base.TestCase):
    """``brokers`` signs the broker's certificate, ``clients`` those of guests and hosts."""

    directory: ClassVar[Path]
    brokers: ClassVar[Authority]
    clients: ClassVar[Authority]
    broker: ClassVar[tls_broker.TlsBroker]
    _stack: ClassVar[contextlib.ExitStack]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(tls_broker.available())
        with contextlib.ExitStack() as stack:
            cls.directory = stack.enter_context(processes.workspace())
            os.chmod(cls.directory, 0o755)
            cls.brokers = Authority(cls.directory, "brokers")
            cls.clients = Authority(cls.directory, "clients")
            certificate, key = cls.brokers.issue("127.0.0.1")
            cls.broker = tls_broker.TlsBroker([ONE], certificate, key, cls.clients.certificate)
            stack.enter_context(cls.broker)
            cls._stack = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls._stack.close()
        super().tearDownClass()

    def options(self, authority: Authority, certificates: Authority | None) -> dict[str, str]:
        """What the administration guide says to set in ``[oslo_messaging_rabbit]``."""
        options = {"ssl": "true", "ssl_ca_file": str(authority.certificate)}
        if certificates is not None:
            certificate, key = certificates.issue("client.example.org")
            options |= {"ssl_cert_file": certificate, "ssl_key_file": key}
        return options

    def serve(self, authority: Authority) -> Path:
        """Start the agent as a process; the path of its log."""
        directory = self.make_directory()
        configuration, log = directory / "agent.conf", directory / "log"
        options = self.options(authority, self.clients)
        configuration.write_text(
            f"[DEFAULT]\ntransport_url = {self.broker.url(ONE)}\n"
            f"[agent]\ninstance = {ONE}\nstate_directory = {directory / 'state'}\n"
            "[oslo_messaging_rabbit]\n"
            + "".join(f"{name} = {value}\n" for name, value in options.items())
        )
        with log.open("wb") as output:
            agent = processes.spawn(
                [sys.executable, "-W", "ignore", "-m", "nova_dmigrate.cmd.agent"]
                + ["--config-file", str(configuration), "serve"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.addCleanup(processes.end, agent)
        return log

    def ask(
        self,
        authority: Authority,
        certificates: Authority | None,
        settings: client.ClientSettings = QUICK,
        at: str = "127.0.0.1",
    ) -> client.AgentClient:
        """The host's side with those options; ``at``: how it calls the broker's machine."""
        conf = rpc_broker.make_conf()
        for name, value in self.options(authority, certificates).items():
            conf.set_override(name, value == "true" or value, group="oslo_messaging_rabbit")
        url = self.broker.host_url(ONE).replace("127.0.0.1", at)
        transport = rpc_broker.BrokerTransport(ONE, url, messages.AGENT, conf)
        asked = client.AgentClient(ONE, transport, settings)
        self.addCleanup(asked.close)
        return asked

    def wait_for_agent(self) -> None:
        patient = client.ClientSettings(timeout=5, attempts=1)
        asked = self.ask(self.brokers, self.clients, patient)
        end = time.monotonic() + 90
        while time.monotonic() < end:
            with contextlib.suppress(exception.RpcError):
                asked.ping()
                return
            time.sleep(0.2)
        raise AssertionError("the agent does not answer")

    def test_the_right_certificates_let_agent_and_host_talk(self) -> None:
        self.serve(self.brokers)
        self.wait_for_agent()

    def test_a_host_refuses_a_broker_of_another_authority(self) -> None:
        self.serve(self.brokers)
        self.wait_for_agent()
        self.assertRaises(exception.AgentUnreachable, self.ask(self.clients, self.clients).ping)

    def test_an_agent_refuses_a_broker_of_another_authority(self) -> None:
        log = self.serve(self.clients)
        end = time.monotonic() + 90
        while "CERTIFICATE_VERIFY_FAILED" not in log.read_text(errors="replace"):
            self.assertLess(time.monotonic(), end, log.read_text(errors="replace"))
            time.sleep(0.2)
        self.assertRaises(exception.AgentUnreachable, self.ask(self.brokers, self.clients).ping)

    def test_the_broker_refuses_who_has_no_certificate_or_one_of_another_authority(self) -> None:
        self.serve(self.brokers)
        self.wait_for_agent()
        for certificates in (None, self.brokers):
            asked = self.ask(self.brokers, certificates)
            self.assertRaises(exception.AgentUnreachable, asked.ping)

    def test_a_broker_with_the_name_of_another_is_refused(self) -> None:
        self.serve(self.brokers)
        self.wait_for_agent()
        elsewhere = self.ask(self.brokers, self.clients, at="localhost")
        self.assertRaises(exception.AgentUnreachable, elsewhere.ping)

    def test_without_tls_there_is_no_answer(self) -> None:
        self.serve(self.brokers)
        self.wait_for_agent()
        transport = rpc_broker.BrokerTransport(ONE, self.broker.host_url(ONE), messages.AGENT)
        plain = client.AgentClient(ONE, transport, QUICK)
        self.addCleanup(plain.close)
        self.assertRaises(exception.AgentUnreachable, plain.ping)
