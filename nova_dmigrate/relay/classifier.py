# SPDX-License-Identifier: Apache-2.0
"""What becomes of each RAM page at the source: raw, a zero record, or a reference to a volume
block.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.relay.buffers import PooledBuffer
from nova_dmigrate.relay.digest import digest_pages
from nova_dmigrate.relay.outbox import Outbox, Parcel
from nova_dmigrate.relay.pagemap import PageMap
from nova_dmigrate.relay.window import Window
from nova_dmigrate.relay.wire.frames import REFERENCE, FrameType
from nova_dmigrate.stream.elements import Delta, PageRun, ZeroRun
from nova_dmigrate.stream.format import PAGE_RECORD_SIZE, RECORD_HEADER_SIZE, ZERO_RECORD_SIZE

Run = PageRun | ZeroRun


@dataclass
class PageCounts:
    """Guest pages by the way that they went, and why mapped ones went raw."""

    raw: int = 0
    zero: int = 0
    referenced: int = 0
    #: Mapped pages that went raw because the window was full.
    window_full: int = 0
    #: Mapped pages that QEMU sent again, dirtied since it sent them first.
    resent: int = 0


class Classifier:
    """Turns runs of pages into frames, in stream order. Used by one thread.

    A mapped page is referenced at most once, the first time that QEMU sends it, and only in QEMU's
    first pass over RAM: a page that is sent again has changed since, so the volume does not have
    it.
    """

    def __init__(self, page_map: PageMap, window: Window, outbox: Outbox) -> None:
        self._window = window
        self._outbox = outbox
        self._front = -1
        self.use_map(page_map)
        #: QEMU's passes over RAM that have begun; the first is the bulk.
        self.passes = 0
        #: Whether mapped pages may be referenced at this moment.
        self.referring = True
        self.counts = PageCounts()

    def use_map(self, page_map: PageMap) -> None:
        """Refer by this map from now on; what has been sent by now has been spoken of."""
        self._map = page_map
        self._spoken = page_map.position <= self._front

    @property
    def position(self) -> int:
        """The position of the last page seen."""
        return self._front

    def handle(self, runs: Sequence[Run], buffer: PooledBuffer) -> None:
        """Send the runs, which view ``buffer``, on their way.

        Pages of different runs may change their order on the way, those with the same position may
        not: a batch is cut wherever positions do not ascend.
        """
        begin = 0
        for number, run in enumerate(runs):
            positions = self._map.positions(run.block, run.offsets)
            first = int(positions[0])
            if first <= self._front or self.passes == 0:
                self._send(runs[begin:number], buffer)
                begin = number
                self.passes += 1
            if len(positions) > 1 and not bool((positions[1:] > positions[:-1]).all()):
                self._send(runs[begin:number], buffer)
                for piece_number, piece in enumerate(_ascending(run, positions)):
                    self.passes += piece_number > 0
                    self._send([piece], buffer)
                begin = number + 1
            self._front = int(positions[-1])
        self._send(runs[begin:], buffer)

    def note_delta(self, delta: Delta) -> None:
        """A delta goes its own way; its page is not the volume's any more."""
        if len(self._map):
            offsets = np.array([delta.offset], np.uint64)
            entries = self._map.entries(self._map.positions(delta.block, offsets))
            self._spoken[entries[entries >= 0]] = True

    def _send(self, runs: Sequence[Run], buffer: PooledBuffer) -> None:
        """Send runs of strictly ascending position."""
        start = 0
        for number in range(1, len(runs) + 1):
            if number == len(runs) or runs[number].block != runs[start].block:
                block = runs[start].block
                same = runs[start:number]
                self._send_pages(block, [run for run in same if isinstance(run, PageRun)], buffer)
                self._send_zeros(block, [run for run in same if isinstance(run, ZeroRun)], buffer)
                start = number

    def _send_zeros(self, block: int, runs: list[ZeroRun], buffer: PooledBuffer) -> None:
        if not runs:
            return
        if len(self._map):
            for run in runs:
                entries = self._map.entries(self._map.positions(block, run.offsets))
                self._spoken[entries[entries >= 0]] = True
        self.counts.zero += sum(len(run.offsets) for run in runs)
        self._forward(FrameType.ZEROS, block, runs, buffer)

    def _send_pages(self, block: int, runs: list[PageRun], buffer: PooledBuffer) -> None:
        if not runs:
            return
        if not len(self._map):
            self.counts.raw += sum(len(run.offsets) for run in runs)
            self._forward(FrameType.PAGES, block, runs, buffer)
            return
        offsets = np.concatenate([run.offsets for run in runs])
        entries = self._map.entries(self._map.positions(block, offsets))
        mapped = np.flatnonzero(entries >= 0)
        fresh = mapped[~self._spoken[entries[mapped]]]
        self._spoken[entries[mapped]] = True
        self.counts.resent += len(mapped) - len(fresh)
        referable = fresh if self.referring and self.passes <= 1 else fresh[:0]
        slots = self._window.reserve(entries[referable])
        self.counts.window_full += len(referable) - len(slots)
        referable = referable[: len(slots)]
        self.counts.raw += len(entries) - len(slots)
        if not len(slots):
            self._forward(FrameType.PAGES, block, runs, buffer)
            return
        pages = runs[0].pages if len(runs) == 1 else np.concatenate([run.pages for run in runs])
        if len(slots) == len(entries):
            self._refer(entries, slots, pages)
            return
        self._refer(entries[referable], slots, pages[referable])
        rest = np.ones(len(entries), np.bool_)
        rest[referable] = False
        begin = 0
        remaining = []
        for run in runs:
            remaining += _parts(run, rest[begin : begin + len(run.offsets)])
            begin += len(run.offsets)
        self._forward(FrameType.PAGES, block, remaining, buffer)

    def _refer(
        self, entries: NDArray[np.int64], slots: NDArray[np.uint32], pages: NDArray[np.uint8]
    ) -> None:
        self._window.keep(slots, pages)
        references = np.empty(len(slots), REFERENCE)
        references["entry"] = entries
        references["slot"] = slots
        references["digest"] = digest_pages(pages)
        self.counts.referenced += len(slots)
        self._outbox.put(
            Parcel(FrameType.REFERENCES, [memoryview(references.view(np.uint8))], references.nbytes)
        )
        self._window.publish(slots)

    def _forward(
        self, kind: FrameType, block: int, runs: Sequence[Run], buffer: PooledBuffer
    ) -> None:
        """Send whole runs as they are, straight from the buffer that QEMU's bytes were received
        into.
        """
        payload: list[memoryview] = []
        size = 0
        for run in runs:
            if run.head != 8:
                # The first record names its block; on the wire the frame does, for all of its
                # records.
                payload.append(continued(run))
                payload.append(run.data[run.head :])
                size += 8 + len(run.data) - run.head
            else:
                payload.append(run.data)
                size += len(run.data)
        buffer.hold()
        self._outbox.put(Parcel(kind, payload, size, block=block, done=buffer.release))


def continued(run: Run | Delta) -> memoryview:
    """The header of a run's first record as it reads when the block need not be named."""
    header = int.from_bytes(run.data[:8], "big") | 0x20
    return memoryview(header.to_bytes(8, "big"))


def _parts(run: PageRun, mask: NDArray[np.bool_]) -> list[PageRun]:
    """The pages of a run that ``mask`` (n,) chooses, as runs that view the same memory."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [_part(run, low, high) for low, high in edges.reshape(-1, 2).tolist()]


def _part(run: PageRun, low: int, high: int) -> PageRun:
    """Pages ``low`` to ``high`` of a run."""
    data = _records(run, low, high, PAGE_RECORD_SIZE)
    head = run.head if low == 0 else RECORD_HEADER_SIZE
    return PageRun(data, run.block, run.offsets[low:high], run.pages[low:high], head)


def _records(run: Run, low: int, high: int, stride: int) -> memoryview:
    """Bytes of records ``low`` to ``high``: all but the first begin 8 bytes before their payload,
    which are ``stride`` apart; the first one's header may be longer.
    """
    first = run.head - RECORD_HEADER_SIZE
    begin = 0 if low == 0 else first + low * stride
    return run.data[begin : first + high * stride]


def _ascending(run: Run, positions: NDArray[np.int64]) -> list[Run]:
    """Cut a run into runs of strictly ascending position."""
    cuts = [0, *(np.flatnonzero(positions[1:] <= positions[:-1]) + 1).tolist(), len(positions)]
    pieces: list[Run] = []
    for low, high in itertools.pairwise(cuts):
        if isinstance(run, PageRun):
            pieces.append(_part(run, low, high))
        else:
            data = _records(run, low, high, ZERO_RECORD_SIZE)
            head = run.head if low == 0 else RECORD_HEADER_SIZE
            pieces.append(ZeroRun(data, run.block, run.offsets[low:high], run.fill[low:high], head))
    return pieces
