# SPDX-License-Identifier: Apache-2.0
"""What the agent of a server has at the broker."""

import contextlib
import secrets
from collections.abc import Iterator

from nova_dmigrate.rpc import isolation, messages
from nova_dmigrate.rpc.broker import BrokerTransport
from nova_dmigrate.rpc.client import AgentClient
from tests.lab.broker import HOST_USER, Broker


class AgentAccount:
    """A virtual host, which hosts enter as well, and a user.

    ``password``: of that user, at first.
    """

    def __init__(self, broker: Broker) -> None:
        self.password = secrets.token_hex(16)
        self._broker = broker
        self._instance = ""

    def make(self, instance: str) -> None:
        """Make it; the agent may already try to enter.

        :param instance: the server's id.
        """
        self._instance = instance
        for command in isolation.commands(instance, self.password, HOST_USER):
            self._broker.control(*command)

    def remove(self) -> None:
        """Remove it, with whoever is there."""
        for command in isolation.removal(self._instance):
            self._broker.control(*command)

    def url(self, address: str, instance: str) -> str:
        """Transport URL, as the agent has it.

        :param address: of the broker.
        :param instance: the server's id, or what is in its place.
        """
        # Names are those of an id, for which there may be something else yet
        nobody = "00000000-0000-0000-0000-000000000000"
        user, host = (
            name(nobody).replace(nobody, instance)
            for name in (isolation.guest_user, isolation.virtual_host)
        )
        return f"rabbit://{user}:{self.password}@{address}:{self._broker.port}/{host}"

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """The agent is not let in meanwhile: its password is another one."""
        user = isolation.guest_user(self._instance)
        try:
            self._broker.control("change_password", user, secrets.token_hex(16))
            self.disconnect()
            yield
        finally:
            self._broker.control("change_password", user, self.password)

    def disconnect(self) -> None:
        """End all connections to the virtual host; whoever may enter comes back."""
        host = isolation.virtual_host(self._instance)
        self._broker.control("close_all_connections", "--vhost", host, "the lab ends it")

    @contextlib.contextmanager
    def agent(self) -> Iterator[AgentClient]:
        """The way of a host to the agent."""
        url = self._broker.host_url(self._instance)
        transport = BrokerTransport(self._instance, url, messages.AGENT)
        with AgentClient(self._instance, transport) as client:
            yield client

    def served(self) -> bool:
        """Whether an agent waits for what it is asked."""
        host = isolation.virtual_host(self._instance)
        queues = self._broker.control("list_consumers", "-p", host, "queue_name").split()
        return messages.AGENT.topic in queues
