# SPDX-License-Identifier: Apache-2.0
"""What the agent of a server has at the broker."""

import secrets

from nova_dmigrate.rpc import isolation, messages
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

    def served(self) -> bool:
        """Whether an agent waits for what it is asked."""
        host = isolation.virtual_host(self._instance)
        queues = self._broker.control("list_consumers", "-p", host, "queue_name").split()
        return messages.AGENT.topic in queues
