# SPDX-License-Identifier: Apache-2.0
"""A migration's beginning and end at the services of two hosts, with relays that hang."""

import base64
import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.buffermap import BufferMap, MapLimits, VolumeExtents
from nova_dmigrate.host.agents import AgentProxy
from nova_dmigrate.migration import relayed
from nova_dmigrate.migration.peers import ask_host
from nova_dmigrate.migration.relayed import Guest, Peers, RelayedMigration
from nova_dmigrate.migration.sessions import Terms
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.migration.waiting import Question
from nova_dmigrate.rpc import messages
from nova_dmigrate.rpc.client import AgentClient, ClientSettings
from nova_dmigrate.rpc.dispatcher import Dispatcher
from nova_dmigrate.rpc.host_client import HostChannelTransport, HostClient
from nova_dmigrate.rpc.host_messages import (
    HOST,
    AgentAnswer,
    AgentRequest,
    HelloArguments,
    HostState,
    OpenSource,
)
from tests.integration import host_base
from tests.lab.agent_port import agent_at
from tests.lab.broker import free_ports
from tests.lab.relays import PATIENCE, wait_until
from tests.unit.relay.guest import advised

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.rpc.broker import BrokerServer, BrokerTransport, make_conf

INSTANCE = "an-instance"
#: Where the destination relay does not listen.
MUTE = "127.0.0.2"
#: Of the agent's lease a third, in seconds, is between two renewals.
LEASE = 6.0
#: How a guest's memory lies, as its QEMU tells.
LAYOUT = Path(__file__).parents[1] / "unit" / "data" / "mtree" / "q35-64m.mtree"
MIB = 1 << 20

#: What services spoke before they could save chunks of maps.
BEFORE = dataclasses.replace(
    HOST,
    version="1.1",
    methods={name: each for name, each in HOST.methods.items() if name != "save_chunks"},
)

#: Both hosts have their sockets at the same path, as libvirt wants it, yet not in the same place.
OWN_SOCKETS = """
for configuration; do :; done
own=$(dirname "$configuration")/run
mkdir -p "$own" && mount --bind "$own" "$0" && exec "$@"
"""


class Agent:
    """Holds a lease, and makes a map that is never ready, unless it has one.

    :ivar asked: the methods, in the order of the requests.
    :ivar speaks: while it is not set, it does not answer.
    :ivar chunks: of its map.
    :ivar gives: while it is not set, it gives none of them.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.chunks: list[bytes] = []
        self.speaks = threading.Event()
        self.speaks.set()
        self.gives = threading.Event()
        self.gives.set()

    def ping(self, arguments: messages.Nothing) -> messages.Pong:
        self.speaks.wait(PATIENCE)
        return messages.Pong("1", messages.VERSION, "the-agent")

    def prepare(self, arguments: messages.PrepareArguments) -> messages.LeaseState:
        return self._lease("prepare", "ready")

    def renew(self, arguments: messages.RenewArguments) -> messages.LeaseState:
        return self._lease("renew", "ready")

    def restore(self, arguments: messages.LeaseArguments) -> messages.LeaseState:
        return self._lease("restore", "idle")

    def map_begin(self, arguments: messages.MapArguments) -> messages.MapState:
        self.asked.append("map_begin")
        return self._map()

    def map_state(self, arguments: messages.MapReference) -> messages.MapState:
        self.asked.append("map_state")
        return self._map()

    def map_chunk(self, arguments: messages.ChunkArguments) -> messages.Chunk:
        self.asked.append("map_chunk")
        self.gives.wait(PATIENCE)
        data = base64.b64encode(self.chunks[arguments.index]).decode()
        return messages.Chunk(arguments.index, data)

    def map_end(self, arguments: messages.MapReference) -> messages.Done:
        return messages.Done()

    def _lease(self, method: str, state: str) -> messages.LeaseState:
        self.asked.append(method)
        return messages.LeaseState("a-lease", state, True, 0.0, LEASE, "")

    def _map(self) -> messages.MapState:
        size, count = sum(map(len, self.chunks)), len(self.chunks)
        state = "ready" if self.chunks else "building"
        return messages.MapState("a-map", state, count, 256 * count, size, 0.0, "")


class Older:
    """A service that knows nothing of chunks which are saved.

    :param state: what it says of itself. :param ports: where those of guests are.
    """

    def __init__(self, state: HostState, ports: Path) -> None:
        self._state = state
        self._agents = AgentProxy([str(ports)])

    def hello(self, arguments: HelloArguments) -> HostState:
        if not BEFORE.speaks(arguments.version):
            raise exception.RequestRefused(reason=f"it speaks {BEFORE.version}", code="version")
        return self._state

    def agent(self, request: AgentRequest) -> AgentAnswer:
        return self._agents.ask(request)


def chunks_of_a_map() -> list[bytes]:
    """One MiB of a guest's memory."""
    begin = np.zeros(1, np.uint64)
    size = begin + np.uint64(MIB)
    extents = VolumeExtents("a-volume", 1 << 30, begin + np.uint64(16 * MIB), begin, size)
    return list(BufferMap.build([extents]).to_chunks())


@dataclasses.dataclass(frozen=True)
class Ways:
    """Where relays listen for the source's QEMU, and the destination's QEMU for its relay."""

    outgoing: Path
    incoming: Path


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
            "host__map_directories": f"{cls.place}/maps",
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
            manager = agent_at(self.ports / name, agent)
            manager.__enter__()
            self.addCleanup(manager.__exit__, None, None, None)

    def migration(
        self,
        enter: Callable[[str], None],
        *,
        timeout: float = 10.0,
        address: str | None = None,
        prepare_time: float = 0.0,
        map_first: bool = False,
    ) -> RelayedMigration:
        """One from host one to host two.

        :param timeout: seconds for a host's answer.
        :param address: where the source's relay looks for the destination's.
        :param map_first: nothing is begun without the map.
        """

        def agent(host: HostClient) -> AgentClient:
            port = str(self.ports / host.host)
            way = HostChannelTransport(INSTANCE, host, port)
            return AgentClient(INSTANCE, way, saver=way.save_chunks)

        clients = [each.client(timeout) for each in (self.one, self.two)]
        for each in clients:
            self.addCleanup(each.close)
        return RelayedMigration(
            "a-migration",
            INSTANCE,
            Guest(1 << 30, (), LAYOUT.read_text, lambda: self.runs_here),
            Peers(*clients, agent),
            OrchestrationSettings(
                self.place / "maps", prepare_time=prepare_time, lease=LEASE, min_mapped_share=0
            ),
            Terms(None, None, address, 0, 0, PATIENCE),
            str(self.sockets),
            300,
            enter,
            map_first,
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

        migration = self.migration(enter, timeout=5)
        self.assertRaises(exception.MigrationCancelled, migration.__enter__)
        service.send_signal(signal.SIGCONT)
        self.assert_nothing_left()

    def test_a_cancel_is_heard_while_a_host_does_not_say_hello(self) -> None:
        assert self.two.process is not None
        client = self.two.client()
        self.addCleanup(client.close)
        with stopped(self.two.process.pid):
            waiting = cancelled_after(3)
            self.assertRaises(
                exception.MigrationCancelled, ask_host, client, INSTANCE, PATIENCE, waiting
            )

    def test_a_cancel_is_heard_while_the_agent_does_not_answer_at_all(self) -> None:
        agent = self.agents["one"]
        agent.speaks.clear()
        self.addCleanup(agent.speaks.set)
        cancel = cancelled_after(3)
        migration = self.migration(lambda phase: cancel())
        self.assertRaises(exception.MigrationCancelled, migration.__enter__)
        self.assert_nothing_left()

    def test_a_busy_source_relay_gets_its_time_to_load_the_map(self) -> None:
        self.agents["one"].chunks = chunks_of_a_map()
        resumed = threading.Event()
        with contextlib.ExitStack() as stack:

            def enter(phase: str) -> None:
                if phase == "mapping" and not resumed.is_set():
                    (pid,) = self.one.relays()
                    stack.enter_context(stopped(pid))
                    resumed.set()
                    # Longer than a relay may take to tell how far the stream is
                    timer = threading.Timer(17, stack.close)
                    timer.start()
                    self.addCleanup(timer.join)

            with self.migration(enter, map_first=True) as migration:
                self.assertTrue(resumed.is_set())
                told = wait_until(lambda: migration.follow(None), "the relay tells of itself")
                self.assertEqual("offered", told["map"])
        self.assert_nothing_left()

    def test_a_cancel_is_heard_while_the_source_relay_loads_the_map(self) -> None:
        self.agents["one"].chunks = chunks_of_a_map()
        with contextlib.ExitStack() as stack:
            cancel = cancelled_after(5)

            def enter(phase: str) -> None:
                if phase == "mapping":
                    if not is_stopped:
                        is_stopped.extend(self.one.relays())
                        stack.enter_context(stopped(*is_stopped))
                    cancel()

            is_stopped: list[int] = []
            migration = self.migration(enter, map_first=True)
            self.assertRaises(exception.MigrationCancelled, migration.__enter__)
        self.assert_nothing_left()

    def test_the_map_is_asked_for_when_there_is_a_place(self) -> None:
        self.restart(self.two, host__max_relays=1)
        self.addCleanup(self.restart, self.two)
        other = self.pair()
        other.order = dataclasses.replace(
            other.order, qemu_socket=str(self.sockets / "another" / "qemu")
        )
        other.open_destination()
        other.destination.wait("running")
        asked, two = self.agents["one"].asked, self.client_of(self.two)
        waited = threading.Event()

        def enter(phase: str) -> None:
            if phase == "waiting" and not waited.is_set() and two.hello(PATIENCE).queued:
                self.assertNotIn("map_begin", asked)
                waited.set()
                two.close_session(other.order.session_id)

        with self.migration(enter):
            self.assertTrue(waited.is_set())
            wait_until(lambda: "map_begin" in asked, "the map is asked for")
        self.assert_nothing_left()

    def test_the_map_is_asked_for_when_there_is_a_place_at_the_source_as_well(self) -> None:
        self.restart(self.one, host__max_relays=1)
        self.addCleanup(self.restart, self.one)
        asked, one = self.agents["one"].asked, self.client_of(self.one)
        socket_path = str(self.sockets / "another" / "qemu")
        order = dataclasses.replace(self.pair().order, qemu_socket=socket_path)
        port = free_ports(1)[0]
        waited = threading.Event()

        def enter(phase: str) -> None:
            if phase == "starting relays" and not waited.is_set() and one.hello(PATIENCE).queued:
                self.assertNotIn("map_begin", asked)
                waited.set()
                one.close_session(order.session_id)

        with mute_listener(port, lambda: None):
            one.open_session(OpenSource(**vars(order), host=MUTE, port=port))
            with self.migration(enter):
                self.assertTrue(waited.is_set())
                wait_until(lambda: "map_begin" in asked, "the map is asked for")
        self.assert_nothing_left()

    def test_a_host_that_is_stopped_while_a_migration_waits_for_it(self) -> None:
        self.restart(self.two, host__max_relays=1)
        other = self.pair()
        other.order = dataclasses.replace(
            other.order, qemu_socket=str(self.sockets / "another" / "qemu")
        )
        # Before the pair is closed
        self.addCleanup(self.two.start)
        other.open_destination()
        other.destination.wait("running")
        two = self.client_of(self.two)
        stopping = threading.Event()

        def enter(phase: str) -> None:
            if phase == "waiting" and not stopping.is_set() and two.hello(PATIENCE).queued:
                self.two.terminate()
                stopping.set()

        reason = self.assertRaises(exception.FallBack, self.migration(enter).__enter__)
        self.assertEqual("host-draining", reason.kwargs["code"])
        two.close_session(other.order.session_id)
        self.assertEqual(0, self.two.wait())
        self.two.configure(**self.options())
        self.assert_nothing_left()

    def test_a_service_that_is_killed_while_a_map_is_made_and_fetched_costs_nothing(self) -> None:
        self.fetch_with_outages(self.one.kill, self.one.start)

    def test_a_broker_that_is_killed_while_a_map_is_made_and_fetched_costs_nothing(self) -> None:
        self.fetch_with_outages(self.broker.kill, self.broker.start)

    def fetch_with_outages(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        agent, host = self.agents["one"], self.client_of(self.one)
        way = HostChannelTransport(INSTANCE, host, str(self.ports / "one"))
        # As whoever migrates asks
        settings = ClientSettings(timeout=5, attempts=2, map_timeout=PATIENCE)
        client = AgentClient(INSTANCE, way, settings, saver=way.save_chunks)
        path = self.place / "maps" / "map"
        path.parent.mkdir(exist_ok=True)
        self.addCleanup(path.unlink, missing_ok=True)
        agent.gives.clear()
        self.addCleanup(agent.gives.set)
        saved: list[messages.MapState] = []
        fetch = threading.Thread(
            target=lambda: saved.append(client.save_map(path, MapLimits())), daemon=True
        )
        fetch.start()
        # An agent that has not answered at all yet is given up; the answer to "map_begin" has come
        # when something is asked after it
        for method in ("map_state", "map_chunk"):
            wait_until(lambda each=method: each in agent.asked, f"{method} is asked for")
            begin()
            # Longer than a few attempts take
            time.sleep(3)
            agent.chunks = chunks_of_a_map()
            if method == "map_chunk":
                agent.gives.set()
            end()
        fetch.join(PATIENCE)
        self.assertEqual(["ready"], [each.state for each in saved])
        self.assertEqual(MIB // 4096, BufferMap.load(path, MapLimits()).page_count)
        self.assertNotIn("chunks come one by one", self.log.output)

    def test_a_map_that_the_service_may_not_write_is_handed_on(self) -> None:
        self.agents["one"].chunks = chunks_of_a_map()
        way = HostChannelTransport(INSTANCE, self.client_of(self.one), str(self.ports / "one"))
        path = self.make_directory() / "map"
        AgentClient(INSTANCE, way, saver=way.save_chunks).save_map(path, MapLimits())
        self.assertEqual(MIB // 4096, BufferMap.load(path, MapLimits()).page_count)
        self.assertIn("chunks come one by one", self.log.output)

    def test_a_service_that_cannot_save_chunks_yet_hands_them_on(self) -> None:
        self.agents["one"].chunks = chunks_of_a_map()
        url = self.broker.services_url()
        said = dataclasses.replace(self.client_of(self.one).hello(), version=BEFORE.version)
        server = BrokerServer(
            "older", Dispatcher(Older(said, self.ports), BEFORE), make_conf(), url
        )
        server.start()
        self.addCleanup(server.stop)
        self.assertTrue(server.wait_until_serving(PATIENCE))
        host = HostClient("older", BrokerTransport("older", url, HOST))
        self.addCleanup(host.close)
        self.assertEqual(BEFORE.version, host.hello(PATIENCE).version)
        way = HostChannelTransport(INSTANCE, host, str(self.ports / "one"))
        path = self.make_directory() / "map"
        AgentClient(INSTANCE, way, saver=way.save_chunks).save_map(path, MapLimits())
        self.assertEqual(MIB // 4096, BufferMap.load(path, MapLimits()).page_count)
        self.assertIn("chunks come one by one", self.log.output)

    def test_a_migration_is_followed_while_its_source_does_not_answer(self) -> None:
        assert self.one.process is not None
        with self.migration(lambda phase: None, timeout=PATIENCE) as migration:
            wait_until(lambda: migration.follow(None), "the relay tells of itself")
            with stopped(self.one.process.pid):
                # It is cancelled by whoever follows it, so that must not wait for the answer
                follower = threading.Thread(target=migration.follow, args=(None,), daemon=True)
                follower.start()
                follower.join(PATIENCE)
                self.assertFalse(follower.is_alive())
            wait_until(lambda: migration.follow(None), "the relay tells of itself")
        self.assert_nothing_left()

    def test_what_nobody_expected_does_not_hold_the_switchover_back_for_ever(self) -> None:
        def unexpected() -> dict[str, object]:
            raise TypeError("this is a test")

        def set_limit(limit: int) -> bool:
            limits.append(limit)
            return True

        limits: list[int] = []
        with self.migration(lambda phase: None) as migration:
            with mock.patch.object(migration, "_progress", Question(unexpected)):
                with mock.patch.object(relayed, "_SILENCE", 1.0):
                    while not migration.converging:
                        migration.follow(set_limit)
                        time.sleep(0.2)
        self.assertEqual(migration.downtime_limit, limits[-1])
        self.assert_nothing_left()

    def test_a_host_that_does_not_answer_costs_the_other_one_no_lease(self) -> None:
        assert self.two.process is not None
        with self.migration(lambda phase: None, timeout=PATIENCE):
            before = self.one.relays()
            with stopped(self.two.process.pid):
                time.sleep(2 * LEASE)
                self.assertEqual(before, self.one.relays())
        self.assert_nothing_left()

    def test_a_relay_that_goes_on_after_the_end_is_told(self) -> None:
        ways = Ways(
            *(self.place / name / "run" / "a-migration" / "qemu" for name in ("one", "two"))
        )
        with contextlib.ExitStack() as stack:
            with self.migration(lambda phase: None):
                qemus = stack.enter_context(host_base.FakeMigration(ways))
                qemus.stream = memoryview(advised(bytes(qemus.stream)))
                qemus.send(0.5)
                for service in (self.one, self.two):
                    wait_until(
                        lambda each=service: (
                            [record["kept"] for record in each.records()] == [True]
                        ),
                        "only QEMU ends it",
                    )
            for role, host in (("source", "one"), ("destination", "two")):
                self.assertIn(f"the {role} relay of host {host} goes on, running", self.log.output)
            self.assertIn("post-copy may have begun", self.log.output)
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
def stopped(pid: int) -> Iterator[None]:
    """Meanwhile a process does nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def cancelled_after(count: int) -> Callable[[], None]:
    """Somebody waits, and has enough of it when asked so often."""
    asked = iter(range(count))

    def waiting() -> None:
        if next(asked, None) is None:
            raise exception.MigrationCancelled(instance=INSTANCE, reason="it was cancelled")

    return waiting


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
