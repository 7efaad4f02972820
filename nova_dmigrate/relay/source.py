# SPDX-License-Identifier: Apache-2.0
"""The source relay: QEMU's stream in, frames for the destination relay out.

Threads: the main one reads QEMU and classifies pages, one a connection sends, one receives the
destination's answers. The window is shared between them; all else has one owner.
"""

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from oslo_log import log

from nova_dmigrate import exception
from nova_dmigrate.buffermap import BufferMap
from nova_dmigrate.memory_layout import MemoryLayout
from nova_dmigrate.relay import protocol
from nova_dmigrate.relay.buffers import BufferPool
from nova_dmigrate.relay.compression import Compressor
from nova_dmigrate.relay.connections import Connections
from nova_dmigrate.relay.forwarder import BULK_DELAY, Forwarder
from nova_dmigrate.relay.handover import MapHandover
from nova_dmigrate.relay.intake import Intake, QemuListener
from nova_dmigrate.relay.lifecycle import Lifecycle
from nova_dmigrate.relay.monitor import ControlServer, Report, Sampler, Stages, write_summary
from nova_dmigrate.relay.outbox import Outbox, Parcel
from nova_dmigrate.relay.pacing import TokenBucket
from nova_dmigrate.relay.session import RelaySettings, SourceSession
from nova_dmigrate.relay.window import Window
from nova_dmigrate.relay.wire.connection import Connection
from nova_dmigrate.relay.wire.frames import MISS, SLOT, Frame, FrameType, Header, Role
from nova_dmigrate.relay.wire.handshake import connect
from nova_dmigrate.stream.format import MAX_ELEMENT
from nova_dmigrate.stream.reader import StreamParser

LOG = log.getLogger(__name__)

#: Buffers of QEMU's stream that may be on their way; few, see the downtime trap in the architecture
#: document.
_BUFFERS = 8
#: Bytes that may wait for the network whatever its rate.
_QUEUE_FLOOR = 256 << 10
#: The same in the kernel for each connection, when queues have to be short.
_UNSENT_FLOOR = 128 << 10


class SourceRelay:
    """One migration, seen from the source host. Call :meth:`prepare`, then :meth:`run`, once."""

    def __init__(
        self,
        session: SourceSession,
        settings: RelaySettings,
        on_kept: Callable[[], None] = lambda: None,
    ) -> None:
        """:param on_kept: called before nobody can cancel any more."""
        self._session = session
        self._settings = settings
        self._on_kept = on_kept
        self._life = Lifecycle(session.instance)
        self._stages = Stages("preparing")
        self._window = Window(settings.window_size)
        self._bucket = TokenBucket(settings.network_bandwidth)
        self._outbox = Outbox(
            self._window,
            delay=BULK_DELAY,
            floor=_QUEUE_FLOOR,
            fill=lambda idle: self._forwarder.reading_order(idle),
        )
        self._pool = BufferPool(settings.batch_size + MAX_ELEMENT, _BUFFERS + settings.channels)
        self._parser = StreamParser()
        self._handover = MapHandover(session.instance, self._outbox, settings.stall_timeout)
        self._forwarder = Forwarder(
            session.instance,
            settings,
            self._parser,
            self._window,
            self._outbox,
            self._handover,
            self._stages,
            stopped=lambda: self._life.failed,
            on_late=self._shorten_queues,
            on_post_copy=self._keep,
        )
        self._wire = Connections()
        self._compressors: list[Compressor] = []
        self._listener: QemuListener | None = None
        self._qemu: socket.socket | None = None
        self._intake: Intake | None = None
        self._control: ControlServer | None = None
        self._sampler = Sampler(self._sample)
        self._peer_done: Report | None = None
        self._misses: dict[str, int] = {}
        self._stream_ended = False
        self._return_ended = threading.Event()

    # Before the migration

    def prepare(self) -> None:
        """Load the map if there is one, connect to the destination relay, and listen for QEMU.

        :raises DMigrateError: the destination cannot be reached or refuses, or the socket cannot be
            made.
        """
        try:
            if self._session.buffer_map is not None and self._session.memory_layout is not None:
                self._load_map(self._session.buffer_map, self._session.memory_layout)
            self._connect()
            self._listener = QemuListener(self._session.qemu_socket, self._session.instance)
            if self._session.control_socket is not None:
                self._control = ControlServer(
                    self._session.control_socket,
                    self.progress,
                    self.cancel,
                    self._limit,
                    self._use_map,
                )
        except BaseException:
            self._close()
            raise
        self._life.on_failure(self._wake_all)
        self._stages.enter("waiting")

    def _use_map(self, buffer_map: Path, memory_layout: Path) -> None:
        """Have a map loaded that has come only now; it is used as soon as it is there."""
        threading.Thread(
            target=self._load_map, args=(buffer_map, memory_layout), name="map", daemon=True
        ).start()

    def _load_map(self, buffer_map: Path, memory_layout: Path) -> None:
        """The map comes from the guest: one that is of no use costs the gain, not the migration."""
        instance = self._session.instance
        try:
            layout = MemoryLayout.from_mtree(memory_layout.read_text())
            loaded = BufferMap.load(buffer_map, self._settings.map_limits)
        except (
            OSError,
            ValueError,
            exception.BufferMapError,
            exception.MemoryLayoutError,
        ) as error:
            LOG.warning("Instance %s migrates without a buffer map: %s", instance, error)
            self._handover.fail()
            return
        if not self._handover.offer(loaded, layout):
            LOG.warning("Instance %s: one buffer map more is not used", instance)

    def _connect(self) -> None:
        session, settings = self._session, self._settings

        def open_connection(role: Role, index: int) -> Connection:
            connection, agreement = connect(
                session.host,
                session.port,
                session.credentials,
                role,
                index,
                session.tls,
                settings.connect_timeout,
                protocol.CAPABILITIES,
            )
            missing = protocol.NEEDED - agreement.capabilities
            if missing:
                connection.close()
                reason = f"it cannot do what is needed: {', '.join(sorted(missing))}"
                raise exception.HandshakeError(peer=connection.peer, reason=reason)
            if role is Role.DATA:
                compressing = settings.compression and protocol.ZSTD in agreement.capabilities
                self._compressors.append(Compressor(compressing))
            return connection

        self._wire.acks = acks = open_connection(Role.ACKS, 0)
        # The destination shows that it is alive every second, whatever its QEMU does.
        acks.set_timeout(settings.stall_timeout)
        for index in range(settings.channels):
            connection = open_connection(Role.DATA, index)
            # A sender may wait for as long as the destination's QEMU does: silence shows on the
            # other connection.
            connection.set_timeout(None)
            self._wire.data.append(connection)

    # The migration

    def run(self) -> Report:
        """Relay one migration; returns the summary, whose ``state`` tells how it ended."""
        self._sampler.start()
        for connection in self._wire.data:
            self._life.start(f"send-{connection.index}", functools.partial(self._send, connection))
        if self._session.tls is None:
            # What TLS costs is better spread over threads.
            self._outbox.direct = functools.partial(self._send_parcel, self._wire.data[0])
        self._life.start("answers", self._receive_answers)
        self._life.start("stream", self._relay_stream)
        self._life.limit_waiting(self._settings.idle_timeout)
        return self._finish(*self._life.outcome())

    def cancel(self) -> bool:
        """End the migration; QEMU sees a broken connection and the guest goes on at the source.

        Returns whether that is so: where post-copy may begin, nobody but QEMU ends a migration.
        What it has sent may be on its way, and with it the guest.
        """
        return self._life.cancel()

    def _keep(self) -> None:
        # In this order: whoever wants to kill this process looks at what it has told
        self._on_kept()
        self._life.keep()

    def _limit(self, network: float, volume: float) -> None:
        del volume
        self._bucket.limit(network)

    def _relay_stream(self) -> None:
        assert self._listener is not None
        self._qemu = self._listener.accept()
        self._life.begin()
        self._life.start("watch", self._listener.watch)
        self._stages.enter("setup")
        self._intake = Intake(self._qemu, self._pool, self._parser, self._session.instance)
        self._intake.limit = self._settings.batch_size
        self._forwarder.relay(self._intake)
        self._end()

    def _end(self) -> None:
        """QEMU closed its connection."""
        assert self._listener is not None
        if self._life.failed:
            return
        if self._parser.opaque_reason is None:
            raise exception.MigrationCancelled(
                instance=self._session.instance,
                reason="QEMU closed the connection before RAM was complete",
            )
        self._stream_ended = True
        self._outbox.end(Parcel(FrameType.END, [], 0))
        self._listener.close()

    # The network

    def _send(self, connection: Connection) -> None:
        direct = connection is self._wire.data[0]
        while True:
            try:
                parcel = self._outbox.take(protocol.KEEPALIVE_SECONDS, direct=direct)
            except EOFError:
                return
            if parcel is None:
                connection.send(FrameType.KEEPALIVE)
                continue
            self._send_parcel(connection, parcel)

    def _shorten_queues(self) -> None:
        """The kernel takes some MB for each connection if it is let; at the switchover all of that
        would lie between the guest's last page and the destination."""
        unsent = max(int(self._outbox.wire_rate * self._settings.queue_delay), _UNSENT_FLOOR)
        for connection in self._wire.data:
            connection.limit_unsent(unsent)

    def _send_parcel(self, connection: Connection, parcel: Parcel) -> None:
        compressor = self._compressors[connection.index]
        packed = compressor.pack(parcel)
        begin, full = time.monotonic(), connection.seconds_peer_full
        due = self._bucket.reserve(packed.size)
        while not self._bucket.wait(due, protocol.KEEPALIVE_SECONDS):
            connection.send(FrameType.KEEPALIVE)
        connection.send(
            packed.type,
            flags=parcel.flags,
            block=parcel.block,
            seq=parcel.seq,
            payload=packed.payload,
        )
        full = connection.seconds_peer_full - full
        compressor.note_sent(packed.size, max(time.monotonic() - begin - full, 0.0))
        self._outbox.sent(parcel, packed.size)

    def _receive_answers(self) -> None:
        acks = self._wire.acks
        assert acks is not None
        while True:
            frame = acks.receive(_allocate)
            try:
                if frame.header.type is FrameType.DONE:
                    self._handle_done(frame.payload)
                    return
                self._handle_answer(frame)
            except ValueError as error:
                raise exception.FrameError(
                    peer=acks.peer, reason=f"a bad answer: {error}"
                ) from error

    def _handle_answer(self, frame: Frame) -> None:
        kind, payload = frame.header.type, frame.payload
        if kind is FrameType.SETTLED:
            self._window.settle(np.frombuffer(payload, SLOT).astype(np.uint32))
        elif kind is FrameType.MISSED:
            misses = np.frombuffer(payload, MISS)
            for reason, count in protocol.count_misses(misses["reason"]).items():
                self._misses[reason] = self._misses.get(reason, 0) + count
            self._window.miss(misses["slot"].astype(np.uint32))
            self._outbox.wake()
        elif kind is FrameType.PROGRESS:
            self._forwarder.peer = protocol.Progress.parse(payload)
            self._outbox.wake()
        elif kind is FrameType.RETURN_PATH:
            self._return(payload)
        elif kind is FrameType.RETURN_END:
            self._end_return_path()
        elif kind is FrameType.MAP_TAKEN:
            self._handover.answer(protocol.parse_text(payload))
        elif kind is FrameType.FAILED:
            raise exception.PeerLost(
                peer=self._wire.peer,
                reason=f"the destination relay gave up: {protocol.parse_text(payload)}",
            )

    def _handle_done(self, payload: memoryview) -> None:
        """The destination has delivered everything, and its QEMU has said its last word."""
        if not self._stream_ended:
            raise ValueError("done before the stream's end")
        self._peer_done = protocol.parse_report(payload)
        self._end_return_path()
        self._close_listener()

    def _return(self, data: memoryview) -> None:
        """Hand QEMU what the destination's QEMU says."""
        if self._qemu is None:
            raise ValueError("return path before QEMU connected")
        # QEMU closes its end when it is done and does not wait for the last word.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._qemu.sendall(data)

    def _end_return_path(self) -> None:
        if self._qemu is not None and not self._return_ended.is_set():
            self._return_ended.set()
            with contextlib.suppress(OSError):
                self._qemu.shutdown(socket.SHUT_WR)

    # The end

    def _wake_all(self) -> None:
        """After a failure: make everything that blocks return."""
        self._bucket.release()
        self._handover.release()
        self._window.close()
        failure = self._life.failure
        self._outbox.abort(protocol.abort_parcel(str(failure)))
        self._pool.close()
        self._close_listener()
        if self._qemu is not None:
            # QEMU sees its migration fail, and the guest goes on here.
            with contextlib.suppress(OSError):
                self._qemu.shutdown(socket.SHUT_RDWR)
        self._wire.break_off(failure)

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def _finish(self, state: str, reason: str | None) -> Report:
        series = self._sampler.stop()
        summary = {
            **self.progress(),
            "state": state,
            "reason": reason,
            "series": series,
            "destination": self._peer_done,
        }
        self._close()
        if self._session.summary is not None:
            write_summary(self._session.summary, summary)
        LOG.info("Instance %s: %s", self._session.instance, describe(summary))
        return summary

    def _close(self) -> None:
        self._close_listener()
        if self._qemu is not None:
            self._qemu.close()
        self._wire.close()
        if self._control is not None:
            self._control.close()

    def _sample(self, now: float) -> Report:
        del now
        # Ten times a second: well over the time that an answer to a reference takes.
        self._window.ripen()
        self._outbox.wake()
        return {
            "guest_bytes": self._intake.bytes if self._intake else 0,
            "wire_bytes": sum(connection.bytes_sent for connection in self._wire.data),
            "volume_bytes": self._forwarder.peer.volume_bytes,
            "window_pages": self._window.unresolved,
        }

    def progress(self) -> Report:
        """How far the migration is: cumulative figures, bytes and pages."""
        forwarder, counts = self._forwarder, self._forwarder.counts
        return {
            "role": "source",
            "instance": self._session.instance,
            "state": "running",
            "stage": self._stages.current,
            "passes": forwarder.passes,
            "bulk_resolved": forwarder.bulk_resolved,
            "pass_through": forwarder.pass_through,
            "machine": self._parser.machine,
            "ram_bytes": self._parser.total_ram,
            "map": self._handover.state.value,
            "mapped_pages": forwarder.mapped_pages,
            "guest_bytes": self._intake.bytes if self._intake else 0,
            "wire_bytes": sum(connection.bytes_sent for connection in self._wire.data),
            "network_bandwidth": self._bucket.rate,
            "saved_bytes": sum(each.saved_bytes for each in self._compressors),
            "wire_rate": round(self._outbox.wire_rate),
            "volume_bytes": forwarder.peer.volume_bytes,
            "volume_rate": round(forwarder.peer.volume_rate),
            "raw_pages": counts.raw,
            "zero_pages": counts.zero,
            "referenced_pages": counts.referenced,
            "resent_pages": counts.resent,
            "window_full_pages": counts.window_full,
            "copies_asked": self._outbox.copies_asked,
            "copies_unasked": self._outbox.copies_unasked,
            "misses": dict(self._misses),
            "unresolved_pages": self._window.unresolved,
            "peak_window_pages": self._window.peak,
            "seconds": {
                **self._stages.seconds(),
                "held": round(forwarder.held_seconds, 4),
                "network_busy": round(self._outbox.busy_seconds, 4),
                "network_blocked": round(self._outbox.blocked_seconds, 4),
            },
        }


def describe(summary: Report) -> str:
    """The one line that an operator reads."""
    line = (
        f"{summary['state']}: {summary['guest_bytes'] >> 20} MiB of the guest,"
        f" {summary['wire_bytes'] >> 20} MiB over the network,"
        f" {summary['volume_bytes'] >> 20} MiB from volumes,"
        f" {summary['referenced_pages']} pages by reference,"
        f" {sum(summary['misses'].values())} misses"
    )
    for key in ("reason", "pass_through"):
        if summary[key]:
            line += f"; {key.replace('_', ' ')}: {summary[key]}"
    return line


def _allocate(header: Header) -> memoryview:
    return memoryview(bytearray(header.length))
