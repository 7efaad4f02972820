# SPDX-License-Identifier: Apache-2.0
"""The source relay: QEMU's stream in, frames for the destination relay out.

Threads: the main one reads QEMU and classifies pages, one a connection sends, one receives the
destination's answers. The window is shared between them; all else has one owner.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from oslo_log import log

from nova_dmigrate import exception
from nova_dmigrate.buffermap import BufferMap, MapLimits
from nova_dmigrate.memory_layout import MemoryLayout
from nova_dmigrate.relay import protocol
from nova_dmigrate.relay.buffers import BufferPool, PooledBuffer
from nova_dmigrate.relay.classifier import Classifier, Run, continued
from nova_dmigrate.relay.intake import Intake, QemuListener
from nova_dmigrate.relay.lifecycle import Lifecycle
from nova_dmigrate.relay.monitor import ControlServer, Report, Sampler, Stages, write_summary
from nova_dmigrate.relay.outbox import Outbox, Parcel
from nova_dmigrate.relay.pacing import TokenBucket
from nova_dmigrate.relay.pagemap import PageMap
from nova_dmigrate.relay.session import RelaySettings, SourceSession
from nova_dmigrate.relay.window import Window
from nova_dmigrate.relay.wire.connection import Connection
from nova_dmigrate.relay.wire.frames import MISS, Frame, FrameType, Header, Role
from nova_dmigrate.relay.wire.handshake import connect
from nova_dmigrate.stream.elements import (
    Delta,
    Element,
    Opaque,
    PageRun,
    RamSetup,
    SectionFinish,
    SectionStart,
    Verbatim,
    ZeroRun,
)
from nova_dmigrate.stream.format import MAX_ELEMENT, RAM_COMPLETE
from nova_dmigrate.stream.reader import StreamParser

LOG = log.getLogger(__name__)

#: Buffers of QEMU's stream that may be on their way; few, see the downtime trap in the architecture
#: document.
_BUFFERS = 8
#: Bytes that may wait for the network whatever its rate.
_QUEUE_FLOOR = 256 << 10
#: Of the last part of the bulk so much is taken from QEMU at once.
_LATE_LIMIT = 256 << 10
#: In the late passes no less, however slow the network is.
_PACE_FLOOR = 64 << 10
#: Seconds that an abort may take to tell the destination.
_ABORT_SECONDS = 2.0


class SourceRelay:
    """One migration, seen from the source host. Call :meth:`prepare`, then :meth:`run`, once."""

    def __init__(self, session: SourceSession, settings: RelaySettings) -> None:
        self._session = session
        self._settings = settings
        self._life = Lifecycle(session.instance)
        self._window = Window(settings.window_size)
        self._bucket = TokenBucket(settings.network_bandwidth)
        self._outbox = Outbox(
            self._window,
            delay=settings.queue_delay,
            floor=_QUEUE_FLOOR,
            fill=self._reading_order_when_in_a_hurry,
        )
        self._pool = BufferPool(settings.batch_size + MAX_ELEMENT, _BUFFERS + settings.channels)
        self._parser = StreamParser()
        self._buffer_map: BufferMap | None = None
        self._layout: MemoryLayout | None = None
        self._classifier: Classifier | None = None
        self._page_map: PageMap | None = None
        self._data: list[Connection] = []
        self._acks: Connection | None = None
        self._listener: QemuListener | None = None
        self._qemu: socket.socket | None = None
        self._intake: Intake | None = None
        self._control: ControlServer | None = None
        self._stages = Stages("preparing")
        self._sampler = Sampler(self._sample)
        self._peer = protocol.Progress()
        self._peer_done: Report | None = None
        self._passing_reason: str | None = None
        self._last_record: tuple[FrameType, int, bytes] | None = None
        self._late = False
        self._ending = False
        self._bulk_resolved = False
        self._held_seconds = 0.0
        self._holding = False
        self._misses: dict[str, int] = {}
        self._return_ended = threading.Event()
        self._abort_timer: threading.Timer | None = None

    # Before the migration

    def prepare(self) -> None:
        """Load the map, connect to the destination relay, hand it the map, and listen for QEMU.

        :raises DMigrateError: the destination cannot be reached or refuses, or the socket cannot be
            made.
        """
        try:
            self._load_map()
            self._connect()
            self._listener = QemuListener(self._session.qemu_socket, self._session.instance)
            if self._session.control_socket is not None:
                self._control = ControlServer(
                    self._session.control_socket, self.progress, self.cancel
                )
        except BaseException:
            self._close()
            raise
        self._life.on_failure(self._wake_all)
        self._stages.enter("waiting")

    def _load_map(self) -> None:
        """The map comes from the guest: one that is of no use costs the gain, not the migration."""
        session, settings = self._session, self._settings
        if session.buffer_map is None or session.memory_layout is None:
            return
        limits = MapLimits(
            max_pages=settings.max_map_pages,
            max_volumes=settings.max_map_volumes,
            max_chunk_bytes=settings.max_map_chunk_size,
        )
        try:
            self._layout = MemoryLayout.from_mtree(session.memory_layout.read_text())
            self._buffer_map = BufferMap.load(session.buffer_map, limits)
        except (
            OSError,
            ValueError,
            exception.BufferMapError,
            exception.MemoryLayoutError,
        ) as error:
            LOG.warning("Instance %s migrates without a buffer map: %s", session.instance, error)
            self._layout = self._buffer_map = None

    def _connect(self) -> None:
        session, settings = self._session, self._settings

        def open_connection(role: Role, index: int) -> Connection:
            connection, _ = connect(
                session.host,
                session.port,
                session.credentials,
                role,
                index,
                session.tls,
                settings.connect_timeout,
                protocol.CAPABILITIES,
            )
            return connection

        self._acks = open_connection(Role.ACKS, 0)
        # The destination shows that it is alive every second, whatever its QEMU does.
        self._acks.set_timeout(settings.stall_timeout)
        for index in range(settings.channels):
            connection = open_connection(Role.DATA, index)
            # A sender may wait for as long as the destination's QEMU does: silence shows on the
            # other connection.
            connection.set_timeout(None)
            self._data.append(connection)

    # The migration

    def run(self) -> Report:
        """Relay one migration; returns the summary.

        :raises DMigrateError: it ended before QEMU's stream had been delivered.
        """
        self._sampler.start()
        for connection in self._data:
            self._life.start(f"send-{connection.index}", lambda c=connection: self._send(c))  # type: ignore[misc]
        self._life.start("answers", self._receive_answers)
        stream = self._life.start("stream", self._relay_stream)
        try:
            self._life.join()
            state, reason = "delivered", None
        except exception.MigrationCancelled as error:
            state, reason = "cancelled", str(error)
        except exception.DMigrateError as error:
            state, reason = "failed", str(error)
        stream.join()
        return self._finish(state, reason)

    def cancel(self) -> None:
        """End the migration; QEMU sees a broken connection and the guest goes on at the source."""
        self._life.fail(
            exception.MigrationCancelled(
                instance=self._session.instance, reason="cancelled by request"
            )
        )

    def _relay_stream(self) -> None:
        assert self._listener is not None
        for parcel in protocol.map_parcels(self._buffer_map, self._layout):
            self._outbox.put(parcel)
        self._qemu = self._listener.accept()
        self._life.start("watch", self._listener.watch)
        self._stages.enter("setup")
        self._intake = Intake(self._qemu, self._pool, self._parser, self._session.instance)
        self._intake.limit = self._settings.batch_size
        for elements, buffer in self._intake.batches():
            self._handle(elements, buffer)
            if self._late:
                self._hold()
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
        self._outbox.end(Parcel(FrameType.END, [], 0))
        self._listener.close()

    def _handle(self, elements: Sequence[Element], buffer: PooledBuffer) -> None:
        """Send what one buffer held, in order; runs of pages that follow each other together."""
        runs: list[Run] = []
        for element in elements:
            if isinstance(element, PageRun | ZeroRun):
                runs.append(element)
                continue
            self._handle_runs(runs, buffer)
            runs = []
            if isinstance(element, Opaque):
                self._handle_opaque(element, buffer)
            elif isinstance(element, SectionStart):
                self._handle_section_start(element)
            elif isinstance(element, SectionFinish):
                self._put_section(protocol.SECTION_FINISH, element.end)
            elif isinstance(element, Delta):
                self._handle_delta(element)
            elif isinstance(element, RamSetup):
                self._handle_setup(element)
            elif isinstance(element, Verbatim):
                self._put_bytes(FrameType.VERBATIM, element.data, buffer)
            else:
                raise TypeError(f"no way to send {type(element).__name__}")
        self._handle_runs(runs, buffer)

    def _handle_runs(self, runs: Sequence[Run], buffer: PooledBuffer) -> None:
        if not runs:
            return
        assert self._classifier is not None and self._page_map is not None
        # Near the end of the bulk a reference must not wait for its block; behind the beginning of
        # RAM's END, which can come within the first pass, there is none that is waited for.
        self._classifier.referring = not self._ending and (
            not self._late or not self._peer.volume_left
        )
        self._classifier.handle(runs, buffer)
        last = runs[-1]
        size = 4104 if isinstance(last, PageRun) else 9
        record = bytes(last.data[-(size - 8) :])
        header = int(last.offsets[-1]) | (0x28 if isinstance(last, PageRun) else 0x22)
        kind = FrameType.PAGES if isinstance(last, PageRun) else FrameType.ZEROS
        self._last_record = (kind, last.block, header.to_bytes(8, "big") + record)
        if self._stages.current == "setup":
            self._stages.enter("bulk")
        if self._classifier.passes > 1:
            self._late = True
            self._stages.enter("converging")
        elif not self._late:
            left = self._page_map.total_pages - self._classifier.position
            self._late = left <= min(self._settings.hold_pages, self._page_map.total_pages // 16)
        if self._late and self._intake is not None:
            self._intake.limit = _LATE_LIMIT if self._classifier.passes <= 1 else self._pace()
            self._intake.gather = False

    def _pace(self) -> int:
        """Bytes to take from QEMU at once in late passes: what the network carries in a moment."""
        wanted = int(self._outbox.rate * self._settings.queue_delay)
        return min(max(wanted, _PACE_FLOOR), self._settings.batch_size)

    def _hold(self) -> None:
        """Do not let QEMU get so far that it stops the guest while references are unresolved.

        A QEMU that has closed its end does not decide anything any more: what it has sent until
        then tells whether the migration was cancelled.
        """
        assert self._intake is not None
        if self._window.unresolved:
            begin = time.monotonic()
            self._drain(self._intake.hung_up)
            self._held_seconds += time.monotonic() - begin
        if self._classifier is not None and self._classifier.passes > 1:
            self._bulk_resolved = True

    def _drain(self, needless: Callable[[], bool] = lambda: False) -> None:
        """Wait until every reference is resolved, or ``needless`` returns true."""
        self._holding = True
        while not self._life.failed and not self._window.wait_empty(0.1) and not needless():
            # The answer to whether copies should be sent unasked changes with time alone.
            self._outbox.wake()
        self._holding = False

    def _handle_setup(self, setup: RamSetup) -> None:
        if self._buffer_map is not None and self._layout is not None:
            self._page_map = PageMap.place_map(setup.blocks, self._buffer_map, self._layout)
            self._buffer_map = self._layout = None
        else:
            self._page_map = PageMap.empty(setup.blocks)
        self._classifier = Classifier(self._page_map, self._window, self._outbox)
        LOG.info(
            "Instance %s: machine %s, %d RAMBlocks, %d MiB of RAM, %d pages mapped, %d dropped",
            self._session.instance,
            self._parser.machine,
            len(setup.blocks),
            self._parser.total_ram >> 20,
            len(self._page_map),
            self._page_map.dropped,
        )
        self._outbox.put(protocol.setup_parcel(setup))

    def _handle_section_start(self, element: SectionStart) -> None:
        if element.end:
            # The guest is stopped: RAM's END must not wait for a volume at the destination.
            self._ending = True
            self._drain()
            self._stages.enter("completing")
        self._put_section(protocol.SECTION_BEGIN, element.end)

    def _put_section(self, flags: int, end: bool) -> None:
        if end:
            flags |= protocol.SECTION_END
        if self._parser.has_footers:
            flags |= protocol.SECTION_FOOTERS
        self._outbox.put(Parcel(FrameType.SECTION, [], 0, flags=flags))

    def _handle_delta(self, element: Delta) -> None:
        # A delta changes what the destination's page holds, so that has to be settled first.
        self._drain()
        assert self._classifier is not None
        self._classifier.note_delta(element)
        record = bytes(continued(element)) + bytes(element.data[element.head :])
        self._last_record = (FrameType.DELTA, element.block, record)
        self._outbox.put(
            Parcel(FrameType.DELTA, [memoryview(record)], len(record), block=element.block)
        )

    def _handle_opaque(self, element: Opaque, buffer: PooledBuffer) -> None:
        if self._passing_reason is None:
            self._passing_reason = element.reason
            if element.reason == RAM_COMPLETE:
                self._stages.enter("devices")
            else:
                self._latch(element.reason)
        self._put_bytes(FrameType.VERBATIM, element.data, buffer)

    def _latch(self, reason: str) -> None:
        LOG.warning(
            "Instance %s: the stream is passed through from byte %d on: %s",
            self._session.instance,
            self._parser.opaque_position,
            reason,
        )
        self._drain()
        self._stages.enter("passing")
        self._outbox.put(
            protocol.latch_parcel(reason, self._parser.in_ram_section, self._last_record)
        )

    def _put_bytes(self, kind: FrameType, data: memoryview, buffer: PooledBuffer) -> None:
        buffer.hold()
        self._outbox.put(Parcel(kind, [data], len(data), done=buffer.release))

    # The network

    def _reading_order_when_in_a_hurry(self) -> NDArray[np.uint32] | None:
        """The destination's reading order if its volumes are what the migration will wait for."""
        page_map = self._page_map
        if page_map is None or not self._window.unresolved:
            return None
        # While the stream is held back the network has nothing else to do.
        if not self._holding and (
            self._peer.volume_seconds_left() <= self._settings.hurry_threshold
        ):
            return None
        return page_map.volume_position

    def _send(self, connection: Connection) -> None:
        while True:
            try:
                parcel = self._outbox.take(protocol.KEEPALIVE_SECONDS)
            except EOFError:
                return
            if parcel is None:
                connection.send(FrameType.KEEPALIVE)
                continue
            self._bucket.take(parcel.size)
            connection.send(
                parcel.type,
                flags=parcel.flags,
                block=parcel.block,
                seq=parcel.seq,
                payload=parcel.payload,
            )
            self._outbox.sent(parcel)

    def _receive_answers(self) -> None:
        assert self._acks is not None
        while True:
            frame = self._acks.receive(_allocate)
            if frame.header.type is FrameType.DONE:
                self._peer_done = protocol.parse_report(frame.payload)
                self._end_return_path()
                self._close_listener()
                return
            self._handle_answer(frame)

    def _handle_answer(self, frame: Frame) -> None:
        kind = frame.header.type
        try:
            if kind is FrameType.SETTLED:
                self._window.settle(np.frombuffer(frame.payload, "<u4").astype(np.uint32))
            elif kind is FrameType.MISSED:
                misses = np.frombuffer(frame.payload, MISS)
                for reason, count in protocol.count_misses(misses["reason"]).items():
                    self._misses[reason] = self._misses.get(reason, 0) + count
                self._window.miss(misses["slot"].astype(np.uint32))
                self._outbox.wake()
            elif kind is FrameType.PROGRESS:
                self._peer = protocol.Progress.parse(frame.payload)
                self._outbox.wake()
            elif kind is FrameType.RETURN_PATH:
                self._return(frame.payload)
            elif kind is FrameType.RETURN_END:
                self._end_return_path()
            elif kind is FrameType.FAILED:
                raise exception.PeerLost(
                    peer=self._acks.peer if self._acks else "?",
                    reason=f"the destination relay gave up: {protocol.parse_text(frame.payload)}",
                )
        except ValueError as error:
            raise exception.FrameError(
                peer=self._acks.peer if self._acks else "?", reason=f"a bad answer: {error}"
            ) from error

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
        self._window.close()
        failure = self._life.failure
        self._outbox.abort(protocol.abort_parcel(str(failure)))
        self._pool.close()
        self._close_listener()
        if self._qemu is not None:
            # QEMU sees its migration fail, and the guest goes on here.
            with contextlib.suppress(OSError):
                self._qemu.shutdown(socket.SHUT_RDWR)
        if isinstance(failure, exception.PeerLost):
            self._shut_wire()
        else:
            self._abort_timer = threading.Timer(_ABORT_SECONDS, self._shut_wire)
            self._abort_timer.daemon = True
            self._abort_timer.start()

    def _shut_wire(self) -> None:
        for connection in [*self._data, *([self._acks] if self._acks else [])]:
            connection.shutdown()

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
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer.join()
        self._close_listener()
        if self._qemu is not None:
            self._qemu.close()
        for connection in [*self._data, *([self._acks] if self._acks else [])]:
            connection.close()
        if self._control is not None:
            self._control.close()

    def _sample(self, now: float) -> Report:
        del now
        # Ten times a second: well over the time that an answer to a reference takes.
        self._window.ripen()
        self._outbox.wake()
        return {
            "guest_bytes": self._intake.bytes if self._intake else 0,
            "wire_bytes": sum(connection.bytes_sent for connection in self._data),
            "volume_bytes": self._peer.volume_bytes,
            "window_pages": self._window.unresolved,
        }

    def progress(self) -> Report:
        """How far the migration is: cumulative figures, bytes and pages."""
        counts = self._classifier.counts if self._classifier else None
        return {
            "role": "source",
            "instance": self._session.instance,
            "state": "running",
            "stage": self._stages.current,
            "passes": self._classifier.passes if self._classifier else 0,
            "bulk_resolved": self._bulk_resolved,
            "pass_through": None if self._passing_reason == RAM_COMPLETE else self._passing_reason,
            "machine": self._parser.machine,
            "ram_bytes": self._parser.total_ram,
            "mapped_pages": len(self._page_map) if self._page_map else 0,
            "guest_bytes": self._intake.bytes if self._intake else 0,
            "wire_bytes": sum(connection.bytes_sent for connection in self._data),
            "wire_rate": round(self._outbox.rate),
            "volume_bytes": self._peer.volume_bytes,
            "volume_rate": round(self._peer.volume_rate),
            "raw_pages": counts.raw if counts else 0,
            "zero_pages": counts.zero if counts else 0,
            "referenced_pages": counts.referenced if counts else 0,
            "resent_pages": counts.resent if counts else 0,
            "window_full_pages": counts.window_full if counts else 0,
            "copies_asked": self._outbox.copies_asked,
            "copies_unasked": self._outbox.copies_unasked,
            "misses": dict(self._misses),
            "unresolved_pages": self._window.unresolved,
            "peak_window_pages": self._window.peak,
            "seconds": {
                **self._stages.seconds(),
                "held": round(self._held_seconds, 4),
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
