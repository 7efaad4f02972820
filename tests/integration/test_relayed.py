# SPDX-License-Identifier: Apache-2.0
"""A migration's beginning and end at the services of two hosts, with relays that hang."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from nova_dmigrate import exception
from nova_dmigrate.migration.relayed import Guest, Peers, RelayedMigration
from nova_dmigrate.migration.sessions import Terms
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.client import AgentClient
from nova_dmigrate.rpc.host_client import HostChannelTransport, HostClient
from tests.integration import host_base
from tests.lab.broker import free_ports
from tests.lab.relays import PATIENCE, wait_until

INSTANCE = "an-instance"
#: Where the destination relay does not listen.
MUTE = "127.0.0.2"
#: Of the agent's lease a third, in seconds, is between two renewals.
LEASE = 6.0

#: Both hosts have their sockets at the same path, as libvirt wants it, yet not in the same place.
OWN_SOCKETS = """
for configuration; do :; done
own=$(dirname "$configuration")/run
mkdir -p "$own" && mount --bind "$own" "$0" && exec "$@"
"""


class Agent:
    """Holds a lease, and makes a map that is never ready.

    :ivar asked: the methods, in the order of the requests.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ping(self, arguments: messages.Nothing) -> messages.Pong:
        return messages.Pong("1", messages.VERSION, "the-agent")

    def prepare(self, arguments: messages.PrepareArguments) -> messages.LeaseState:
        return self._lease("prepare", "ready")

    def renew(self, arguments: messages.RenewArguments) -> messages.LeaseState:
        return self._lease("renew", "ready")

    def restore(self, arguments: messages.LeaseArguments) -> messages.LeaseState:
        return self._lease("restore", "idle")

    def map_begin(self, arguments: messages.MapArguments) -> messages.MapState:
        return messages.MapState("a-map", "building", 0, 0, 0, 0.0, "")

    def map_state(self, arguments: messages.MapReference) -> messages.MapState:
        return messages.MapState("a-map", "building", 0, 0, 0, 0.0, "")

    def map_end(self, arguments: messages.MapReference) -> messages.Done:
        return messages.Done()

    def _lease(self, method: str, state: str) -> messages.LeaseState:
        self.asked.append(method)
        return messages.LeaseState("a-lease", state, True, 0.0, LEASE, "")


class RelayedMigrationTest(host_base.Hosts):
    ports: ClassVar[Path]
    sockets: ClassVar[Path]
    relay_port: ClassVar[int] = 0

    @classmethod
    def options(cls) -> dict[str, object]:
        cls.relay_port = cls.relay_port or free_ports(1)[0]
        return {
            "host__socket_directory": cls.sockets,
            "host__channel_directories": cls.ports,
            "wire__port": cls.relay_port,
            "wire__handshake_timeout": 120,
            "relay__connect_timeout": 600,
        }

    @classmethod
    def prefix(cls) -> list[str]:
        cls.sockets, cls.ports = cls.place / "sockets", cls.place / "ports"
        for path in (cls.sockets, cls.ports):
            path.mkdir(exist_ok=True)
        return ["unshare", "--mount", "sh", "-ec", OWN_SOCKETS, str(cls.sockets)]

    def setUp(self) -> None:
        super().setUp()
        self.runs_here = True
        self.agents = {"one": Agent(), "two": Agent()}
        for name, agent in self.agents.items():
            manager = host_base.agent_at(self.ports / name, agent)
            manager.__enter__()
            self.addCleanup(manager.__exit__, None, None, None)

    def migration(
        self,
        enter: Callable[[str], None],
        *,
        timeout: float = 10.0,
        address: str | None = None,
        prepare_time: float = 0.0,
    ) -> RelayedMigration:
        """One from host one to host two.

        :param timeout: seconds for a host's answer.
        :param address: where the source's relay looks for the destination's.
        """

        def agent(host: HostClient) -> AgentClient:
            port = str(self.ports / host.host)
            return AgentClient(INSTANCE, HostChannelTransport(INSTANCE, host, port))

        clients = [each.client(timeout) for each in (self.one, self.two)]
        for each in clients:
            self.addCleanup(each.close)
        return RelayedMigration(
            "a-migration",
            INSTANCE,
            Guest(1 << 30, (), lambda: "the layout", lambda: self.runs_here),
            Peers(*clients, agent),
            OrchestrationSettings(self.place / "maps", prepare_time=prepare_time, lease=LEASE),
            Terms(None, None, address, 0, 0, PATIENCE),
            str(self.sockets),
            300,
            enter,
        )

    def test_a_cancel_is_heard_while_the_source_relay_waits_for_the_other_one(self) -> None:
        cancelled = threading.Event()

        def enter(phase: str) -> None:
            if cancelled.is_set():
                raise exception.MigrationCancelled(instance=INSTANCE, reason="it was cancelled")

        with mute_listener(self.relay_port, cancelled.set):
            migration = self.migration(enter, address=MUTE)
            self.assertRaises(exception.MigrationCancelled, migration.__enter__)
        self.assert_nothing_left()

    def test_a_cancel_is_heard_while_a_host_does_not_answer(self) -> None:
        assert self.two.process is not None
        service = self.two.process
        self.addCleanup(service.send_signal, signal.SIGCONT)
        heard: list[str] = []

        def enter(phase: str) -> None:
            if phase == "starting relays":
                if not heard:
                    service.send_signal(signal.SIGSTOP)
                heard.append(phase)
            if len(heard) > 3:
                raise exception.MigrationCancelled(instance=INSTANCE, reason="it was cancelled")

        migration = self.migration(enter, timeout=2)
        self.assertRaises(exception.MigrationCancelled, migration.__enter__)
        service.send_signal(signal.SIGCONT)
        self.assert_nothing_left()

    def test_an_agent_that_has_moved_is_not_asked_where_it_was(self) -> None:
        before, after = self.agents["one"].asked, self.agents["two"].asked
        with self.migration(lambda phase: None, prepare_time=1):
            wait_until(lambda: "renew" in before, "the lease is renewed")
            # To end them takes several times what is between two renewals
            for pid in (*self.one.relays(), *self.two.relays()):
                os.kill(pid, signal.SIGSTOP)
            self.runs_here = False
            count = len(before)
        # One may have been on its way
        self.assertLessEqual(len(before), count + 1)
        self.assertEqual(["restore"], after)
        self.assert_nothing_left()


@contextlib.contextmanager
def mute_listener(port: int, on_connection: Callable[[], None]) -> Iterator[None]:
    """Accepts connections, and says nothing."""
    with socket.create_server((MUTE, port)) as listener, contextlib.ExitStack() as connections:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.enter_context(listener.accept()[0])
                    on_connection()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)
