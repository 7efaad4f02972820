# SPDX-License-Identifier: Apache-2.0
"""Two relays in this process between a sender and a recorder that stand for the two QEMUs."""

import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.buffermap import BufferMap, VolumeExtents
from nova_dmigrate.relay.destination import DestinationRelay
from nova_dmigrate.relay.monitor import Report
from nova_dmigrate.relay.session import DestinationSession, RelaySettings, SourceSession
from nova_dmigrate.relay.source import SourceRelay
from nova_dmigrate.relay.wire.handshake import Credentials
from nova_dmigrate.relay.wire.tls import TlsSettings
from nova_dmigrate.volumes import VolumeSpec

PAGE = 4096
MIB = 1 << 20
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

    def prepare(self) -> None:
        """Make both relays, ready to run."""
        self.directory.mkdir(exist_ok=True)
        credentials = Credentials("session", secrets.token_bytes(32))
        volumes: Sequence[VolumeSpec] = ()
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
        host, port = self.destination.prepare()
        if self.map_path is None and len(self.pages):
            self.map_path = self.directory / "map"
            pages = self.pages.astype(np.uint64)
            extents = VolumeExtents(
                "volume",
                self.volume_size,
                pages * PAGE,
                self.blocks.astype(np.uint64) * PAGE,
                np.full(len(pages), PAGE, np.uint64),
            )
            BufferMap.build([extents]).save(self.map_path)
        layout = self.directory / "layout"
        layout.write_text(MTREE.format(end=self.ram_size - 1))
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
                buffer_map=self.map_path,
                memory_layout=layout if self.map_path is not None else None,
            ),
            self.source_settings,
        )
        self.source.prepare()

    def run(self) -> None:
        """Relay the stream; afterwards the results are in the attributes."""
        self.prepare()
        threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._run_source, self._run_destination, self._send, self._record)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
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
                    qemu.sendall(chunk)
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
            if self.receiver is not None:
                self.receiver(qemu)
                return
            pieces = []
            try:
                if self.answer:
                    qemu.sendall(self.answer)
                while data := qemu.recv(MIB):
                    pieces.append(data)
            except OSError as error:
                self.receiver_error = error
            self.recorded = b"".join(pieces)
