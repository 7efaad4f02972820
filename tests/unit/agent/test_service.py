# SPDX-License-Identifier: Apache-2.0
"""The agent's methods, as a client on the other end of a channel sees them."""

import base64
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.agent import maps, service
from nova_dmigrate.agent.database import Login
from nova_dmigrate.agent.preparation import Preparation
from nova_dmigrate.buffermap import BufferMap, MapLimits, VolumeExtents, parts_to_chunks
from nova_dmigrate.findings import Finding, Severity
from nova_dmigrate.rpc import channel, client, messages
from nova_dmigrate.rpc.dispatcher import Dispatcher
from tests import base
from tests.fetched_map import fetch_map
from tests.unit.agent.fakes import FakeGuest, FakeServer, FakeServerMap

NOTE = Finding("a-note", Severity.NOTE, "something")


def make_map(pages: int, volume: str = "a-volume", first: int = 0) -> BufferMap:
    guest = np.arange(first, first + 2 * pages, 2, dtype=np.uint64) * 4096
    block = np.random.default_rng(3).permutation(pages).astype(np.uint64) * 4096
    length = np.full(pages, 4096, np.uint64)
    return BufferMap.build([VolumeExtents(volume, 1 << 30, guest, block, length)])


def same(one: BufferMap, other: BufferMap) -> bool:
    return list(one.to_chunks()) == list(other.to_chunks())


class Servers:
    """In the place of service.Servers."""

    def __init__(self, built: Any) -> None:
        self.built = built
        self.also: list[BufferMap] = []
        self.builds = 0
        self.go = threading.Event()
        self.go.set()

    def build_map(self) -> maps.GuestMap:
        self.builds += 1
        self.go.wait()
        if isinstance(self.built, Exception):
            raise self.built
        parts = FakeServerMap([self.built, *self.also], [NOTE])
        return maps.GuestMap([parts])  # type: ignore[list-item]


class MapStoreTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.now = 0.0
        self.servers = Servers(make_map(5000))
        self.store = maps.MapStore(
            self.servers.build_map, self.make_directory() / "state", lambda: self.now
        )

    def begin(self, size: int = 4096) -> Any:
        state = self.store.begin(size)
        while state.state == "building":
            state = self.store.state(state.map_id)
        return state

    def test_chunks_are_the_maps_and_can_be_asked_for_in_any_order(self) -> None:
        state = self.begin()
        self.assertEqual(("ready", 5000), (state.state, state.pages))
        self.assertGreater(state.chunks, 3)
        backwards = [
            base64.b64decode(self.store.chunk(state.map_id, index).data)
            for index in reversed(range(state.chunks))
        ]
        self.assertEqual(list(self.servers.built.to_chunks(4096)), backwards[::-1])
        self.assertEqual(sum(map(len, backwards)), state.size)
        self.assertEqual("a-note", state.findings[0].code)

    def test_a_chunk_beyond_the_last_is_refused(self) -> None:
        state = self.begin()
        error = self.assertRaises(
            exception.AgentError, self.store.chunk, state.map_id, state.chunks
        )
        self.assertEqual("no-chunk", error.kwargs["code"])

    def test_while_a_map_is_being_built_no_second_one_is(self) -> None:
        self.servers.go.clear()
        first = self.store.begin(4096)
        self.assertEqual(first.map_id, self.store.begin(4096).map_id)
        error = self.assertRaises(exception.AgentError, self.store.begin, 8192)
        self.assertEqual("busy", error.kwargs["code"])
        self.assertRaises(exception.AgentError, self.store.chunk, first.map_id, 0)
        self.servers.go.set()
        while self.store.state(first.map_id).state == "building":
            pass
        self.assertEqual(1, self.servers.builds)

    def test_a_failure_is_the_maps_state(self) -> None:
        for error in (exception.ServerNotFound(reason="gone"), RuntimeError("what is this")):
            self.servers.built = error
            state = self.begin()
            self.assertEqual("failed", state.state)
            self.assertIn(str(error), state.message)

    def test_a_map_is_forgotten_at_its_end_or_when_nobody_asks_any_more(self) -> None:
        for forget in (self.store.end, lambda map_id: self.store.tick()):
            state = self.begin()
            self.now += 299
            self.store.tick()
            self.store.state(state.map_id)
            self.now += 301
            forget(state.map_id)
            error = self.assertRaises(exception.AgentError, self.store.state, state.map_id)
            self.assertEqual("unknown-map", error.kwargs["code"])

    def test_what_goes_wrong_in_a_later_part_is_the_maps_state(self) -> None:
        class Ending(FakeServerMap):
            def __iter__(self) -> Iterator[BufferMap]:
                yield make_map(10)
                raise exception.ServerNotFound(reason="gone")

        self.store._build = lambda: maps.GuestMap([Ending(())])  # type: ignore[list-item]
        state = self.begin()
        self.assertEqual("failed", state.state)
        self.assertIn("gone", state.message)


class GuestMapTest(base.TestCase):
    def test_the_parts_of_all_servers_follow_each_other_and_are_counted(self) -> None:
        one, two, three = make_map(50), make_map(60, first=101), make_map(40, "other", 1000)
        servers = [FakeServerMap([one, two], [NOTE]), FakeServerMap([three])]
        made = maps.GuestMap(servers)  # type: ignore[arg-type]
        self.assertEqual([one, two, three], list(made))
        self.assertEqual({"a-volume": 110, "other": 40}, made.pages)
        self.assertEqual([NOTE], made.findings)

    def test_a_part_is_gone_before_the_next_one_is_made(self) -> None:
        alive: list[weakref.ref[BufferMap]] = []

        class Server(FakeServerMap):
            def __iter__(self) -> Iterator[BufferMap]:
                for number in range(3):
                    self.check()
                    part = make_map(50, first=200 * number)
                    alive.append(weakref.ref(part.volumes[0]))
                    yield part
                    del part

            @staticmethod
            def check() -> None:
                assert not any(each() for each in alive)

        made = maps.GuestMap([Server(()), Server(())])  # type: ignore[list-item]
        self.assertEqual(150, BufferMap.from_chunks(parts_to_chunks(made), MapLimits()).page_count)


class ServiceTest(base.TestCase):
    """The whole agent but for oslo.messaging and the database."""

    def setUp(self) -> None:
        super().setUp()
        settings = service.AgentSettings(self.make_directory() / "state")
        self.service = service.AgentService(settings)
        self.servers = Servers(make_map(3000))
        self.service._maps = maps.MapStore(self.servers.build_map, settings.state_directory)
        self.database = FakeServer()
        guest = FakeGuest(self.database)
        self.service.preparation = Preparation(
            self.service.preparation._file,
            guest.logins,
            Login,
            guest.connect,  # type: ignore[arg-type]
        )
        ours, theirs = socket.socketpair()
        server = channel.ChannelServer(Dispatcher(self.service, messages.AGENT), theirs.detach)
        server.start()
        self.addCleanup(server.stop)
        transport = channel.ChannelTransport("an-instance", ours.detach)
        self.client = client.AgentClient(
            "an-instance", transport, client.ClientSettings(chunk_bytes=4096, poll_interval=0.01)
        )
        self.addCleanup(self.client.close)

    def test_a_map_arrives_as_it_was_made(self) -> None:
        fetched = fetch_map(self.client, MapLimits(max_chunk_bytes=4096))
        self.assertTrue(same(self.servers.built, fetched))

    def test_a_map_in_parts_arrives_as_one(self) -> None:
        self.servers.also = [make_map(2000, first=8000)]
        fetched = fetch_map(self.client, MapLimits(max_chunk_bytes=4096))
        self.assertEqual(BufferMap.join([self.servers.built, *self.servers.also]), fetched)

    def test_a_map_beyond_the_hosts_limits_is_not_fetched(self) -> None:
        self.assertRaises(
            exception.BufferMapError, fetch_map, self.client, MapLimits(max_pages=2999)
        )

    def test_a_map_that_cannot_be_made_is_refused_with_the_reason(self) -> None:
        self.servers.built = exception.ServerNotFound(reason="none runs here")
        error = self.assertRaises(exception.AgentRefused, fetch_map, self.client, MapLimits())
        self.assertIn("none runs here", str(error))
        self.assertEqual("map-failed", error.kwargs["code"])

    def test_preparing_and_restoring_over_the_channel(self) -> None:
        before = dict(self.database.values)
        state = self.client.prepare(seconds=2)
        self.assertEqual("flushing", state.state)
        self.database.dirty = 0
        self.assertEqual("ready", self.client.renew(state.lease_id).state)
        self.assertEqual("idle", self.client.restore(state.lease_id).state)
        self.assertEqual(before, self.database.values)
        error = self.assertRaises(exception.AgentRefused, self.client.renew, state.lease_id)
        self.assertEqual("unknown-lease", error.kwargs["code"])

    def test_a_warm_up_is_asked_for_and_a_preparation_ends_it(self) -> None:
        self.assertEqual("idle", self.client.warm_up_progress()["state"])
        self.client.warm_up()
        self.assertEqual("waiting", self.client.warm_up_progress()["state"])
        self.client.prepare(seconds=2)
        told = self.client.warm_up_progress()
        self.assertEqual(("stopped", "migration"), (told["state"], told["code"]))

    def test_health_tells_of_moves_and_a_missing_server(self) -> None:
        self.service._servers = service.Servers(
            service.AgentSettings(self.make_directory(), service.processes.Selector(pid=1))
        )
        self.service.follow_up.noticed("a sign")
        health = self.client.health()
        self.assertEqual(1, health.moves)
        self.assertIsNotNone(health.since_move)
        self.assertFalse(health.servers[0].healthy)

    def test_health_is_told_though_the_system_fails_at_the_search(self) -> None:
        def find() -> Any:
            os.stat("/proc/self/exe/no-directory")

        self.service._servers.find = find  # type: ignore[method-assign]
        health = self.client.health()
        self.assertFalse(health.servers[0].healthy)
        self.assertIn("Not a directory", health.servers[0].message)

    def test_a_lost_ledger_is_described_as_a_problem(self) -> None:
        aside = self.service.preparation._file._path.with_suffix(".unreadable-1")
        aside.parent.mkdir(exist_ok=True)
        aside.touch()
        found = self.client.describe().findings[0]
        self.assertEqual(("lost-ledger", "problem"), (found.code, found.severity))
        self.assertIn(str(aside), found.message)

    def test_an_agent_that_forgot_the_map_is_asked_for_one_more(self) -> None:
        forgotten = []
        real = self.service._maps.chunk

        def chunk(map_id: str, index: int) -> Any:
            if not forgotten and index == 1:
                forgotten.append(map_id)
                self.service._maps.end(map_id)
            return real(map_id, index)

        self.service._maps.chunk = chunk  # type: ignore[method-assign]
        fetched = fetch_map(self.client, MapLimits(max_chunk_bytes=4096))
        self.assertTrue(same(self.servers.built, fetched))
        self.assertEqual(2, self.servers.builds)

    def test_trouble_in_the_ticks_does_not_end_the_agent(self) -> None:
        def broken() -> None:
            raise RuntimeError("no")

        self.service.preparation.tick = broken  # type: ignore[method-assign]
        self.service.tick()
        self.assertIn("Trouble", self.log.output)


class RunTest(base.TestCase):
    def test_a_second_agent_in_the_same_guest_is_refused(self) -> None:
        directory = self.make_directory()
        with service.exclusive(directory):
            error = self.assertRaises(exception.AgentError, service.exclusive(directory).__enter__)
        self.assertEqual("running", error.kwargs["code"])
        with service.exclusive(directory):
            pass

    def test_the_agent_serves_until_it_is_stopped_and_reconnects_after_a_move(self) -> None:
        told: list[str] = []

        class Server:
            def start(self) -> None:
                told.append("start")
                made[0]._handler.follow_up.noticed("a sign")
                stopped.set()

            def reconnect(self) -> None:
                told.append("reconnect")

            def stop(self) -> None:
                told.append("stop")

        made: list[Any] = []
        stopped = threading.Event()

        def make_server(dispatcher: Dispatcher) -> Server:
            made.append(dispatcher)
            return Server()

        service.run(service.AgentSettings(self.make_directory()), make_server, stopped)
        self.assertEqual(["start", "reconnect", "stop"], told)

    def test_settings_are_restored_whatever_else_goes_wrong_at_the_stop(self) -> None:
        database = FakeServer()
        before = dict(database.values)
        guest = FakeGuest(database)
        stopped = threading.Event()

        class Server:
            def start(self) -> None:
                preparation = handler.preparation
                preparation._logins, preparation._connect = guest.logins, guest.connect
                preparation.prepare(messages.PrepareArguments())
                self.stop_follow_up, handler.follow_up.stop = handler.follow_up.stop, self.fail
                stopped.set()

            def reconnect(self) -> None: ...

            def fail(self) -> None:
                self.stop_follow_up()
                raise OSError("the events cannot be closed")

            def stop(self) -> None:
                raise OSError("the port cannot be closed")

        def make_server(dispatcher: Dispatcher) -> Server:
            nonlocal handler
            handler = dispatcher._handler
            return Server()

        handler: Any = None
        error = self.assertRaises(
            OSError,
            service.run,
            service.AgentSettings(self.make_directory()),
            make_server,
            stopped,
        )
        self.assertIn("the port", str(error))
        self.assertEqual(before, database.values)
        refused = self.assertRaises(
            exception.AgentError, handler.preparation.prepare, messages.PrepareArguments()
        )
        self.assertEqual("stopping", refused.kwargs["code"])
