# SPDX-License-Identifier: Apache-2.0
"""Chunks of a map go from the port of a guest into a file, by the service of its host."""

from __future__ import annotations

import base64
import contextlib
import os
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.buffermap import BufferMap, MapLimits, VolumeExtents, framed_size
from nova_dmigrate.host import agents
from nova_dmigrate.rpc.host_messages import SaveChunks, SavedChunks
from nova_dmigrate.rpc.messages import Chunk, ChunkArguments
from tests import base
from tests.lab.agent_port import agent_at

_CHUNK = 4096


def _map() -> BufferMap:
    page = np.arange(0, 40000, 2, dtype=np.uint64) * 4096
    lengths = np.full(page.size, 4096, np.uint64)
    return BufferMap.build([VolumeExtents("v", 1 << 30, page, page[::-1], lengths)])


class Agent:
    """Has the chunks of one map.

    :ivar refuses: the code with which it refuses them, if it does.
    :ivar silent: it does not answer from that chunk on.
    """

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks
        self.asked = 0
        self.refuses: str | None = None
        self.silent: int | None = None
        self.over = threading.Event()

    def map_chunk(self, arguments: ChunkArguments) -> Chunk:
        self.asked += 1
        if arguments.map_id != "m":
            raise exception.RequestRefused(reason="it is not here", code="unknown-map")
        if self.refuses is not None:
            raise exception.RequestRefused(reason="it may not be", code=self.refuses)
        if self.silent is not None and arguments.index >= self.silent:
            self.over.wait()
        data = base64.b64encode(self._chunks[arguments.index]).decode()
        return Chunk(index=arguments.index, data=data)


class SaveChunksTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory()
        self.map = _map()
        self.chunks = list(self.map.to_chunks(_CHUNK))
        self.path = self.directory / "map"
        self.descriptor = self.open(self.path, os.O_WRONLY | os.O_CREAT)
        self.agent = Agent(self.chunks)
        self.port = contextlib.ExitStack()
        self.addCleanup(self.port.close)
        self.addCleanup(self.agent.over.set)
        self.port.enter_context(agent_at(self.directory / "port", self.agent))
        self.proxy = agents.AgentProxy([str(self.directory)])

    def open(self, path: str | Path, flags: int) -> int:
        descriptor = os.open(path, flags)
        self.addCleanup(os.close, descriptor)
        return descriptor

    def save(self, saved: SavedChunks | None = None, **changes: Any) -> SavedChunks:
        order = {
            "instance": "an-instance",
            "channel_path": str(self.directory / "port"),
            "map_id": "m",
            "first": saved.chunks if saved else 0,
            "behind": len(self.chunks),
            "max_chunk_bytes": _CHUNK,
            "buffer_map": str(self.path),
            "offset": saved.size if saved else 0,
            "timeout": 2.0,
        }
        return self.proxy.save_chunks(SaveChunks(**{**order, **changes}), self.descriptor)

    def load(self) -> BufferMap:
        return BufferMap.load(self.path, MapLimits(max_chunk_bytes=_CHUNK))

    def test_a_whole_map(self) -> None:
        saved = self.save()
        self.assertEqual(SavedChunks(len(self.chunks), self.path.stat().st_size), saved)
        self.assertEqual(self.map, self.load())

    def test_a_map_in_several_goes_one_of_which_is_repeated(self) -> None:
        saved = self.save(behind=2)
        again = self.save(saved, behind=4)
        self.assertEqual(again, self.save(saved, behind=4))
        self.save(again)
        self.assertEqual(self.map, self.load())

    def test_it_says_how_far_it_is_after_a_while(self) -> None:
        with mock.patch.object(agents, "SAVING_SECONDS", 0):
            self.assertEqual(1, self.save().chunks)
        self.assertEqual(1, self.agent.asked)

    def test_a_chunk_that_is_too_long_is_refused(self) -> None:
        self.chunks[0] += bytes(_CHUNK)
        self.assert_refused("nonsense")

    def test_a_map_that_would_become_too_large_is_not_written_any_further(self) -> None:
        saved = self.save(behind=2)
        for size in (saved.size, saved.size + framed_size(self.chunks[2]) - 1):
            self.assert_refused("large-map", first=2, offset=saved.size, max_bytes=size)
        self.assertEqual(saved.size, self.path.stat().st_size)
        self.assert_refused("large-map", first=2, offset=1 << 49)
        self.assertEqual(saved.size, self.path.stat().st_size)
        self.save(saved, max_bytes=sum(map(framed_size, self.chunks)))
        self.assertEqual(self.map, self.load())

    def test_a_map_that_the_agent_has_forgotten(self) -> None:
        self.assert_refused("unknown-map", map_id="another")

    def test_an_agent_that_is_gone(self) -> None:
        saved = self.save(behind=2)
        self.port.close()
        self.assert_refused("agent-unreachable", first=2, offset=saved.size)
        with agent_at(self.directory / "port", self.agent):
            self.save(saved)
        self.assertEqual(self.map, self.load())

    def test_an_agent_that_stops_half_way(self) -> None:
        self.agent.silent = 2
        error = self.assert_refused("agent-unreachable", timeout=0.5)
        self.assertEqual(3, self.agent.asked)
        self.assertIn("no answer in time", str(error))

    def test_what_a_refusal_of_others_means_the_guest_does_not_choose(self) -> None:
        for code in ("version", "map-file", "map-not-allowed", "agent-unreachable", "whatever"):
            self.agent.refuses = code
            self.assert_refused("agent-refused")

    def test_a_file_system_that_is_full(self) -> None:
        self.descriptor = self.open("/dev/full", os.O_WRONLY)
        self.assert_refused("map-file")

    def assert_refused(self, code: str, **changes: Any) -> Exception:
        error: exception.RequestRefused
        error = self.assertRaises(exception.RequestRefused, self.save, **changes)
        self.assertEqual(code, error.kwargs["code"])
        return error
