# SPDX-License-Identifier: Apache-2.0
"""Host services and an agent that answer over no transport at all, for tests."""

import base64
import gzip
import json
from typing import Any

import numpy as np

from nova_dmigrate.buffermap import BufferMap, VolumeExtents
from nova_dmigrate.rpc.client import AgentClient
from nova_dmigrate.rpc.host_client import HostClient
from tests.unit.rpc.test_client import PONG, Scripted

MIB = 1 << 20


class Host:
    """A service that has one relay.

    :ivar changes: fields of `SessionState` that are different.
    :ivar answers: by method; one of them may be an error to raise.
    """

    def __init__(self, name: str, role: str, summary: dict[str, Any] | None = None) -> None:
        self.name = name
        self.changes: dict[str, Any] = {}
        self._role = role
        data = gzip.compress(json.dumps(summary or {}).encode())
        chunk = {"size": len(data), "offset": 0, "data": base64.b64encode(data).decode()}
        methods = ("open_source", "open_destination", "renew", "use_map", "close")
        self.answers: dict[str, Any] = {
            **dict.fromkeys(methods, self._state),
            "summary": {"result": chunk},
        }

    def client(self) -> HostClient:
        transport = Scripted()
        transport.answers = self.answers
        return HostClient(self.name, transport, sleep=lambda seconds: None)

    def _state(self, session_id: str, **arguments: Any) -> dict[str, Any]:
        state = {
            "session_id": session_id,
            "migration_id": "m",
            "instance": "i",
            "role": self._role,
            "state": "running",
            "message": "",
            "host": None if self._role == "source" else self.name,
            "port": None if self._role == "source" else 49200,
            "queue_position": 0,
            "lease_remaining": 30.0,
            "progress": "",
            "summary_path": "/nowhere/summary.json",
        }
        return {"result": {**state, **self.changes}}


def agent(**other: Any) -> AgentClient:
    """One with a map of 1 MiB of its guest's memory, which knows nothing of a database.

    :param other: answers, by method.
    """
    step = np.array([0], np.uint64)
    extents = VolumeExtents("v", 1 << 30, step + np.uint64(16 * MIB), step, step + np.uint64(MIB))
    chunks = list(BufferMap.build([extents]).to_chunks())
    state = {"map_id": "map", "state": "ready", "chunks": len(chunks), "pages": MIB // 4096}
    made = {"result": {**state, "size": sum(map(len, chunks)), "seconds": 0.1, "message": ""}}

    def chunk(map_id: str, index: int) -> dict[str, Any]:
        return {"result": {"index": index, "data": base64.b64encode(chunks[index]).decode()}}

    health = {"incarnation": "one", "moves": 0, "since_move": None, "servers": []}
    answers: dict[str, Any] = {
        "ping": PONG,
        "health": {"result": health},
        "map_begin": made,
        "map_chunk": chunk,
        "map_end": {"result": {}},
    }
    return AgentClient("i", Scripted(**{**answers, **other}))
