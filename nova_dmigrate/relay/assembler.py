# SPDX-License-Identifier: Apache-2.0
"""The destination's core: puts frames of the source and blocks of volumes together into one stream.

Used by one thread, which thereby owns all that decides what QEMU gets: the entries' states, the
writer, and the order in which bytes go out.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from oslo_log import log

from nova_dmigrate import exception
from nova_dmigrate.buffermap import PAGE_SIZE, BufferMap
from nova_dmigrate.memory_layout import MemoryLayout
from nova_dmigrate.relay import protocol
from nova_dmigrate.relay.answers import Answers
from nova_dmigrate.relay.entries import EntryTable, Mask
from nova_dmigrate.relay.monitor import Stages
from nova_dmigrate.relay.pacing import TokenBucket
from nova_dmigrate.relay.pagemap import MappedVolume, PageMap
from nova_dmigrate.relay.prefetch import BlockBatch, Prefetch
from nova_dmigrate.relay.session import RelaySettings
from nova_dmigrate.relay.wire.frames import COPY, REFERENCE, Buffer, Frame, FrameType
from nova_dmigrate.stream.elements import RamSetup
from nova_dmigrate.stream.records import PAGE_RECORD, ZERO_RECORD, page_records, zero_records
from nova_dmigrate.stream.writer import StreamWriter
from nova_dmigrate.volumes.base import VolumeReader

LOG = log.getLogger(__name__)

_ZEROS_AT_ONCE = 65536
#: So many times as many blocks are to be read as references wait before these are read first.
_SPARSE = 8


class Assembler:
    """Builds the stream that the destination's QEMU gets.

    :ivar prefetch: what reads the volumes; None until there is a map.
    :ivar pass_through: why the rest of the stream is passed through; None if it is not.
    :ivar ram_complete: whether RAM's END has gone out.
    :ivar ended: whether the source has sent its last frame.
    :ivar withdrawn: pages that were emitted from volumes and of which the source never spoke.
    """

    def __init__(
        self,
        instance: str,
        settings: RelaySettings,
        readers: Mapping[str, VolumeReader],
        bucket: TokenBucket,
        answers: Answers,
        stages: Stages,
        *,
        emit: Callable[[Sequence[Buffer]], None],
        start_reading: Callable[[Prefetch], None],
        deliver: Callable[[BlockBatch], None],
        on_post_copy: Callable[[], None],
    ) -> None:
        """:param readers: the instance's own volumes, by id.
        :param bucket: what their reads are paced by.
        :param emit: sends bytes to QEMU.
        :param start_reading: starts the threads of a prefetch.
        :param deliver: what these call with what they have read.
        :param on_post_copy: called as soon as it is known that post-copy may begin.
        """
        self._instance = instance
        self._settings = settings
        self._readers = readers
        self._bucket = bucket
        self._answers = answers
        self._stages = stages
        self._send = emit
        self._start_reading = start_reading
        self._deliver = deliver
        self._on_post_copy = on_post_copy
        self._layout: MemoryLayout | None = None
        self._chunks: collections.deque[bytes] = collections.deque()
        self._chunk_bytes = 0
        self._page_map: PageMap | None = None
        self._setup: RamSetup | None = None
        self._writer: StreamWriter | None = None
        #: Memory for what is emitted next: it has been sent when the next batch comes, and to use
        #: it again costs no page faults.
        self._records = np.empty(0, PAGE_RECORD)
        #: Blocks that were read before QEMU can take pages.
        self._early: list[BlockBatch] = []
        self.table = EntryTable(0)
        self.prefetch: Prefetch | None = None
        self.pass_through: str | None = None
        self.ram_complete = False
        self.ended = False
        self.withdrawn = 0

    def handle_frame(self, frame: Frame) -> None:
        """Handle the next frame.

        :raises ValueError: it makes no sense here.
        """
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
            if frame.header.flags & protocol.SETUP_POST_COPY:
                self._on_post_copy()
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
            if self._map_too_long:
                self._chunks.clear()
            else:
                self._chunks.append(bytes(payload))
        elif flags == protocol.MAP_COMPLETE:
            self._take_map(protocol.parse_first(payload))
        else:
            raise ValueError(f"unknown flags {flags}")

    @property
    def _map_too_long(self) -> bool:
        """Whether what has come of the map is more than one within the limits can be."""
        return self._chunk_bytes > self._settings.map_limits.max_bytes

    def _take_map(self, first: int) -> None:
        """The source waits to hear whether the map is taken: its entries are numbered alike at both
        ends, so it must not be used at one only.

        :param first: position of the first page that the source may still refer to.
        """
        if self._setup is None or self._layout is None or len(self.table) or self.ram_complete:
            raise ValueError("a map out of place")
        refused = ""
        page_map = None
        try:
            if self._map_too_long:
                raise exception.BufferMapError(reason=f"it has {self._chunk_bytes} bytes")
            chunks, self._chunks = self._chunks, collections.deque()
            buffer_map = BufferMap.from_chunks(_taken(chunks), self._settings.map_limits)
            page_map = PageMap.place_map(self._setup.blocks, buffer_map, self._layout)
            del buffer_map  # it is large, and so is what comes next
        except exception.BufferMapError as error:
            refused = str(error)
            LOG.warning("Instance %s migrates without a buffer map: %s", self._instance, error)
        self._layout = None
        self._answers.put(FrameType.MAP_TAKEN, refused.encode()[:1024])
        if page_map is not None and len(page_map):
            self._use_map(page_map, first)

    def _use_map(self, page_map: PageMap, first: int) -> None:
        self._page_map = page_map
        self.table = EntryTable(len(page_map))
        # What has been sent by now is newer than any block
        sent = page_map.entries_before(first)
        self.table.settle_first(sent)
        if sent < len(page_map):
            self._start_prefetch(page_map)

    def _handle_setup(self, payload: memoryview) -> None:
        if self._setup is not None:
            raise ValueError("came twice")
        # The frame's memory is used again: what is kept is a copy.
        self._setup = protocol.parse_setup(memoryview(bytes(payload)))
        self._emit([self._setup.data])
        self._page_map = PageMap.empty(self._setup.blocks)

    def _start_prefetch(self, page_map: PageMap) -> None:
        readers = [self._readers.get(volume.volume_id) for volume in page_map.volumes]
        for volume, reader in zip(page_map.volumes, readers, strict=True):
            self._exclude_unreadable(page_map, volume, reader)
        self.prefetch = Prefetch(
            page_map, self.table, readers, self._settings, self._bucket, self._deliver
        )
        self._start_reading(self.prefetch)

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
                self._instance,
                len(outside),
                volume.volume_id,
            )
            self._answers.put_verdict(self.table.fail(outside))

    def _handle_section(self, flags: int) -> None:
        if flags & protocol.SECTION_FINISH:
            self._emit(self._ram_writer().close())
            if flags & protocol.SECTION_END:
                self.ram_complete = True
                self._stages.enter("devices")
            return
        if self._writer is None:
            if self._setup is None:
                raise ValueError("came before RAM's setup")
            self._writer = StreamWriter(self._setup, bool(flags & protocol.SECTION_FOOTERS))
            self._stages.enter("ram")
            early, self._early = self._early, []
            for batch in early:
                self._emit_blocks(batch)
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
        if self.table.unsettled:
            headers = np.frombuffer(payload, dtype)["header"].astype(np.uint64)
            entries = page_map.entries(page_map.positions(block, headers))
            entries = entries[entries >= 0]
            if len(entries):
                self._answers.put_verdict(self.table.pages(entries))
        if dtype is PAGE_RECORD:
            self._emit(writer.page_records(block, payload))
        else:
            self._emit(writer.zero_records(block, payload))

    def _handle_references(self, payload: memoryview) -> None:
        references = np.frombuffer(payload, REFERENCE)
        entries = self._checked_entries(references["entry"])
        verdict = self.table.references(
            entries, references["slot"].astype(np.uint32), references["digest"]
        )
        self._answers.put_verdict(verdict)
        if self.prefetch is not None and self.table.referenced:
            planner = self.prefetch.planner
            planner.prefer(entries)
            waiting = self.table.referenced * PAGE_SIZE
            # Where the window is a fair part of what is to be read, the sweep empties it as well.
            planner.references_first = (
                waiting > self._settings.window_size // 2
                and self.table.referenced * _SPARSE < self.table.wanted_count
            )

    def _handle_copies(self, payload: memoryview) -> None:
        copies = np.frombuffer(payload, COPY)
        entries = self._checked_entries(copies["entry"])
        verdict = self.table.copies(entries, copies["slot"].astype(np.uint32))
        self._answers.put_verdict(verdict)
        assert verdict.emit is not None
        chosen = _chosen(verdict.emit)
        self._emit_pages(entries[chosen], copies["page"][chosen])

    def _checked_entries(self, numbers: NDArray[np.uint32]) -> NDArray[np.int64]:
        if int(numbers.max()) >= len(self.table):
            raise ValueError(f"entry {int(numbers.max())} of {len(self.table)}")
        return numbers.astype(np.int64)

    def handle_blocks(self, batch: BlockBatch) -> None:
        """Emit what was read, as soon as QEMU takes pages, unless the source has been faster."""
        if self._writer is None and self.pass_through is None:
            self._early.append(batch)
        else:
            self._emit_blocks(batch)

    def _emit_blocks(self, batch: BlockBatch) -> None:
        if self.pass_through is None and not self.ram_complete:
            if len(batch.failed):
                self._answers.put_verdict(self.table.fail(batch.failed))
            if len(batch.entries):
                verdict = self.table.blocks(batch.entries, batch.digests)
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
        if self.table.open:
            raise ValueError("came while references were unresolved")
        page_map = self._known_map()
        if block >= len(page_map.bases) - 1 or len(payload) < 8:
            raise ValueError("makes no sense")
        header = np.array([int.from_bytes(payload[:8], "big")], np.uint64)
        entries = page_map.entries(page_map.positions(block, header))
        if entries[0] >= 0:
            self._answers.put_verdict(self.table.pages(entries))
        self._emit(self._ram_writer().delta(block, payload, 8))

    def _handle_verbatim(self, payload: memoryview) -> None:
        if self._writer is not None and self.pass_through is None:
            self._emit(self._writer.close())
        self._emit([payload])

    def _settle_ram(self) -> None:
        """The source has spoken its last word about RAM: nothing comes from volumes any more.

        Pages that were emitted though the source never spoke of them (ballooned, or hinted as free)
        become zero again, as they would be without us.
        """
        if self.table.open:
            raise ValueError(f"came while {self.table.open} references were unresolved")
        if self.prefetch is not None:
            self.prefetch.stop()
        unspoken = self.table.withdraw()
        self.withdrawn += len(unspoken)
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
        LOG.warning("Instance %s: the rest is passed through: %s", self._instance, reason)
        if self._setup is None:
            # Nobody has seen whether QEMU has spoken of it
            self._on_post_copy()
        if self._writer is not None:
            if frame.header.block >= len(self._known_map().bases) - 1:
                raise ValueError(f"RAMBlock {frame.header.block}")
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
        self.pass_through = reason
        if self.prefetch is not None:
            self.prefetch.stop()
        early, self._early = self._early, []
        for batch in early:
            batch.buffer.release()
        self._stages.enter("passing")

    def _handle_end(self, flags: int, payload: memoryview) -> None:
        if flags & protocol.END_ABORTED:
            raise exception.MigrationCancelled(
                instance=self._instance,
                reason=f"the source relay gave up: {protocol.parse_text(payload)}",
            )
        self.ended = True

    def _known_map(self) -> PageMap:
        if self._page_map is None:
            raise ValueError("came before RAM's setup")
        return self._page_map

    def _emit(self, buffers: Sequence[Buffer]) -> None:
        if buffers:
            self._send(buffers)


def _taken(chunks: collections.deque[bytes]) -> Iterator[bytes]:
    """The chunks, each of which is gone when the next one is asked for."""
    while chunks:
        yield chunks.popleft()


def _chosen(mask: Mask) -> Mask | slice:
    """An index for what the mask chooses; one that copies nothing where that is everything."""
    return slice(None) if bool(mask.all()) else mask
