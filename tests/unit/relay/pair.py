# SPDX-License-Identifier: Apache-2.0
"""Two relays in this process between a sender and a recorder that stand for the two QEMUs."""

import faulthandler
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.buffermap import BufferMap, VolumeExtents
from nova_dmigrate.relay.destination import DestinationRelay
from nova_dmigrate.relay.monitor import Report, ask
from nova_dmigrate.relay.session import DestinationSession, RelaySettings, SourceSession
from nova_dmigrate.relay.source import SourceRelay
from nova_dmigrate.relay.wire.handshake import Credentials
from nova_dmigrate.relay.wire.tls import TlsSettings
from nova_dmigrate.volumes import VolumeSpec

PAGE = 4096
MIB = 1 << 20
#: Seconds after which a migration of these tests hangs for certain.
HANGS = 60.0
#: Where the sender's guest has its RAM: the layout begins at 1 MiB, as the real one does.
MTREE = """FlatView #0
 AS "memory", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram
  0000000000100000-{end:016x} (prio 0, ram): pc.ram @0000000000100000
"""


@dataclass
class Pair:
    """What one migration through two relays needs; :meth:`run` runs it.

    :ivar chunks: QEMU's stream.
    :ivar pages: numbers of guest pages (from 256 on) that are mapped, with ``blocks``, their volume
        blocks.
    """

    directory: Path
    chunks: Iterable[bytes]
    ram_size: int
    pages: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    blocks: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    volume_size: int = 0
    volume: Path | None = None
    map_path: Path | None = None
    source_settings: RelaySettings = field(default_factory=RelaySettings)
    destination_settings: RelaySettings = field(default_factory=RelaySettings)
    source_tls: TlsSettings | None = None
    destination_tls: TlsSettings | None = None
    #: In place of the map that ``pages`` and ``blocks`` make.
    extents: Sequence[VolumeExtents] | None = None
    #: Bytes of the stream after which the source gets its map; None to have it from the start.
    map_after: int | None = None
    #: In place of the one volume that the destination has.
    volumes: Sequence[VolumeSpec] | None = None
    #: In place of the layout with one RAMBlock.
    layout: str | None = None
    #: Where the source relay connects instead of to the destination's address.
    route: Callable[[tuple[str, int]], tuple[str, int]] | None = None
    #: The token that the source has instead of the right one.
    source_token: bytes | None = None
    #: What the recorder answers on the return path once the stream has ended.
    answer: bytes = b""
    #: Called with the sender's socket in place of sending ``chunks``.
    sender: Callable[[socket.socket], None] | None = None
    #: Called with the recorder's socket in place of recording.
    receiver: Callable[[socket.socket], None] | None = None

    recorded: bytes = b""
    answered: bytes = b""
    source_summary: Report = field(default_factory=dict)
    destination_summary: Report = field(default_factory=dict)
    sender_error: OSError | None = None
    receiver_error: OSError | None = None

    def prepare(self) -> None:
        """Make both relays, ready to run."""
        self.directory.mkdir(exist_ok=True)
        credentials = Credentials("session", secrets.token_bytes(32))
        volumes = self.volumes
        if volumes is None:
            volumes = []
            if self.volume is not None:
                volumes = [VolumeSpec("volume", "block", str(self.volume))]
        self.recorder = socket.socket(socket.AF_UNIX)
        self.recorder.bind(str(self.directory / "destination"))
        self.recorder.listen(1)
        self.destination = DestinationRelay(
            DestinationSession(
                instance="instance",
                credentials=credentials,
                qemu_socket=self.directory / "destination",
                host="127.0.0.1",
                port=0,
                tls=self.destination_tls,
                control_socket=self.directory / "destination.control",
                summary=self.directory / "destination.json",
                volumes=tuple(volumes),
            ),
            self.destination_settings,
        )
        address = self.destination.prepare()
        host, port = self.route(address) if self.route is not None else address
        if self.source_token is not None:
            credentials = Credentials("session", self.source_token)
        self._save_map()
        self._layout = layout = self.directory / "layout"
        layout.write_text(self.layout or MTREE.format(end=self.ram_size - 1))
        at_once = self.map_path is not None and self.map_after is None
        self.source = SourceRelay(
            SourceSession(
                instance="instance",
                credentials=credentials,
                qemu_socket=self.directory / "source",
                host=host,
                port=port,
                tls=self.source_tls,
                control_socket=self.directory / "source.control",
                summary=self.directory / "source.json",
                buffer_map=self.map_path if at_once else None,
                memory_layout=layout if at_once else None,
            ),
            self.source_settings,
        )
        self.source.prepare()

    def _save_map(self) -> None:
        if self.map_path is not None:
            return
        extents = self.extents
        if extents is None:
            if not len(self.pages):
                return
            extents = [extents_of("volume", self.volume_size, self.pages, self.blocks)]
        self.map_path = self.directory / "map"
        BufferMap.build(extents).save(self.map_path)

    def run(self) -> None:
        """Relay the stream; afterwards the results are in the attributes."""
        self.prepare()
        self.start()
        self.join()

    def start(self) -> None:
        """Let everybody begin."""
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._run_source, self._run_destination, self._send, self._record)
        ]
        for thread in self._threads:
            thread.start()

    def offer_map(self) -> None:
        """Have the source load the map now, and wait until it has."""
        control = self.directory / "source.control"
        paths = {"buffer_map": str(self.map_path), "memory_layout": str(self._layout)}
        assert ask(control, "map", **paths) == {"loading": True}
        self._wait_for(lambda told: told["map"] != "none", "the map is not loaded")

    def _wait_until_taken(self, count: int) -> None:
        """Until the source has so many bytes of the stream, not only the socket."""
        self._wait_for(lambda told: told["guest_bytes"] >= count, "the stream is not taken")

    def _wait_for(self, enough: Callable[[Report], bool], otherwise: str) -> None:
        deadline = time.monotonic() + HANGS
        while not enough(ask(self.directory / "source.control", "progress")):
            assert time.monotonic() < deadline, otherwise
            time.sleep(0.01)

    def join(self) -> None:
        """Wait for everybody.

        :raises AssertionError: the migration hangs; the message tells where all threads are.
        """
        deadline = time.monotonic() + HANGS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        if any(thread.is_alive() for thread in self._threads):
            with tempfile.TemporaryFile("w+") as stacks:
                faulthandler.dump_traceback(stacks)
                stacks.seek(0)
                raise AssertionError(f"the migration hangs:\n{stacks.read()}")
        self.recorder.close()

    def abandon(self) -> None:
        """End what :meth:`prepare` has left behind when it failed at the source."""
        self.destination.cancel()
        self._run_destination()
        self.recorder.close()

    def _run_source(self) -> None:
        self.source_summary = self.source.run()

    def _run_destination(self) -> None:
        self.destination_summary = self.destination.run()
        # What never was dialled waits no more.
        self.recorder.shutdown(socket.SHUT_RDWR)

    def _send(self) -> None:
        with socket.socket(socket.AF_UNIX) as qemu:
            try:
                qemu.connect(str(self.directory / "source"))
                if self.sender is not None:
                    self.sender(qemu)
                    return
                for chunk in self.chunks:
                    if self.map_after is None:
                        qemu.sendall(chunk)
                        continue
                    begin = chunk[: self.map_after]
                    qemu.sendall(begin)
                    self._wait_until_taken(len(begin))
                    self.offer_map()
                    qemu.sendall(chunk[self.map_after :])
                while len(self.answered) < len(self.answer):
                    data = qemu.recv(4096)
                    if not data:
                        break
                    self.answered += data
            except OSError as error:
                self.sender_error = error

    def _record(self) -> None:
        try:
            qemu, _ = self.recorder.accept()
        except OSError:
            return
        with qemu:
            pieces = []
            try:
                if self.receiver is not None:
                    self.receiver(qemu)
                    return
                if self.answer:
                    qemu.sendall(self.answer)
                while data := qemu.recv(MIB):
                    pieces.append(data)
            except OSError as error:
                self.receiver_error = error
            self.recorded = b"".join(pieces)


def extents_of(
    volume: str, size: int, pages: NDArray[np.int64], blocks: NDArray[np.int64]
) -> VolumeExtents:
    """Guest pages (numbers from guest-physical address 0 on) that lie on blocks of a volume."""
    count = len(pages)
    return VolumeExtents(
        volume,
        size,
        pages.astype(np.uint64) * PAGE,
        blocks.astype(np.uint64) * PAGE,
        np.full(count, PAGE, np.uint64),
    )


class Cutter:
    """A wire between the relays that breaks: behind ``limit`` bytes in one direction of one
    connection.

    :ivar address: where the source relay is to connect.
    """

    def __init__(self, target: tuple[str, int], *, connection: int, limit: int) -> None:
        """:param connection: which of the source's connections breaks, in the order in which they
        are made; all others end with it.
        """
        self._target = target
        self._breaking = connection
        self._limit = limit
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Give everything back."""
        self._break()
        with self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(HANGS)
        for sock in self._sockets:
            sock.close()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._sockets += [near, far]
            limit = self._limit if number == self._breaking else None
            number += 1
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(
                    target=self._pass, args=(source, sink, limit), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _pass(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        try:
            while data := source.recv(4096):
                if limit is not None and passed + len(data) >= limit:
                    sink.sendall(data[: limit - passed])
                    self._break()
                    return
                sink.sendall(data)
                passed += len(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def _break(self) -> None:
        for sock in self._sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
