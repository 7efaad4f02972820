# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the host services and the agent: they answer as those do, over real RPC with real
records, and note what they are asked. Relays they have none.
"""

import base64
import dataclasses
import gzip
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fixtures
import numpy as np

from nova_dmigrate import buffermap, exception
from nova_dmigrate.rpc import broker, host_messages, messages
from nova_dmigrate.rpc.dispatcher import Dispatcher

URL = "fake:/"
MIB = 1 << 20
#: What the stand-in of a source relay says of itself, unless a test wants something else.
PROGRESS = {
    "map": "taken",
    "mapped_pages": 256,
    "bulk_resolved": True,
    "passes": 1,
    "guest_bytes": 900 * MIB,
    "wire_bytes": 300 * MIB,
    "volume_bytes": 600 * MIB,
    "referenced_pages": 1000,
    "misses": {"changed": 3},
}


class Host:
    """The service of one host. Methods of the protocol have their names.

    :ivar orders: of relays, in their order.
    :ivar state: what a relay that was ordered is: ``running``, ``queued``, ``failed``, ...
    :ivar trouble: why its relay can read no volume; empty if it can.
    :ivar hello_changes: fields of `HostState` that are different.
    :ivar refused: what is answered instead, by the method's name.
    """

    def __init__(self, name: str, socket_directory: str) -> None:
        self.name = name
        self.orders: list[Any] = []
        self.closed: list[str] = []
        self.maps: list[bytes] = []
        self.state, self.message = "running", ""
        self.progress: dict[str, Any] = dict(PROGRESS)
        self.trouble = ""
        self.hello_changes: dict[str, Any] = {}
        self.refused: dict[str, exception.RequestRefused] = {}
        self._socket_directory = socket_directory

    def hello(self, arguments: Any) -> host_messages.HostState:
        fields: dict[str, Any] = {
            "host": self.name,
            "version": host_messages.VERSION,
            "wire_versions": (1,),
            "incarnation": "one",
            "tls": False,
            "drivers": ("block",),
            "relays": 0,
            "max_relays": 4,
            "queued": 0,
            "draining": False,
            "migration_address": None,
            "socket_directory": self._socket_directory,
        }
        return host_messages.HostState(**{**fields, **self.hello_changes})

    def open_destination(self, order: Any) -> host_messages.SessionState:
        _refuse("open", self.refused)
        self.orders.append(order)
        return self._state(order.session_id)

    open_source = open_destination

    def session(self, reference: Any) -> host_messages.SessionState:
        return self._state(reference.session_id)

    renew = session

    def use_map(self, request: Any) -> host_messages.SessionState:
        _refuse("use_map", self.refused)
        self.maps.append(Path(request.buffer_map).read_bytes())
        Path(request.memory_layout).read_text()
        return self._state(request.session_id)

    def close(self, reference: Any) -> host_messages.SessionState:
        self.closed.append(reference.session_id)
        state = self._state(reference.session_id)
        return dataclasses.replace(state, state="delivered") if state.state == "running" else state

    def summary(self, arguments: Any) -> host_messages.SummaryChunk:
        data = gzip.compress(json.dumps(self.progress).encode())
        text = base64.b64encode(data[arguments.offset :]).decode()
        return host_messages.SummaryChunk(len(data), arguments.offset, text)

    def downtime(self, arguments: Any) -> host_messages.GuestDowntime:
        return host_messages.GuestDowntime(87.5)

    def agent(self, request: Any) -> Any:
        raise exception.RequestRefused(reason="there is none", code="agent-unreachable")

    def _arriving(self, order: host_messages.OpenDestination) -> dict[str, Any]:
        """What a destination relay that was ordered tells of itself."""
        volumes = [each.volume_id for each in order.volumes] if self.trouble else []
        troubles = {volume: f"Volume {volume}: {self.trouble}" for volume in volumes}
        return {"stage": "waiting", "volume_bytes": 0, "volume_troubles": troubles}

    def _state(self, session_id: str) -> host_messages.SessionState:
        order = next(each for each in self.orders if each.session_id == session_id)
        source = isinstance(order, host_messages.OpenSource)
        return host_messages.SessionState(
            session_id=session_id,
            migration_id=order.migration_id,
            instance=order.instance,
            role="source" if source else "destination",
            state=self.state,
            message=self.message,
            host=None if source else self.name,
            port=None if source else 49200,
            queue_position=1 if self.state == "queued" else 0,
            lease_remaining=30.0,
            progress=json.dumps(self.progress if source else self._arriving(order)),
            summary_path="/nowhere/summary.json",
        )


def _refuse(name: str, refused: Mapping[str, exception.RequestRefused]) -> None:
    if name in refused:
        raise refused[name]


class Agent:
    """The agent of one instance, with a map of 1 MiB of its memory.

    :ivar outcome: of making the map: ``ready``, ``building`` or ``failed``.
    :ivar chunks: of the map.
    :ivar refused: what is answered instead, by the method's name.
    :ivar warmed_up: set when it was asked for that.
    """

    def __init__(self, volume: str) -> None:
        self.outcome = "ready"
        self.refused: dict[str, exception.RequestRefused] = {}
        self.warmed_up = threading.Event()
        self.warm_up_ends = messages.WarmUpState("done", loaded=900, total=900, seconds=12.0)
        step = np.array([0], np.uint64)
        extents = buffermap.VolumeExtents(
            volume, 1 << 30, step + np.uint64(16 * MIB), step, step + np.uint64(MIB)
        )
        self.chunks = list(buffermap.BufferMap.build([extents]).to_chunks())

    def ping(self, arguments: Any) -> messages.Pong:
        _refuse("ping", self.refused)
        return messages.Pong("1", messages.VERSION, "one")

    def health(self, arguments: Any) -> messages.Health:
        return messages.Health(incarnation="one", moves=0, since_move=None, servers=())

    def map_begin(self, arguments: Any) -> messages.MapState:
        failed = self.outcome == "failed"
        return messages.MapState(
            map_id="map",
            state=self.outcome,
            chunks=len(self.chunks),
            pages=256,
            size=sum(map(len, self.chunks)),
            seconds=0.1,
            message="no database server runs" if failed else "",
        )

    map_state = map_begin

    def map_chunk(self, arguments: Any) -> messages.Chunk:
        data = base64.b64encode(self.chunks[arguments.index]).decode()
        return messages.Chunk(arguments.index, data)

    def map_end(self, arguments: Any) -> messages.Done:
        return messages.Done()

    def warm_up(self, arguments: Any) -> messages.WarmUpState:
        _refuse("warm_up", self.refused)
        self.warmed_up.set()
        return messages.WarmUpState("running")

    def warm_up_state(self, arguments: Any) -> messages.WarmUpState:
        return self.warm_up_ends


class Served(fixtures.Fixture):
    """A stand-in at the broker, until the fixture's end.

    :param name: the host, or the instance.
    """

    def __init__(self, name: str, handler: Any, protocol: Any) -> None:
        super().__init__()
        self._server = broker.BrokerServer(
            name, Dispatcher(handler, protocol), broker.make_conf(), URL
        )

    def _setUp(self) -> None:
        self._server.start()
        self.addCleanup(self._server.stop)
        if not self._server.wait_until_serving(10):
            raise AssertionError("the stand-in does not come to the broker")
