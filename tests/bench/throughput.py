# SPDX-License-Identifier: Apache-2.0
"""Part ``relay``: throughput and CPU time of a pair of relays beside a byte-blind pair of socats.

One stream goes from a sender over the UNIX socket of the source side, TCP on loopback, and the UNIX
socket of the destination side to a sink. Everything that is compared takes turns.
"""

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nova_dmigrate.relay.wire.tls import TlsSettings
from tests.bench.cpu import Meter
from tests.bench.streams import PAGE, Stream, make_stream, write_map, write_volume
from tests.lab.processes import end, spawn
from tests.lab.qmp import connect_unix
from tests.lab.relays import VOLUME, RelayPair, SavedMap
from tests.unit.relay.wire.certificates import Authority

#: socat at its best: its own default of 8 KiB would be no match.
_SOCAT_BLOCK = 256 << 10
_SINK_BUFFER = 1 << 20
_TIMEOUT = 120


@dataclass(frozen=True)
class Sample:
    """One run: GB (10^9 bytes of guest memory) a second, CPU seconds a GB of each process."""

    gb_per_s: float
    source_cpu: float
    destination_cpu: float
    referenced: float = 0.0

    @property
    def cpu(self) -> float:
        return self.source_cpu + self.destination_cpu


class Sink:
    """What stands for the destination QEMU: takes everything and throws it away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(_TIMEOUT)
        self.bytes = 0
        self.ended = 0.0
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def wait(self) -> float:
        """When the end of the stream came, time.monotonic()."""
        self._thread.join(_TIMEOUT)
        self._listener.close()
        return self.ended

    def _take(self) -> None:
        peer, _ = self._listener.accept()
        buffer = bytearray(_SINK_BUFFER)
        with peer:
            peer.settimeout(None)
            while count := peer.recv_into(buffer):
                self.bytes += count
            self.ended = time.monotonic()


def send(path: Path, stream: Stream) -> float:
    """Send a stream as QEMU would; returns when that began, time.monotonic()."""
    peer = connect_unix(path, 10)
    begin = time.monotonic()
    peer.sendall(stream.data)
    peer.shutdown(socket.SHUT_WR)
    # QEMU closes at once; socat would then give its other direction half a second.
    peer.close()
    return begin


class Bench:
    """What the runs share: streams, volume, certificates."""

    def __init__(self, directory: Path, *, raw_pages: int, zero_pages: int) -> None:
        self.directory = directory
        self.raw = make_stream("raw", raw_pages)
        self.zero = make_stream("zero", zero_pages)
        self.volume = write_volume(directory / "volume.raw", raw_pages)
        write_map(directory / "map", directory / "layout", raw_pages)
        authority = Authority(directory)
        self.source_tls = authority.settings("source.example", peer="destination.example")
        self.destination_tls = authority.settings("destination.example", peer="source.example")
        self._number = 0

    def fresh(self) -> Path:
        """A directory for one run's sockets and files."""
        self._number += 1
        path = self.directory / str(self._number)
        path.mkdir()
        return path

    def relay(self, kind: str, tls: bool, **options: object) -> Sample:
        """Send through two relays; options as of ``RelayPair``."""
        stream = self.zero if kind == "zero" else self.raw
        directory = self.fresh()
        sink = Sink(directory / "incoming.sock")
        settings: dict[str, Any] = {**options}
        if tls:
            settings["tls"] = (self.source_tls, self.destination_tls)
        if kind == "referenced":
            settings["volumes"] = {VOLUME: self.volume}
            settings["saved"] = SavedMap(self.directory / "map", self.directory / "layout")
        with RelayPair(directory, sink.path, **settings) as pair:
            meters = [Meter(relay.pid) for relay in (pair.source, pair.destination)]
            seconds = -send(pair.outgoing, stream) + sink.wait()
            cpu = [meter.finish() for meter in meters]
            if pair.wait() != (0, 0):
                raise RuntimeError(f"the relays did not deliver\n{pair.last_words()}")
            summary = pair.source.summary()
        if sink.bytes < len(stream.data) * 0.9:
            raise RuntimeError(f"{sink.bytes} bytes of {len(stream.data)} arrived")
        share = summary["referenced_pages"] * PAGE / stream.guest_bytes
        return _sample(stream, seconds, *cpu, share)

    def socat(self, kind: str, tls: bool) -> Sample:
        """Send through two socats."""
        stream = self.zero if kind == "zero" else self.raw
        directory = self.fresh()
        sink = Sink(directory / "incoming.sock")
        with socats(directory, self.source_tls if tls else None, self.destination_tls) as pids:
            meters = [Meter(pid) for pid in pids]
            seconds = -send(directory / "outgoing", stream) + sink.wait()
            cpu = [meter.finish() for meter in meters]
        if sink.bytes != len(stream.data):
            raise RuntimeError(f"{sink.bytes} bytes of {len(stream.data)} arrived")
        return _sample(stream, seconds, *cpu)


@contextlib.contextmanager
def socats(directory: Path, client: TlsSettings | None, server: TlsSettings) -> Iterator[list[int]]:
    """UNIX-LISTEN to TCP, TCP-LISTEN to UNIX-CONNECT; with TLS where there is a client for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if client is None:
        listen, connect = "TCP-LISTEN", "TCP"
        server_options = client_options = "nodelay"
    else:
        listen, connect = "OPENSSL-LISTEN", "OPENSSL"
        server_options = _socat_tls(server) + ",nodelay"
        client_options = _socat_tls(client) + f",commonname={client.peer_name},nodelay"
    base = ["socat", "-b", str(_SOCAT_BLOCK)]
    ends = (
        (
            f"UNIX-LISTEN:{directory}/outgoing",
            f"{connect}:127.0.0.1:{port},{client_options}",
        ),
        (
            f"{listen}:{port},bind=127.0.0.1,reuseaddr,{server_options}",
            f"UNIX-CONNECT:{directory}/incoming.sock",
        ),
    )
    processes = [spawn([*base, *end_]) for end_ in ends]
    try:
        while f":{port:04X} " not in Path("/proc/net/tcp").read_text():
            time.sleep(0.01)
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            end(process)


def _socat_tls(settings: TlsSettings) -> str:
    return f"cert={settings.certificate},key={settings.key},cafile={settings.ca},verify=1"


def _sample(
    stream: Stream, seconds: float, source: float, destination: float, referenced: float = 0.0
) -> Sample:
    gigabytes = stream.guest_bytes / 1e9
    return Sample(gigabytes / seconds, source / gigabytes, destination / gigabytes, referenced)


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    """Rows ``relay`` and ``socat`` of bench.json; medians."""
    cases = [(kind, tls) for tls in (False, True) for kind in ("raw", "zero", "referenced")]
    relay: dict[tuple[str, bool], list[Sample]] = {case: [] for case in cases}
    blind: dict[tuple[str, bool], list[Sample]] = {}
    for _ in range(rounds):
        for kind, tls in cases:
            # What is referenced would otherwise have been raw: it is compared with the same socat.
            if kind != "referenced":
                blind.setdefault((kind, tls), []).append(bench.socat(kind, tls))
            relay[kind, tls].append(bench.relay(kind, tls))
    rows = []
    for kind, tls in cases:
        samples = relay[kind, tls]
        beside = blind["raw" if kind == "referenced" else kind, tls]
        plain = blind["raw" if kind == "referenced" else kind, False]
        speed = _median(samples, "gb_per_s")
        rows.append(
            {
                "kind": kind,
                "tls": tls,
                "gb_per_s": round(speed, 3),
                "cpu_s_per_gb": round(_median(samples, "cpu"), 3),
                "ratio_to_socat": round(speed / _median(beside, "gb_per_s"), 3),
                "ratio_to_plain_socat": round(speed / _median(plain, "gb_per_s"), 3),
                "source_cpu_s_per_gb": round(_median(samples, "source_cpu"), 3),
                "destination_cpu_s_per_gb": round(_median(samples, "destination_cpu"), 3),
                "referenced_share": round(_median(samples, "referenced"), 3),
            }
        )
    socat = [
        {
            "kind": kind,
            "tls": tls,
            "gb_per_s": round(_median(samples, "gb_per_s"), 3),
            "cpu_s_per_gb": round(_median(samples, "cpu"), 3),
        }
        for (kind, tls), samples in blind.items()
    ]
    return {"relay": rows, "socat": socat}


def _median(samples: list[Sample], name: str) -> float:
    return statistics.median(getattr(sample, name) for sample in samples)
