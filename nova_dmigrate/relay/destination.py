# SPDX-License-Identifier: Apache-2.0
"""The destination relay: frames of the source relay and blocks of volumes in, a stream for QEMU
out.

One thread, the core, owns all that decides what QEMU gets: the entries' states, the writer, QEMU's
socket. The others feed it (one a connection, the volume readers) or carry away what it says
(answers, return path).
"""

import functools
import json
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from oslo_log import log

from nova_dmigrate import exception
from nova_dmigrate.buffermap import PAGE_SIZE, BufferMap, MapLimits
from nova_dmigrate.memory_layout import MemoryLayout
from nova_dmigrate.relay import protocol
from nova_dmigrate.relay.answers import Answers
from nova_dmigrate.relay.buffers import BufferPool, PooledBuffer
from nova_dmigrate.relay.entries import EntryTable, Mask
from nova_dmigrate.relay.feed import DEPTH, Feed, ReceivedFrame
from nova_dmigrate.relay.lifecycle import Lifecycle
from nova_dmigrate.relay.monitor import ControlServer, Report, Sampler, Stages, write_summary
from nova_dmigrate.relay.outlet import QemuOutlet
from nova_dmigrate.relay.pacing import RateMeter
from nova_dmigrate.relay.pagemap import MappedVolume, PageMap
from nova_dmigrate.relay.prefetch import BlockBatch, Prefetch
from nova_dmigrate.relay.session import DestinationSession, RelaySettings
from nova_dmigrate.relay.wire.connection import Connection
from nova_dmigrate.relay.wire.frames import COPY, REFERENCE, Buffer, Frame, FrameType, Header, Role
from nova_dmigrate.relay.wire.handshake import Listener
from nova_dmigrate.stream.elements import RamSetup
from nova_dmigrate.stream.records import PAGE_RECORD, ZERO_RECORD, page_records, zero_records
from nova_dmigrate.stream.writer import StreamWriter
from nova_dmigrate.volumes import open_volume
from nova_dmigrate.volumes.base import VolumeReader

LOG = log.getLogger(__name__)

#: Frames up to this size are received into pooled memory; larger ones are rare.
_FRAME_BUFFER = (1 << 20) + (64 << 10)
_MAX_CONNECTIONS = 16
#: Compressed bytes of a map: 256 GiB of pages at the 8 bytes that a page may take before
#: compression.
_MAX_MAP_BYTES = 512 << 20
_ZEROS_AT_ONCE = 65536
#: Seconds that the source gets to hear why the migration ended.
_ABORT_SECONDS = 2.0


class DestinationRelay:
    """One migration, seen from the destination host: :meth:`prepare`, then :meth:`run`, once."""

    def __init__(self, session: DestinationSession, settings: RelaySettings) -> None:
        self._session = session
        self._settings = settings
        self._life = Lifecycle(session.instance)
        self._listener: Listener | None = None
        self._control: ControlServer | None = None
        self._data: list[Connection] = []
        self._acks: Connection | None = None
        self._answers = Answers()
        self._feed = Feed()
        self._outlet = QemuOutlet(session.qemu_socket, session.instance)
        self._readers: dict[str, VolumeReader] = {}
        self._stages = Stages("preparing")
        self._sampler = Sampler(self._sample)
        self._map_limits = MapLimits(
            max_pages=settings.max_map_pages,
            max_volumes=settings.max_map_volumes,
            max_chunk_bytes=settings.max_map_chunk_size,
        )
        self._layout: MemoryLayout | None = None
        self._chunks: list[bytes] = []
        self._chunk_bytes = 0
        self._buffer_map: BufferMap | None = None
        self._page_map: PageMap | None = None
        self._table = EntryTable(0)
        self._prefetch: Prefetch | None = None
        self._setup: RamSetup | None = None
        self._writer: StreamWriter | None = None
        #: Memory for what is emitted next: it has been sent when the next batch comes, and to use
        #: it again costs no page faults.
        self._records = np.empty(0, PAGE_RECORD)
        #: Blocks that were read before QEMU can take pages.
        self._early: list[BlockBatch] = []
        self._pass_through: str | None = None
        self._ram_complete = False
        self._ended = False
        self._withdrawn = 0
        self._return_thread: threading.Thread | None = None
        self._volume_rate = RateMeter()
        self._abort_timer: threading.Timer | None = None

    # Before the migration

    def prepare(self) -> tuple[str, int]:
        """Open the instance's volumes and listen for the source relay; returns address and port.

        A volume that cannot be opened costs the gain, not the migration.

        :raises DMigrateError: it is not possible to listen.
        """
        for spec in self._session.volumes:
            try:
                self._readers[spec.volume_id] = open_volume(spec)
            except exception.VolumeError as error:
                LOG.warning(
                    "Instance %s: pages of this volume will travel over the network: %s",
                    self._session.instance,
                    error,
                )
        try:
            self._listener = Listener(
                self._session.host,
                self._session.port,
                self._session.credentials,
                self._session.tls,
                self._settings.handshake_timeout,
                protocol.CAPABILITIES,
            )
            if self._session.control_socket is not None:
                self._control = ControlServer(
                    self._session.control_socket, self.progress, self.cancel
                )
        except BaseException:
            self._close()
            raise
        self._life.on_failure(self._wake_all)
        self._stages.enter("waiting")
        return self._listener.address

    # The migration

    def run(self) -> Report:
        """Relay one migration; returns the summary, whose ``state`` tells how it ended."""
        self._sampler.start()
        self._life.start("accept", self._accept_source)
        self._life.start("core", self._core)
        try:
            self._life.join()
            state, reason = "delivered", None
        except exception.MigrationCancelled as error:
            state, reason = "cancelled", str(error)
        except exception.DMigrateError as error:
            state, reason = "failed", str(error)
        return self._finish(state, reason)

    def cancel(self) -> None:
        """End the migration; both QEMUs see a broken connection."""
        self._life.fail(
            exception.MigrationCancelled(
                instance=self._session.instance, reason="cancelled by request"
            )
        )

    def _core(self) -> None:
        while not self._ended:
            item = self._feed.next()
            if item is None:
                return
            if isinstance(item, BlockBatch):
                if self._writer is None and self._pass_through is None:
                    self._early.append(item)
                else:
                    self._handle_blocks(item)
                continue
            try:
                self._handle_frame(item.frame)
            except ValueError as error:
                raise exception.FrameError(
                    peer=self._data[0].peer, reason=f"{item.frame.header.type.name}: {error}"
                ) from error
            if item.done is not None:
                item.done()
        self._complete()

    # The source relay's connections

    def _accept_source(self) -> None:
        """Take the source relay's connections, as many as it makes."""
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept(None)
            except exception.WireError:
                return  # closed
            if connection.role is Role.ACKS and self._acks is None:
                self._acks = connection
                connection.set_timeout(None)
                self._life.start("answers", functools.partial(self._send_answers, connection))
            elif connection.role is Role.DATA and len(self._data) < _MAX_CONNECTIONS:
                self._data.append(connection)
                # The source shows on each of them that it is alive.
                connection.set_timeout(self._settings.stall_timeout)
                number = self._feed.add_connection()
                self._life.start(
                    f"receive-{number}", functools.partial(self._receive, number, connection)
                )
            else:
                LOG.warning("A connection too many from %s is closed", connection.peer)
                connection.close()
            if self._stages.current == "waiting":
                self._stages.enter("connected")

    def _receive(self, number: int, connection: Connection) -> None:
        # A pool for each connection: a frame whose turn has not come must not keep the one before
        # it out.
        pool = BufferPool(_FRAME_BUFFER, DEPTH + 2)
        self._life.on_failure(pool.close)
        held: PooledBuffer | None = None

        def allocate(header: Header) -> memoryview:
            nonlocal held
            if header.length <= pool.size:
                held = pool.take()
                if held is not None:
                    return held.view
            return memoryview(bytearray(header.length))

        while True:
            held = None
            try:
                frame = connection.receive(allocate)
            except exception.PeerLost:
                if self._ended:
                    return
                raise
            if frame.header.type is not FrameType.KEEPALIVE:
                done = held.release if held is not None else None
                self._feed.put_frame(number, ReceivedFrame(frame, done))

    def _send_answers(self, connection: Connection) -> None:
        try:
            self._answers.send(connection)
        except exception.PeerLost:
            if not self._ended:
                raise

    # Frames

    def _handle_frame(self, frame: Frame) -> None:
        kind, block, payload = frame.header.type, frame.header.block, frame.payload
        if kind is FrameType.PAGES:
            self._handle_records(block, payload, PAGE_RECORD)
        elif kind is FrameType.ZEROS:
            self._handle_records(block, payload, ZERO_RECORD)
        elif kind is FrameType.REFERENCES:
            self._handle_references(payload)
        elif kind is FrameType.COPIES:
            self._handle_copies(payload)
        elif kind is FrameType.SECTION:
            self._handle_section(frame.header.flags)
        elif kind is FrameType.VERBATIM:
            self._handle_verbatim(payload)
        elif kind is FrameType.DELTA:
            self._handle_delta(block, payload)
        elif kind is FrameType.SETUP:
            self._handle_setup(payload)
        elif kind is FrameType.MAP:
            self._handle_map(frame.header.flags, payload)
        elif kind is FrameType.LATCH:
            self._handle_latch(frame)
        elif kind is FrameType.END:
            self._handle_end(frame.header.flags, payload)
        else:
            raise ValueError("has no place in the stream")

    def _handle_map(self, flags: int, payload: memoryview) -> None:
        """Gather the map; one that is of no use costs the gain only."""
        if flags == protocol.MAP_LAYOUT:
            self._layout = protocol.parse_layout(payload)
        elif flags == protocol.MAP_CHUNK:
            self._chunk_bytes += len(payload)
            if self._chunk_bytes > _MAX_MAP_BYTES:
                raise ValueError(f"more than {_MAX_MAP_BYTES} bytes of map")
            self._chunks.append(bytes(payload))
        elif flags == protocol.MAP_COMPLETE:
            if self._layout is not None:
                # The source has read the same chunks: it numbers the entries as they are numbered
                # here, so a map that only one side takes would break the migration, not merely slow
                # it down.
                self._buffer_map = BufferMap.from_chunks(self._chunks, self._map_limits)
            self._chunks = []
        else:
            raise ValueError(f"unknown flags {flags}")

    def _handle_setup(self, payload: memoryview) -> None:
        if self._setup is not None:
            raise ValueError("came twice")
        # The frame's memory is used again: what is kept is a copy.
        self._setup = protocol.parse_setup(memoryview(bytes(payload)))
        self._emit([self._setup.data])
        if self._buffer_map is None or self._layout is None:
            self._page_map = PageMap.empty(self._setup.blocks)
            return
        page_map = PageMap.place_map(self._setup.blocks, self._buffer_map, self._layout)
        self._buffer_map = self._layout = None
        self._page_map = page_map
        self._table = EntryTable(len(page_map))
        if len(page_map):
            self._start_prefetch(page_map)

    def _start_prefetch(self, page_map: PageMap) -> None:
        readers = [self._readers.get(volume.volume_id) for volume in page_map.volumes]
        for volume, reader in zip(page_map.volumes, readers, strict=True):
            self._exclude_unreadable(page_map, volume, reader)
        self._prefetch = Prefetch(
            page_map, self._table, readers, self._settings, self._feed.put_blocks
        )
        self._life.on_failure(self._prefetch.stop)
        for number in range(self._prefetch.depth):
            # A read of a volume whose storage is gone comes back late or never.
            self._life.start(f"volume-{number}", self._prefetch.work, may_hang=True)

    def _exclude_unreadable(
        self, page_map: PageMap, volume: MappedVolume, reader: VolumeReader | None
    ) -> None:
        """Blocks beyond a volume's real end, or of a volume that is not the instance's, are never
        read.
        """
        blocks = reader.size // PAGE_SIZE if reader is not None else 0
        if blocks >= volume.blocks:
            return
        inside = (page_map.volume_position >= volume.first + blocks) & (
            page_map.volume_position < volume.first + volume.blocks
        )
        outside = np.flatnonzero(inside)
        if len(outside):
            LOG.warning(
                "Instance %s: %d pages are mapped to blocks of volume %s that cannot be read here",
                self._session.instance,
                len(outside),
                volume.volume_id,
            )
            self._answers.put_verdict(self._table.fail(outside))

    def _handle_section(self, flags: int) -> None:
        if flags & protocol.SECTION_FINISH:
            self._emit(self._ram_writer().close())
            if flags & protocol.SECTION_END:
                self._ram_complete = True
                self._stages.enter("devices")
            return
        if self._writer is None:
            if self._setup is None:
                raise ValueError("came before RAM's setup")
            self._writer = StreamWriter(self._setup, bool(flags & protocol.SECTION_FOOTERS))
            self._stages.enter("ram")
            early, self._early = self._early, []
            for batch in early:
                self._handle_blocks(batch)
        if flags & protocol.SECTION_END:
            self._settle_ram()
            self._emit(self._writer.open_end())

    def _ram_writer(self) -> StreamWriter:
        if self._writer is None:
            raise ValueError("came before the first RAM section")
        return self._writer

    def _handle_records(self, block: int, payload: memoryview, dtype: np.dtype[np.void]) -> None:
        page_map, writer = self._known_map(), self._ram_writer()
        if block >= len(page_map.bases) - 1:
            raise ValueError(f"RAMBlock {block} of {len(page_map.bases) - 1}")
        if self._table.unsettled:
            headers = np.frombuffer(payload, dtype)["header"].astype(np.uint64)
            entries = page_map.entries(page_map.positions(block, headers))
            entries = entries[entries >= 0]
            if len(entries):
                self._answers.put_verdict(self._table.pages(entries))
        if dtype is PAGE_RECORD:
            self._emit(writer.page_records(block, payload))
        else:
            self._emit(writer.zero_records(block, payload))

    def _handle_references(self, payload: memoryview) -> None:
        references = np.frombuffer(payload, REFERENCE)
        entries = self._checked_entries(references["entry"])
        verdict = self._table.references(
            entries, references["slot"].astype(np.uint32), references["digest"]
        )
        self._answers.put_verdict(verdict)
        if self._prefetch is not None and self._table.referenced:
            planner = self._prefetch.planner
            planner.prefer(entries)
            waiting = self._table.referenced * PAGE_SIZE
            planner.references_first = waiting > self._settings.window_size // 2

    def _handle_copies(self, payload: memoryview) -> None:
        copies = np.frombuffer(payload, COPY)
        entries = self._checked_entries(copies["entry"])
        verdict = self._table.copies(entries, copies["slot"].astype(np.uint32))
        self._answers.put_verdict(verdict)
        assert verdict.emit is not None
        chosen = _chosen(verdict.emit)
        self._emit_pages(entries[chosen], copies["page"][chosen])

    def _checked_entries(self, numbers: NDArray[np.uint32]) -> NDArray[np.int64]:
        if int(numbers.max()) >= len(self._table):
            raise ValueError(f"entry {int(numbers.max())} of {len(self._table)}")
        return numbers.astype(np.int64)

    def _handle_blocks(self, batch: BlockBatch) -> None:
        """Emit what was read, unless the source has been faster."""
        if self._pass_through is None and not self._ram_complete:
            if len(batch.failed):
                self._answers.put_verdict(self._table.fail(batch.failed))
            if len(batch.entries):
                verdict = self._table.blocks(batch.entries, batch.digests)
                self._answers.put_verdict(verdict)
                assert verdict.emit is not None
                chosen = _chosen(verdict.emit)
                self._emit_pages(batch.entries[chosen], batch.pages[chosen])
        batch.buffer.release()

    def _emit_pages(self, entries: NDArray[np.int64], pages: NDArray[np.uint8]) -> None:
        """Emit pages, uint8 (n, 4096), of entries (n,)."""
        if not len(entries):
            return
        page_map, writer = self._known_map(), self._ram_writer()
        if len(entries) > len(self._records):
            self._records = np.empty(len(entries), PAGE_RECORD)
        for block, index in page_map.place(entries):
            offsets = page_map.offsets(block, entries[index])
            records = page_records(offsets, pages[index], self._records)
            self._emit(writer.page_records(block, records))

    def _handle_delta(self, block: int, payload: memoryview) -> None:
        if self._table.open:
            raise ValueError("came while references were unresolved")
        page_map = self._known_map()
        if block >= len(page_map.bases) - 1 or len(payload) < 8:
            raise ValueError("makes no sense")
        header = np.array([int.from_bytes(payload[:8], "big")], np.uint64)
        entries = page_map.entries(page_map.positions(block, header))
        if entries[0] >= 0:
            self._answers.put_verdict(self._table.pages(entries))
        self._emit(self._ram_writer().delta(block, payload, 8))

    def _handle_verbatim(self, payload: memoryview) -> None:
        if not self._outlet.connected:
            self._dial()
        if self._writer is not None and self._pass_through is None:
            self._emit(self._writer.close())
        self._emit([payload])

    def _settle_ram(self) -> None:
        """The source has spoken its last word about RAM: nothing comes from volumes any more.

        Pages that were emitted though the source never spoke of them (ballooned, or hinted as free)
        become zero again, as they would be without us.
        """
        if self._table.open:
            raise ValueError(f"came while {self._table.open} references were unresolved")
        if self._prefetch is not None:
            self._prefetch.stop()
        unspoken = self._table.withdraw()
        self._withdrawn += len(unspoken)
        if not len(unspoken):
            return
        page_map, writer = self._known_map(), self._ram_writer()
        for begin in range(0, len(unspoken), _ZEROS_AT_ONCE):
            entries = unspoken[begin : begin + _ZEROS_AT_ONCE]
            for block, index in page_map.place(entries):
                records = zero_records(page_map.offsets(block, entries[index]))
                self._emit(writer.zero_records(block, records))

    def _handle_latch(self, frame: Frame) -> None:
        flags = frame.header.flags
        reason, kind, record = protocol.parse_latch(frame.payload, flags)
        LOG.warning("Instance %s: the rest is passed through: %s", self._session.instance, reason)
        if self._writer is not None:
            self._settle_ram()
            # What follows may continue the RAMBlock of the source's last record, not of ours. That
            # record is the newest word about its page, so it can be said again.
            if kind is FrameType.PAGES:
                self._emit(self._writer.page_records(frame.header.block, record))
            elif kind is FrameType.ZEROS:
                self._emit(self._writer.zero_records(frame.header.block, record))
            elif kind is FrameType.DELTA:
                self._emit(self._writer.delta(frame.header.block, record, 8))
            inside = flags & protocol.LATCH_INSIDE
            self._emit(self._writer.open_part() if inside else self._writer.close())
        self._pass_through = reason
        if self._prefetch is not None:
            self._prefetch.stop()
        early, self._early = self._early, []
        for batch in early:
            batch.buffer.release()
        self._stages.enter("passing")

    def _handle_end(self, flags: int, payload: memoryview) -> None:
        if flags & protocol.END_ABORTED:
            raise exception.MigrationCancelled(
                instance=self._session.instance,
                reason=f"the source relay gave up: {protocol.parse_text(payload)}",
            )
        self._outlet.finish()
        self._ended = True

    def _known_map(self) -> PageMap:
        if self._page_map is None:
            raise ValueError("came before RAM's setup")
        return self._page_map

    # QEMU

    def _emit(self, buffers: Sequence[Buffer]) -> None:
        if buffers:
            self._outlet.send(buffers)

    def _dial(self) -> None:
        self._outlet.dial()
        # Once more, because a failure may have come before there was a socket to break.
        self._life.on_failure(self._outlet.abort)
        self._return_thread = self._life.start("return-path", self._relay_return_path)
        self._stages.enter("setup")

    def _relay_return_path(self) -> None:
        self._outlet.read_return_path(lambda data: self._answers.put(FrameType.RETURN_PATH, data))
        if not (self._ram_complete or self._pass_through or self._ended or self._life.failed):
            raise exception.QemuError(
                instance=self._session.instance,
                reason="QEMU closed its end before RAM was complete",
            )
        self._answers.put(FrameType.RETURN_END)

    # The end

    def _complete(self) -> None:
        """The stream is delivered: wait for QEMU's last word, then tell the source."""
        if self._return_thread is not None:
            self._return_thread.join(self._settings.stall_timeout)
            if self._return_thread.is_alive():
                LOG.warning("Instance %s: QEMU keeps its socket open", self._session.instance)
                self._outlet.abort()
                self._return_thread.join()
        self._stages.enter("complete")
        if self._prefetch is not None:
            self._prefetch.stop()
        if self._listener is not None:
            self._listener.close()
        self._answers.end(FrameType.DONE, json.dumps(self.progress()).encode())

    def _wake_all(self) -> None:
        """After a failure: make everything that blocks return, and tell the source why."""
        self._outlet.abort()
        self._feed.close()
        if self._listener is not None:
            self._listener.close()
        self._answers.end(FrameType.FAILED, str(self._life.failure).encode()[:1024])
        if isinstance(self._life.failure, exception.PeerLost):
            self._shut_wire()
        else:
            # What the source still sends is received and thrown away until it has heard the reason:
            # a connection that breaks would reach it first.
            self._abort_timer = threading.Timer(_ABORT_SECONDS, self._shut_wire)
            self._abort_timer.daemon = True
            self._abort_timer.start()

    def _shut_wire(self) -> None:
        for connection in [*self._data, *([self._acks] if self._acks else [])]:
            connection.shutdown()

    def _finish(self, state: str, reason: str | None) -> Report:
        series = self._sampler.stop()
        summary = {**self.progress(), "state": state, "reason": reason, "series": series}
        self._close()
        if self._session.summary is not None:
            write_summary(self._session.summary, summary)
        LOG.info(
            "Instance %s: %s%s", self._session.instance, state, f": {reason}" if reason else ""
        )
        return summary

    def _close(self) -> None:
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer.join()
        if self._listener is not None:
            self._listener.close()
        self._outlet.close()
        for connection in [*self._data, *([self._acks] if self._acks else [])]:
            connection.close()
        for reader in self._readers.values():
            reader.close()
        if self._control is not None:
            self._control.close()

    def _sample(self, now: float) -> Report:
        del now
        prefetch = self._prefetch
        if prefetch is not None:
            rate = self._volume_rate.sample(prefetch.bytes, prefetch.busy_seconds)
            left = self._table.wanted_count * PAGE_SIZE
            self._answers.put_progress(protocol.Progress(prefetch.bytes, rate, left))
        return {
            "wire_bytes": sum(connection.bytes_received for connection in self._data),
            "volume_bytes": prefetch.bytes if prefetch else 0,
            "qemu_bytes": self._outlet.bytes,
        }

    def progress(self) -> Report:
        """How far the migration is: cumulative figures, bytes and pages."""
        table, prefetch = self._table, self._prefetch
        return {
            "role": "destination",
            "instance": self._session.instance,
            "state": "running",
            "stage": self._stages.current,
            "pass_through": self._pass_through,
            "mapped_pages": len(table),
            "wire_bytes": sum(connection.bytes_received for connection in self._data),
            "qemu_bytes": self._outlet.bytes,
            "volume_bytes": prefetch.bytes if prefetch else 0,
            "volume_reads": prefetch.reads if prefetch else 0,
            "volume_errors": prefetch.errors if prefetch else 0,
            "hits": table.hits,
            "speculated_pages": table.speculated,
            "replaced_pages": table.replaced,
            "withdrawn_pages": self._withdrawn,
            "unresolved_pages": table.open,
            "refused_connections": self._listener.refused if self._listener else 0,
            "seconds": {
                **self._stages.seconds(),
                "volume_busy": round(prefetch.busy_seconds, 4) if prefetch else 0.0,
            },
        }


def _chosen(mask: Mask) -> Mask | slice:
    """An index for what the mask chooses; one that copies nothing where that is everything."""
    return slice(None) if bool(mask.all()) else mask
