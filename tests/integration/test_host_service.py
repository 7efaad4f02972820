# SPDX-License-Identifier: Apache-2.0
"""Services of two hosts as processes, with a real RabbitMQ and real relays; each is killed."""

import configparser
import contextlib
import dataclasses
import grp
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from nova_dmigrate import exception
from nova_dmigrate.rpc import channel, client, host_messages, messages
from nova_dmigrate.rpc.dispatcher import Dispatcher
from nova_dmigrate.rpc.host_client import HostChannelTransport, HostClient
from nova_dmigrate.rpc.host_messages import HOST, SessionState
from tests import base
from tests.lab import processes, relays, tls_broker
from tests.lab.broker import Broker, free_ports
from tests.lab.guest import Guest
from tests.lab.host_services import HostService, ServedPair, ServedRelay
from tests.lab.migrations import MigrationTestCase
from tests.lab.relays import PATIENCE, VOLUME, wait_until
from tests.unit.relay.guest import FakeGuest, received_memory
from tests.unit.relay.wire.certificates import Authority
from tests.unit.volumes.loop import LoopDevice

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet's, of which nothing is used
    from nova_dmigrate.rpc.broker import BrokerServer, BrokerTransport, make_conf

MIB = 1 << 20
#: What "within two seconds" may become on a machine that is busy with other things.
SOON = 15.0
UNIT = Path(__file__).parents[2] / "etc" / "systemd" / "nova-dmigrate-host.service"
BOUNDING = "CapabilityBoundingSet"


class FakeMigration:
    """Both QEMUs of a pair that runs, with a small make-believe guest."""

    def __init__(
        self, pair: ServedPair, ram_pages: int = 2048, guest: FakeGuest | None = None
    ) -> None:
        self.pair = pair
        self.guest = guest or FakeGuest(1, ram_pages=ram_pages, mapped=0)
        self.stream = memoryview(self.guest.stream())
        self.recorded = bytearray()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(pair.incoming))
        self._listener.listen()
        self._recorder = threading.Thread(target=self._record, daemon=True)
        self._recorder.start()
        self._qemu = socket.socket(socket.AF_UNIX)
        self._qemu.settimeout(PATIENCE)
        self._qemu.connect(str(pair.outgoing))

    def send(self, share: float = 1.0) -> None:
        """Send that share of what is left."""
        size = int(len(self.stream) * share)
        self._qemu.sendall(self.stream[:size])
        self.stream = self.stream[size:]

    def finish(self, *relays: ServedRelay) -> None:
        """Send the rest, and wait until both relays, or these, have told that they have delivered
        it.
        """
        self.send()
        self._qemu.shutdown(socket.SHUT_WR)
        self._recorder.join(PATIENCE)
        for relay in relays or (self.pair.source, self.pair.destination):
            relay.wait("delivered")
        memory, _ = received_memory(bytes(self.recorded), self.guest.ram_pages)
        assert (memory == self.guest.memory).all(), "pages differ"

    def broken(self) -> bool:
        """Whether QEMU sees, now or soon, that its migration has failed."""
        try:
            return self._qemu.recv(1) == b""
        except OSError:
            return True

    def close(self) -> None:
        self._qemu.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._recorder.join(PATIENCE)

    def __enter__(self) -> "FakeMigration":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self) -> None:
        with contextlib.suppress(OSError):
            qemu, _ = self._listener.accept()
            with qemu:
                while data := qemu.recv(MIB):
                    self.recorded.extend(data)


class Hosts(base.TestCase):
    """Two hosts, ``one`` and ``two``, with a broker; shared by the tests of a class."""

    resources: ClassVar[contextlib.ExitStack]
    place: ClassVar[Path]
    broker: ClassVar[Broker]
    one: ClassVar[HostService]
    two: ClassVar[HostService]

    @classmethod
    def options(cls) -> dict[str, object]:
        """Of both services."""
        return {"host__max_relays": 2}

    @classmethod
    def prefix(cls) -> list[str]:
        """The command that runs both services."""
        return []

    @classmethod
    def setUpClass(cls) -> None:
        base.require(tls_broker.available())
        super().setUpClass()
        with contextlib.ExitStack() as stack:
            cls.place = stack.enter_context(processes.workspace())
            cls.broker = stack.enter_context(Broker([]))
            for name in ("one", "two"):
                service = HostService(
                    name,
                    cls.place / name,
                    cls.broker.services_url(),
                    cls.prefix(),
                    **cls.options(),
                )
                stack.callback(service.close)
                service.start()
                setattr(cls, name, service)
            cls.resources = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.resources.close()
        super().tearDownClass()

    def setUp(self) -> None:
        super().setUp()
        self.addOnException(lambda *_: self.tell())

    def tell(self) -> None:
        for service in (self.one, self.two):
            sys.stderr.write(f"\n--- {service.name} ---\n{service.last_words()}\n")

    def pair(self, reverse: bool = False, **options: Any) -> ServedPair:
        """A pair of relays that are not opened yet; ended with the test."""
        hosts = (self.two, self.one) if reverse else (self.one, self.two)
        pair = ServedPair(hosts, **options)
        self.addCleanup(pair.close)
        return pair

    def fake(self, pair: ServedPair, **options: Any) -> FakeMigration:
        migration = FakeMigration(pair, **options)
        self.addCleanup(migration.close)
        return migration

    def client_of(self, service: HostService) -> HostClient:
        made = service.client()
        self.addCleanup(made.close)
        return made

    def restart(self, service: HostService, **options: object) -> None:
        """With other options until the end of the test."""
        service.configure(**{**self.options(), **options})
        service.terminate()
        self.assertEqual(0, service.wait())
        service.start()

    def assert_nobody_migrates(self, tls_names: tuple[str, str] | None = None) -> None:
        """A migration between QEMUs of an ordinary user."""
        # As the directories above the real ones are
        for path in (self.place, self.place / "one", self.place / "two"):
            path.chmod(0o711)
        pair = self.pair(tls_names=tls_names)
        pair.open_destination()
        destination = as_nobody(RECEIVER, pair.incoming)
        self.addCleanup(processes.end, destination)
        wait_until(pair.incoming.exists, "the destination's QEMU listens")
        pair.destination.wait("running")
        pair.open_source()
        pair.source.wait("running")
        stream = self.place / "stream"
        stream.write_bytes(FakeGuest(1, ram_pages=1024, mapped=0).stream())
        stream.chmod(0o644)
        source = as_nobody(SENDER, pair.outgoing, stream)
        self.addCleanup(processes.end, source)
        self.assertEqual((0, 0), (source.wait(PATIENCE), destination.wait(PATIENCE)))
        for relay in (pair.source, pair.destination):
            relay.wait("delivered")
        pair.close_sessions()
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        for service in (self.one, self.two):
            wait_until(lambda each=service: not each.left_behind(), "nothing is left")
            self.assertEqual([], service.relays())

    def assert_refused(self, code: str, ask: Callable[..., Any], *arguments: Any) -> str:
        error = self.assertRaises(exception.HostRefused, ask, *arguments)
        self.assertEqual(code, error.kwargs["code"], error)
        return str(error)


class SessionsTest(Hosts):
    def test_a_migration_leaves_nothing_but_its_summaries(self) -> None:
        pair = self.pair().open()
        self.assertEqual("127.0.0.1", pair.destination.renew().host)
        migration = self.fake(pair)
        migration.send(0.5)
        progress = wait_until(lambda: pair.source.progress(), "progress")
        self.assertEqual(("source", "running"), (progress["role"], progress["state"]))
        migration.finish()
        migration.close()
        for state, relay in zip(
            pair.close_sessions(), (pair.source, pair.destination), strict=True
        ):
            self.assertEqual(("delivered", ""), (state.state, state.message))
            summary = relay.client.summary(relay.session_id)
            assert summary is not None
            self.assertEqual("delivered", summary["state"])
            self.assertGreater(summary["wire_bytes"], 0)
            self.assertIn("series", summary)
            self.assertTrue(Path(state.summary_path).is_file())
            self.assert_refused("unknown-session", relay.renew)
        self.assert_nothing_left()

    def test_a_host_keeps_only_so_many_summaries(self) -> None:
        self.restart(self.one, host__summary_count=2)
        self.addCleanup(self.restart, self.one)
        for _ in range(3):
            pair = self.pair().open()
            pair.close_sessions()
            newest = pair.order.session_id
        summaries = self.one.state / "summaries"
        wait_until(lambda: len(list(summaries.iterdir())) == 2, "the oldest summary is removed")
        self.assertTrue((summaries / f"{newest}.json").is_file())

    def test_the_host_tells_of_itself(self) -> None:
        state = self.client_of(self.one).hello()
        self.assertEqual(("one", "127.0.0.1"), (state.host, state.migration_address))
        self.assertEqual((False, False), (state.tls, state.draining))
        self.assertEqual((("block",), 2), (state.drivers, state.max_relays))
        self.assertEqual(str(self.one.sockets), state.socket_directory)

    def test_opening_twice_opens_once(self) -> None:
        pair = self.pair().open()
        self.assertEqual("running", pair.open_destination().state)
        self.assertEqual("running", pair.open_source().state)
        self.assertEqual((1, 1), (len(self.one.relays()), len(self.two.relays())))
        other = self.pair()
        other.order = dataclasses.replace(other.order, session_id=pair.order.session_id)
        self.assert_refused("in-use", other.open_destination)
        other.order = dataclasses.replace(
            other.order, session_id=str(uuid.uuid4()), qemu_socket=pair.order.qemu_socket
        )
        self.assert_refused("in-use", other.open_destination)

    def test_the_token_is_on_no_disk_while_a_relay_runs(self) -> None:
        pair = self.pair().open()
        for service in (self.one, self.two):
            for path in self.place.joinpath(service.name).rglob("*"):
                if path.is_file():
                    self.assertNotIn(pair.order.token.encode(), path.read_bytes(), path)
            self.assertEqual(0o700, (service.state / "sessions").stat().st_mode & 0o777)
            self.assertEqual(0o711, service.sockets.stat().st_mode & 0o777)

    def test_a_closed_migration_ends_wherever_it_is(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.5)
        states = pair.close_sessions()
        self.assertEqual("cancelled", states[0].state)
        self.assertIn(states[1].state, ("failed", "cancelled"))
        self.assertTrue(migration.broken())
        self.assert_nothing_left()

    def test_a_killed_relay_is_told_and_the_other_one_ends(self) -> None:
        pair = self.pair().open()
        migration = self.fake(pair)
        migration.send(0.5)
        (pid,) = self.two.relays()
        os.kill(pid, signal.SIGKILL)
        state = pair.destination.wait("failed")
        self.assertIn("killed", state.message)
        self.assertIn("peer", pair.source.wait("failed").message.lower())
        self.assertTrue(migration.broken())
        self.assertIsNone(pair.destination.client.summary(pair.order.session_id))
        pair.close_sessions()
        self.assert_nothing_left()

    def test_a_relay_that_hangs_is_killed(self) -> None:
        pair = self.pair().open()
        (pid,) = self.two.relays()
        os.kill(pid, signal.SIGSTOP)
        state = pair.destination.client.close_session(pair.order.session_id)
        self.assertEqual("failed", state.state)
        self.assertEqual([], self.two.relays())

    def test_a_relay_that_cannot_start_says_why(self) -> None:
        pair = self.pair()
        pair.open_destination()
        pair.destination.wait("running")
        pair.destination.client.close_session(pair.order.session_id)
        order = pair.order
        state = pair.source.client.open_session(
            host_messages.OpenSource(
                order.migration_id,
                order.instance,
                order.session_id,
                order.token,
                str(pair.outgoing),
                "127.0.0.1",
                free_ports(1)[0],
            )
        )
        self.assertEqual("starting", state.state)
        state = pair.source.wait("failed")
        self.assertIn("refused", state.message)
        pair.source.client.close_session(order.session_id)
        self.assert_nothing_left()

    # Leases

    def test_sessions_whose_requester_is_gone_end_and_leave_nothing(self) -> None:
        waiting, moving = (self.pair().open() for _ in range(2))
        queued = self.pair(lease_seconds=2, wait_seconds=60)
        self.assertEqual("queued", queued.open_destination().state)
        migration = self.fake(moving)
        migration.send(0.5)
        for pair in (waiting, moving):
            pair.renew(2)
        self.assertTrue(migration.broken())
        migration.close()
        self.assert_nothing_left()
        self.assertEqual([], self.two.records())
        self.assert_refused("unknown-session", queued.destination.renew)

    # Room

    def test_relays_beyond_the_limit_wait_for_their_turn(self) -> None:
        pairs = [self.pair(wait_seconds=300) for _ in range(4)]
        states = [pair.open_destination() for pair in pairs]
        self.assertEqual(
            ["starting", "starting", "queued", "queued"], [state.state for state in states]
        )
        self.assertEqual([0, 0, 1, 2], [state.queue_position for state in states])
        self.assertIn("2 destination relays run", states[3].message)
        hello = pairs[0].destination.client.hello()
        self.assertEqual((2, 2), (hello.relays, hello.queued))
        pairs[1].destination.client.close_session(pairs[1].order.session_id)
        pairs[2].destination.wait("running")
        state = pairs[3].destination.renew()
        self.assertEqual(("queued", 1), (state.state, state.queue_position))
        state = pairs[3].destination.client.close_session(pairs[3].order.session_id)
        self.assertEqual("cancelled", state.state)

    def test_who_does_not_want_to_wait_is_told_at_once(self) -> None:
        for _ in range(2):
            self.pair().open_destination()
        late = self.pair(wait_seconds=0)
        late.open_destination()
        state = late.destination.wait("failed")
        self.assertIn("no room", state.message)

    def test_hosts_that_migrate_to_each_other_do_not_wait_for_each_other(self) -> None:
        pairs = [self.pair(reverse=bool(number % 2), wait_seconds=300) for number in range(4)]
        for pair in pairs:
            pair.open_destination()
        for pair in pairs:
            pair.destination.wait("running")
        for pair in pairs:
            pair.open_source()
            pair.source.wait("running")
        self.assertEqual(4, self.client_of(self.one).hello().relays)


class PermissionsTest(Hosts):
    """What the hosts do not allow."""

    @classmethod
    def options(cls) -> dict[str, object]:
        return {
            "host__max_lease": 5,
            "host__volume_directories": f"{cls.place}/volumes,{cls.place}/vol-*,/dev/loop*",
            "host__map_directories": f"{cls.place}/maps",
            "host__channel_directories": f"{cls.place}/ports",
        }

    def test_a_lease_is_not_longer_than_the_host_wants(self) -> None:
        pair = self.pair(lease_seconds=3600)
        self.assertLessEqual(pair.open_destination().lease_remaining, 5)
        self.assertLessEqual(pair.destination.renew().lease_remaining, 5)

    def test_sockets_are_nowhere_else(self) -> None:
        pair = self.pair()
        for path in (
            "/tmp/qemu",
            str(self.two.sockets),
            f"{self.two.sockets}/a/b/qemu",
            f"{self.two.sockets}/{pair.order.session_id}.control",
            f"{self.two.sockets}//qemu",
        ):
            pair.order = dataclasses.replace(pair.order, qemu_socket=path)
            self.assert_refused("socket-not-allowed", pair.open_destination)
        (self.two.sockets / "link").symlink_to("/tmp")
        self.addCleanup((self.two.sockets / "link").unlink)
        pair.order = dataclasses.replace(pair.order, qemu_socket=f"{self.two.sockets}/link/qemu")
        self.assert_refused("socket-not-allowed", pair.open_destination)

    def test_only_volumes_in_the_allowed_places_are_read(self) -> None:
        volumes = self.place / "volumes"
        volumes.mkdir()
        self.addCleanup(shutil.rmtree, volumes)
        inside, outside = volumes / "inside", self.place / "outside"
        for path in (inside, outside):
            path.write_bytes(bytes(MIB))
        (volumes / "link").symlink_to(outside)
        (self.place / "vol-file").symlink_to(outside)
        for path in (outside, volumes / "link", self.place / "vol-file", "/dev/zero", "/dev"):
            pair = self.pair(volumes={VOLUME: Path(path)})
            self.assert_refused("volume-not-allowed", pair.open_destination)
        device = self.useFixture(LoopDevice(outside)).path
        pair = self.pair(volumes={"a": inside, "b": Path(device)})
        pair.open_destination()
        pair.destination.wait("running")
        pair.destination.client.close_session(pair.order.session_id)
        self.assert_refused(
            "unknown-driver",
            self.client_of(self.two).open_session,
            dataclasses.replace(
                pair.order,
                session_id="other",
                volumes=(host_messages.Volume("v", "tape", "/dev/st0"),),
            ),
        )

    def test_only_maps_in_the_allowed_place_are_read(self) -> None:
        maps, outside = self.place / "maps", self.place / "outside.map"
        maps.mkdir()
        self.addCleanup(shutil.rmtree, maps)
        outside.write_bytes(bytes(MIB))
        (maps / "link").symlink_to(outside)
        good, wrong = maps / "map", (outside, maps / "link", self.place / "maps-2")
        pair = self.pair()
        pair.open_destination()
        pair.destination.wait("running")
        for path in wrong:
            for saved in (relays.SavedMap(path, good), relays.SavedMap(good, path)):
                pair.saved = saved
                self.assert_refused("map-not-allowed", pair.open_source)
        pair.saved = None
        pair.open_source()
        pair.source.wait("running")
        use_map = pair.source.client.use_map
        for path in wrong:
            for files in ((path, good), (good, path)):
                self.assert_refused(
                    "map-not-allowed", use_map, pair.order.session_id, *map(str, files)
                )
        use_map(pair.order.session_id, str(good), str(good))
        wait_until(lambda: (pair.source.progress() or {})["map"] == "refused", "it was looked for")

    def test_an_agent_is_asked_through_the_service(self) -> None:
        ports = self.place / "ports"
        ports.mkdir()
        self.addCleanup(shutil.rmtree, ports)
        host = self.client_of(self.two)
        with agent_at(ports / "port"), agent_at(self.place / "elsewhere"):
            transport = HostChannelTransport("an-instance", host, str(ports / "port"))
            asked = client.AgentClient("an-instance", transport)
            for _ in range(3):
                self.assertEqual("the-agent", asked.ping().incarnation)
            (ports / "link").symlink_to(self.place / "elsewhere")
            for path in (ports / "link", self.place / "elsewhere", Path("/dev/null")):
                transport = HostChannelTransport("an-instance", host, str(path))
                error = self.assertRaises(
                    exception.AgentRefused, client.AgentClient("an-instance", transport).ping
                )
                self.assertEqual("channel-not-allowed", error.kwargs["code"])
        settings = client.ClientSettings(timeout=1, attempts=1)
        transport = HostChannelTransport("an-instance", host, str(ports / "port"))
        silent = client.AgentClient("an-instance", transport, settings)
        self.assertRaises(exception.AgentUnreachable, silent.ping)


class ServiceLifeTest(Hosts):
    """Services, and the broker, are stopped and killed."""

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
        wait_until(lambda: host.hello().draining, "the service is being stopped")
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
        wait_until(lambda: host.hello().draining, "the service is being stopped")
        self.two.terminate()
        self.assertEqual(0, self.two.wait())
        self.assertEqual(1, len(self.two.relays()))

    def test_there_is_one_service_for_a_directory(self) -> None:
        second = self.one.spawn()
        self.assertEqual(2, second.wait(PATIENCE))
        processes.end(second)
        self.assertIn("another host service is running", self.one.last_words())

    def test_a_broker_that_is_killed_costs_no_migration(self) -> None:
        pair = self.pair(lease_seconds=60).open()
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


class SharesTest(Hosts):
    @classmethod
    def options(cls) -> dict[str, object]:
        return {
            "host__max_relays": 3,
            "host__network_bandwidth": 12,
            "host__volume_bandwidth": 6,
            "volume__bandwidth": 5,
        }

    def caps(self, *pairs: ServedPair) -> list[tuple[float, float]]:
        """What each relay of the pairs may at this moment, MiB/s: network and volume."""
        found = []
        for pair in pairs:
            source, destination = pair.source.progress(), pair.destination.progress()
            assert source is not None and destination is not None
            found.append((source["network_bandwidth"] / MIB, destination["volume_bandwidth"] / MIB))
        return found

    def wait_caps(self, expected: list[tuple[float, float]], *pairs: ServedPair) -> None:
        wait_until(lambda: self.caps(*pairs) == expected, f"caps are {expected}")

    def test_what_there_is_is_shared_anew_when_a_relay_starts_or_ends(self) -> None:
        first = self.pair().open()
        self.assertEqual([(12, 5)], self.caps(first))
        second = self.pair().open()
        self.wait_caps([(6, 3), (6, 3)], first, second)
        modest = self.pair(network_bandwidth=2 * MIB, volume_bandwidth=MIB).open()
        self.wait_caps([(5, 2.5), (5, 2.5), (2, 1)], first, second, modest)
        second.close_sessions()
        self.wait_caps([(10, 5), (2, 1)], first, modest)
        (pid,) = [pid for pid in self.one.relays() if pid == record_of(modest)["pid"]]
        os.kill(pid, signal.SIGKILL)
        self.wait_caps([(12, 5)], first)

    def test_a_successor_shares_among_those_that_it_takes_over(self) -> None:
        pairs = [self.pair().open() for _ in range(2)]
        self.one.kill()
        self.one.start()
        third = self.pair().open()
        self.wait_caps([(4, 2)] * 3, *pairs, third)

    def test_relays_with_equal_shares_send_alike(self) -> None:
        pairs = [self.pair().open() for _ in range(2)]
        self.wait_caps([(6, 3)] * 2, *pairs)
        migrations = [self.fake(pair, ram_pages=6144) for pair in pairs]
        threads = [threading.Thread(target=each.send, daemon=True) for each in migrations]
        for thread in threads:
            thread.start()
        sent: list[int] = []

        def enough() -> bool:
            found = [pair.source.progress() for pair in pairs]
            if all(each is not None for each in found):
                sent[:] = [each["wire_bytes"] for each in found if each is not None]
            return bool(sent) and max(sent) > 12 * MIB

        wait_until(enough, "one has sent 12 MiB")
        # What both relays' buffers hold is 3 MiB at most
        self.assertGreater(min(sent), 6 * MIB, sent)
        for migration, thread in zip(migrations, threads, strict=True):
            thread.join(PATIENCE)
            migration.finish()


class ProductionTest(Hosts):
    """Root with the capabilities of the unit only, a QEMU that is not root, and TLS."""

    certificates: ClassVar[dict[str, object]] = {}

    @classmethod
    def options(cls) -> dict[str, object]:
        if not cls.certificates:
            authority = Authority(cls.place)
            certificate, key = authority.issue("one", "two")
            cls.certificates = {
                "wire__tls": True,
                "wire__ca_file": authority.certificate,
                "wire__certificate_file": certificate,
                "wire__key_file": key,
            }
        nobody = pwd.getpwnam("nobody")
        group = grp.getgrgid(nobody.pw_gid).gr_name
        return {"host__qemu_user": "nobody", "host__qemu_group": group, **cls.certificates}

    @classmethod
    def prefix(cls) -> list[str]:
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.read(UNIT)
        named = [each.removeprefix("CAP_").lower() for each in unit["Service"][BOUNDING].split()]
        allowed = "".join(f",+{each}" for each in named)
        return ["setpriv", f"--bounding-set=-all{allowed}", "--inh-caps=-all", "--no-new-privs"]

    def test_a_migration_between_qemus_of_another_user(self) -> None:
        self.assert_nobody_migrates(("one", "two"))

    def test_the_other_host_must_be_the_one_that_is_expected(self) -> None:
        pair = self.pair(tls_names=("one", "three"))
        pair.open_destination()
        pair.destination.wait("running")
        pair.open_source()
        self.assertIn("three", pair.source.wait("failed").message)

    def test_a_host_with_tls_does_not_migrate_in_the_clear(self) -> None:
        self.assertTrue(self.client_of(self.two).hello().tls)
        self.assert_refused("tls-required", self.pair().open_destination)


#: QEMU's part at the destination and at the source.
RECEIVER = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
connection = listener.accept()[0]
while connection.recv(1 << 20):
    pass
"""
SENDER = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(open(sys.argv[2], "rb").read())
connection.shutdown(socket.SHUT_WR)
while connection.recv(1 << 20):
    pass
"""


def as_nobody(program: str, *arguments: Path) -> "subprocess.Popen[bytes]":
    """A process of an ordinary user."""
    user = pwd.getpwnam("nobody")
    owner = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return processes.spawn(
        ["setpriv", *owner, sys.executable, "-I", "-c", program, *map(str, arguments)], cwd="/"
    )


class ServedGuests(MigrationTestCase, Hosts):
    """Real QEMUs, and relays that two services run."""

    guest: ClassVar[dict[str, Any]] = {"ram_mb": 160, "fill_mb": 64, "mapped": 90}

    @contextlib.contextmanager
    def served(
        self, capabilities: Sequence[str] = (), **options: Any
    ) -> Iterator[tuple[ServedPair, Guest]]:
        """A pair with the guest's own map, and the QEMU that it will move to.

        :param capabilities: of that QEMU.
        """
        with contextlib.ExitStack() as stack:
            pair = self.pair(volumes={VOLUME: self.spec.disk}, saved=self.map_of(), **options)
            destination = stack.enter_context(Guest.start_destination(self.spec))
            destination.set_capabilities(*capabilities)
            pair.open_destination()
            destination.listen(pair.incoming)
            pair.destination.wait("running")
            pair.open_source()
            pair.source.wait("running")
            yield pair, destination


class GuestTest(ServedGuests):
    def assert_moved(self, pair: ServedPair, destination: Guest, state: dict[str, Any]) -> None:
        self.assertEqual("completed", state["status"], f"{state}\n{pair.last_words()}")
        self.assertEqual("paused", destination.wait_incoming(PATIENCE))
        states = pair.close_sessions()
        self.assertEqual(["delivered"] * 2, [each.state for each in states], states)
        summary = pair.source.client.summary(pair.order.session_id)
        assert summary is not None
        self.assertGreater(summary["referenced_pages"], 1000)
        self.assertGreater(summary["volume_bytes"], 0)
        destination.cont()
        self.assertEqual("pong", destination.command("ping", timeout=PATIENCE))
        self.assert_nothing_left()
        destination.kill()
        self.source.cont()
        self.assert_guest_goes_on()

    def test_a_guest_moves_by_reference(self) -> None:
        with self.served() as (pair, destination):
            relays.prepare(self.source)
            self.source.migrate(pair.outgoing)
            self.assert_moved(pair, destination, self.follow(pair))

    def test_a_guest_moves_while_both_services_are_killed(self) -> None:
        with self.served(network_bandwidth=12 * MIB) as (pair, destination):
            with self.dirtying(10, 4):
                relays.prepare(self.source)
                self.source.migrate(pair.outgoing)
                wait_until(
                    lambda: (pair.source.progress() or {}).get("guest_bytes", 0) > 8 * MIB,
                    "the guest is moving",
                )
                for service in (self.one, self.two):
                    service.kill()
                self.assertEqual("active", self.source.migration()["status"])
                for service in (self.one, self.two):
                    service.start()
                # It may have ended by itself on a machine on which services take long to start
                self.assertIn(pair.source.renew().state, ("running", "delivered"))
                self.assert_moved(pair, destination, self.follow(pair))

    def follow(self, pair: ServedPair) -> dict[str, Any]:
        """Play the orchestration until QEMU's migration has ended."""
        allowed = False

        def ended() -> dict[str, Any] | None:
            nonlocal allowed
            state = self.source.migration()
            if state.get("status") in ("completed", "failed", "cancelled"):
                return state
            progress = pair.source.progress()
            pair.destination.renew()
            if not allowed and progress is not None and progress["bulk_resolved"]:
                self.source.set_parameters(downtime_limit=2000)
                allowed = True
            return None

        result: dict[str, Any] = wait_until(ended, "the migration ends")
        return result


class Agent:
    """What answers at a port."""

    def ping(self, arguments: messages.Nothing) -> messages.Pong:
        return messages.Pong("1", messages.VERSION, "the-agent")


@contextlib.contextmanager
def agent_at(path: Path, agent: Any = None) -> Iterator[None]:
    """An agent behind a socket as QEMU has it for a virtio-serial port."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    server = channel.ChannelServer(
        Dispatcher(agent or Agent(), messages.AGENT), lambda: listener.accept()[0].detach()
    )
    server.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        server.stop()
        path.unlink()


def ended(pid: int) -> bool:
    """Whether a process has ended; nobody may have noticed yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def record_of(pair: ServedPair) -> dict[str, Any]:
    """What the source's host has on disk of it."""
    (record,) = [
        each
        for each in pair.source.service.records()
        if each["session_id"] == pair.order.session_id
    ]
    return record
