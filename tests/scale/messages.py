# SPDX-License-Identifier: Apache-2.0
"""What one request costs the message broker: bytes in, bytes out, messages, time of its processor.

A real RabbitMQ, and the real transports on both sides of it, with answers as long as a migration's
are. Requester and server reach the broker through relays that count what passes.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import gzip
import json
import random
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from nova_dmigrate.rpc import broker, host_messages, messages
from nova_dmigrate.rpc.client import AgentClient, ClientSettings, MapFile
from nova_dmigrate.rpc.dispatcher import Dispatcher
from nova_dmigrate.rpc.host_client import HostChannelTransport, HostClient
from nova_dmigrate.rpc.host_messages import HOST
from nova_dmigrate.rpc.transport import Transport
from tests.bench.cpu import cpu_seconds
from tests.lab.broker import Broker

Report = dict[str, Any]

_HOST = "compute-0123.example.org"
_CHUNK_BYTES = ClientSettings().chunk_bytes
_PATIENCE = 30.0
_BUFFER = 1 << 18

#: What a source relay told of itself in the midst of a migration.
_PROGRESS = {
    "role": "source", "instance": str(uuid.UUID(int=0)), "state": "running", "stage": "bulk",
    "passes": 1, "bulk_resolved": False, "pass_through": None, "machine": "pc-i440fx-7.2",
    "ram_bytes": 68719476736, "map": "taken", "mapped_pages": 12582912,
    "guest_bytes": 24159191040, "wire_bytes": 8589934592, "network_bandwidth": 0.0,
    "saved_bytes": 1073741824, "wire_rate": 1183242311, "volume_bytes": 12884901888,
    "volume_rate": 512341211, "raw_pages": 2097152, "zero_pages": 524288,
    "referenced_pages": 3145728, "resent_pages": 0, "window_full_pages": 16384,
    "copies_asked": 8192, "copies_unasked": 0, "misses": {"changed": 81920},
    "unresolved_pages": 16384, "peak_window_pages": 65536,
    "seconds": {"preparing": 0.1542, "waiting": 1.2042, "setup": 0.0121, "bulk": 24.1231,
                "held": 0.0, "network_busy": 22.1413, "network_blocked": 3.1241},
}  # fmt: skip

#: Rows that a relay notes in a minute.
_ROWS = 600


def _summary() -> bytes:
    """What a source relay leaves of a minute, compressed."""
    rows = []
    moment, figures = 0.0, dict.fromkeys(("guest_bytes", "wire_bytes", "volume_bytes"), 0)
    chosen = random.Random(1)
    for _ in range(_ROWS):
        moment += chosen.uniform(0.1, 0.101)
        figures = {name: each + chosen.randrange(118 << 20) for name, each in figures.items()}
        rows.append({"t": round(moment, 3), **figures, "window_pages": chosen.randrange(65536)})
    text = json.dumps({**_PROGRESS, "series": rows})
    return gzip.compress(text.encode(), compresslevel=1, mtime=0)


class _Host:
    """Answers as a host's service in the midst of a migration."""

    def __init__(self) -> None:
        self._chunk = base64.b64encode(secrets.token_bytes(_CHUNK_BYTES)).decode()
        self._summary = _summary()

    def hello(self, arguments: host_messages.HelloArguments) -> host_messages.HostState:
        return host_messages.HostState(
            _HOST, HOST.version, (1,), uuid.uuid4().hex, True, ("block", "rbd"), 4, 4, 2, False,
            "192.0.2.17", "/run/nova-dmigrate", "", 64055,
        )  # fmt: skip

    def renew(self, arguments: host_messages.RenewSession) -> host_messages.SessionState:
        return self._state(arguments.session_id)

    def open_destination(self, order: host_messages.OpenDestination) -> host_messages.SessionState:
        return self._state(order.session_id)

    def open_source(self, order: host_messages.OpenSource) -> host_messages.SessionState:
        return self._state(order.session_id)

    def close(self, arguments: host_messages.SessionReference) -> host_messages.SessionState:
        return self._state(arguments.session_id)

    def use_map(self, arguments: host_messages.UseMap) -> host_messages.SessionState:
        return self._state(arguments.session_id)

    def summary(self, arguments: host_messages.SummaryArguments) -> host_messages.SummaryChunk:
        data = base64.b64encode(self._summary).decode()
        return host_messages.SummaryChunk(len(self._summary), arguments.offset, data)

    @staticmethod
    def save_chunks(request: host_messages.SaveChunks) -> host_messages.SavedChunks:
        return host_messages.SavedChunks(request.behind, 1 << 28)

    def agent(self, request: host_messages.AgentRequest) -> host_messages.AgentAnswer:
        answers: dict[str, Any] = {
            "ping": lambda: messages.Pong("1.0.0", messages.VERSION, uuid.uuid4().hex),
            "health": self._health,
            "map_begin": self._map_state,
            "map_state": self._map_state,
            "map_chunk": lambda: messages.Chunk(0, self._chunk),
            "map_end": messages.Done,
        }
        result = dataclasses.asdict(answers[request.method]())
        return host_messages.AgentAnswer(json.dumps({"id": uuid.uuid4().hex, "result": result}))

    @staticmethod
    def _map_state() -> messages.MapState:
        return messages.MapState(uuid.uuid4().hex, "building", 0, 0, 0, 0.0, "")

    @staticmethod
    def _health() -> messages.Health:
        server = messages.ServerHealth(
            "/var/lib/mysql", True, "", 123456.0, 0.012, 12, 1234567890, 12345678901, 0.61
        )
        return messages.Health(uuid.uuid4().hex, 0, None, (server,))

    @staticmethod
    def _state(session_id: str) -> host_messages.SessionState:
        return host_messages.SessionState(
            session_id, str(uuid.uuid4()), str(uuid.uuid4()), "source", "running", "", _HOST,
            49152, 0, 29.9, json.dumps(_PROGRESS),
            f"/var/lib/nova-dmigrate/summaries/{session_id}.json",
        )  # fmt: skip


class Counter:
    """A relay in front of a port of this machine: bytes to it and from it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.sent = self.received = 0
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                for source, sink, sending in ((near, far, True), (far, near, False)):
                    threading.Thread(
                        target=self._pass, args=(source, sink, sending), daemon=True
                    ).start()

    def _pass(self, source: socket.socket, sink: socket.socket, sending: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_BUFFER):
                sink.sendall(data)
                if sending:
                    self.sent += len(data)
                else:
                    self.received += len(data)
            sink.shutdown(socket.SHUT_WR)


def measure(calls: int, chunks: int) -> dict[str, Report]:
    """Each request, asked that often one after the other."""
    with Broker([]) as rabbit, _parties(rabbit) as (client, way, counters):
        agent = AgentClient("instance", way, ClientSettings(timeout=_PATIENCE))
        session = str(uuid.uuid4())
        common: dict[str, Any] = {
            "migration_id": str(uuid.uuid4()),
            "instance": str(uuid.uuid4()),
            "session_id": session,
            "token": secrets.token_hex(32),
            "qemu_socket": f"/run/nova-dmigrate/{uuid.uuid4()}/qemu",
            "volumes": (host_messages.Volume(str(uuid.uuid4()), "rbd", "volumes/volume-1"),),
            "tls_peer_name": _HOST,
            "guest_memory": 64 << 30,
        }
        source = host_messages.OpenSource(host="192.0.2.17", port=49152, **common)
        map_id = uuid.uuid4().hex
        reference = {"map_id": map_id}
        chunk = {"map_id": map_id, "index": 1}
        file = MapFile(f"/var/lib/nova-dmigrate/maps/{uuid.uuid4()}.map", _CHUNK_BYTES)
        requests: dict[str, tuple[Callable[[], Any], int]] = {
            "hello": (client.hello, calls),
            "open_destination": (
                lambda: client.open_session(host_messages.OpenDestination(**common)),
                calls,
            ),
            "open_source": (lambda: client.open_session(source), calls),
            "renew": (lambda: client.renew(session), calls),
            "close": (lambda: client.close_session(session), calls),
            "ping": (agent.ping, calls),
            "health": (agent.health, calls),
            "map_begin": (_asking(way, "map_begin", {"max_chunk_bytes": _CHUNK_BYTES}), calls),
            "map_state": (_asking(way, "map_state", reference), calls),
            "map_chunk": (_asking(way, "map_chunk", chunk), chunks),
            "save_chunks": (lambda: way.save_chunks(map_id, 400, file, 5.0), calls),
            "map_end": (_asking(way, "map_end", reference), calls),
            "use_map": (lambda: client.use_map(session, file.path, f"{file.path}.mtree"), calls),
            "summary": (lambda: client.summary(session), calls),
        }
        return {
            name: _cost(ask, count, counters, rabbit) for name, (ask, count) in requests.items()
        }


def _asking(way: Transport, method: str, arguments: Report) -> Callable[[], Any]:
    return lambda: way.call(method, uuid.uuid4().hex, arguments, _PATIENCE)


@contextlib.contextmanager
def _parties(
    rabbit: Broker,
) -> Iterator[tuple[HostClient, HostChannelTransport, tuple[Counter, Counter]]]:
    """Who asks, and what passes on either side of the broker."""
    asking, serving = counters = Counter(rabbit.port), Counter(rabbit.port)
    conf = broker.make_conf()

    def url(counter: Counter) -> str:
        return rabbit.services_url().replace(f":{rabbit.port}/", f":{counter.port}/")

    with contextlib.ExitStack() as stack:
        for each in counters:
            stack.callback(each.close)
        server = broker.BrokerServer(_HOST, Dispatcher(_Host(), HOST), conf, url(serving))
        server.start()
        stack.callback(server.stop)
        if not server.wait_until_serving(_PATIENCE):
            raise RuntimeError(f"nobody serves at the broker: {rabbit.log()[-2000:]}")
        transport = broker.BrokerTransport(_HOST, url(asking), HOST, conf)
        client = stack.enter_context(HostClient(_HOST, transport, timeout=_PATIENCE))
        instance = str(uuid.uuid4())
        way = HostChannelTransport(instance, client, "/var/lib/libvirt/qemu/channel/1/port")
        yield client, way, counters


def _cost(
    ask: Callable[[], Any], count: int, counters: tuple[Counter, Counter], rabbit: Broker
) -> Report:
    """Of one request with its answer."""
    ask()
    time.sleep(0.2)  # what acknowledges it is on its way
    before = _passed(counters)
    busy, began = _busy(rabbit), time.monotonic()
    for _ in range(count):
        ask()
    seconds = time.monotonic() - began
    time.sleep(0.2)
    into, out = (after - then for after, then in zip(_passed(counters), before, strict=True))
    return {
        "bytes_in": round(into / count),
        "bytes_out": round(out / count),
        "ms": 1000 * seconds / count,
        "broker_cpu_ms": 1000 * (_busy(rabbit) - busy) / count,
    }


def _busy(rabbit: Broker) -> float:
    """Seconds that the broker has kept a processor busy."""
    seconds = 0.0
    for pid in rabbit.emulators:
        # The script that starts it has children of its own, which end
        with contextlib.suppress(OSError):
            seconds += cpu_seconds(pid)
    return seconds


def _passed(counters: tuple[Counter, Counter]) -> tuple[int, int]:
    """Bytes into the broker, and out of it."""
    return sum(each.sent for each in counters), sum(each.received for each in counters)
