# SPDX-License-Identifier: Apache-2.0
"""Maps that are cancelled while they are built."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.agent import maps
from nova_dmigrate.buffermap import BufferMap, VolumeExtents
from tests import base
from tests.unit.agent.fakes import FakeServerMap


def make_map(pages: int, first: int = 0) -> BufferMap:
    block = np.arange(pages, dtype=np.uint64) * 4096
    length = np.full(pages, 4096, np.uint64)
    return BufferMap.build(
        [VolumeExtents("a-volume", 1 << 30, block + first * 4096, block, length)]
    )


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


class CancelTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory() / "state"
        self.store = maps.MapStore(self.build, self.directory)

    def build(self) -> maps.GuestMap:
        return maps.GuestMap([FakeServerMap([make_map(10)])])  # type: ignore[list-item]

    def test_one_map_at_a_time_is_built_however_many_are_begun_and_ended(self) -> None:
        go = threading.Event()
        self.addCleanup(go.set)
        building: list[int] = []

        def build() -> maps.GuestMap:
            building.append(threading.get_ident())
            go.wait()
            return maps.GuestMap([FakeServerMap([make_map(10)])])  # type: ignore[list-item]

        self.store._build = build
        for _ in range(100):
            begun = self.store.begin(4096)
            self.assertEqual("building", begun.state)
            self.store.end(begun.map_id)
        last = self.store.begin(8192)
        self.assertEqual("building", self.store.state(last.map_id).state)
        self.assertLessEqual(len(building), 1)
        go.set()
        while last.state == "building":
            last = self.store.state(last.map_id)
        self.assertEqual(("ready", 10), (last.state, last.pages))
        self.assertEqual(1, len(set(building)))
        self.assertLessEqual(len(building), 2)

    def test_what_was_cancelled_stops_and_leaves_no_file(self) -> None:
        stop = threading.Event()
        self.addCleanup(stop.set)

        class Endless(FakeServerMap):
            def __iter__(self) -> Iterator[BufferMap]:
                number = 0
                while not stop.wait(0.001):
                    yield make_map(50, first=200 * number)
                    number += 1

        server = Endless(())
        self.store._build = lambda: maps.GuestMap([server])  # type: ignore[list-item]
        begun = self.store.begin(4096)
        wait_for(lambda: self.spooled() == 1)
        self.store.end(begun.map_id)
        wait_for(lambda: self.spooled() == 0)
        self.assertTrue(server.cancelled)
        self.assertRaises(exception.AgentError, self.store.state, begun.map_id)
        self.store._build = self.build
        state = self.store.begin(4096)
        while state.state == "building":
            state = self.store.state(state.map_id)
        self.assertEqual(("ready", 10), (state.state, state.pages))

    def test_what_is_cancelled_while_its_servers_are_looked_for_is_never_begun(self) -> None:
        go = threading.Event()
        self.addCleanup(go.set)
        asked = threading.Event()
        server = FakeServerMap([make_map(10)])

        def build() -> maps.GuestMap:
            asked.set()
            go.wait()
            return maps.GuestMap([server])  # type: ignore[list-item]

        self.store._build = build
        begun = self.store.begin(4096)
        asked.wait()
        self.store.end(begun.map_id)
        go.set()
        wait_for(lambda: server.cancelled)
        wait_for(lambda: "not wanted" in self.log.output)

    def spooled(self) -> int:
        """How many files of maps this process has open."""
        found = 0
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += os.readlink(path).startswith(f"{self.directory}/")
        return found
