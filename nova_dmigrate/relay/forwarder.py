# SPDX-License-Identifier: Apache-2.0
"""QEMU's stream, element by element, on its way into the outbox of the source relay.

Here is decided when references may be made, when QEMU is held back, and when parsing has to end.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from oslo_log import log

from nova_dmigrate.relay import protocol
from nova_dmigrate.relay.buffers import PooledBuffer
from nova_dmigrate.relay.classifier import Classifier, PageCounts, Run, continued
from nova_dmigrate.relay.handover import MapHandover
from nova_dmigrate.relay.intake import Intake
from nova_dmigrate.relay.monitor import Stages
from nova_dmigrate.relay.outbox import Outbox, Parcel
from nova_dmigrate.relay.pagemap import PageMap
from nova_dmigrate.relay.session import RelaySettings
from nova_dmigrate.relay.window import Window
from nova_dmigrate.relay.wire.frames import FrameType
from nova_dmigrate.stream.elements import (
    Delta,
    Element,
    Opaque,
    PageRun,
    RamBlock,
    RamSetup,
    SectionFinish,
    SectionStart,
    Verbatim,
    ZeroRun,
)
from nova_dmigrate.stream.format import (
    PAGE_RECORD_SIZE,
    RAM_COMPLETE,
    RECORD_HEADER_SIZE,
    ZERO_RECORD_SIZE,
)
from nova_dmigrate.stream.reader import StreamParser
from nova_dmigrate.stream.records import PAGE_CONTINUE, ZERO_CONTINUE

LOG = log.getLogger(__name__)

#: Of the last part of the bulk so much is taken from QEMU at once.
_LATE_LIMIT = 256 << 10
#: Seconds of the network's rate that may wait in the bulk. QEMU does not measure then, and the
#: network must not starve when the processor is busy with other things for a moment.
BULK_DELAY = 0.1
#: Seconds without anything to send after which the network counts as idle.
_IDLE = 0.05
#: In the late passes no less, however slow the network is.
_PACE_FLOOR = 64 << 10


class Forwarder:
    """Turns the elements of one stream into frames. Used by one thread, but for the properties.

    :ivar peer: how far the destination is with its volumes; whoever receives that sets it.
    """

    def __init__(
        self,
        instance: str,
        settings: RelaySettings,
        parser: StreamParser,
        window: Window,
        outbox: Outbox,
        handover: MapHandover,
        stages: Stages,
        *,
        stopped: Callable[[], bool],
        on_late: Callable[[], None] = lambda: None,
        on_post_copy: Callable[[], None] = lambda: None,
    ) -> None:
        """:param handover: of the buffer map, whenever it comes.
        :param stopped: whether the migration has failed: then nothing is waited for any more.
        :param on_late: called once, when queues have to be short from now on.
        :param on_post_copy: called once, before anything goes on from a stream in which QEMU may
            begin post-copy.
        """
        self._instance = instance
        self._settings = settings
        self._parser = parser
        self._window = window
        self._outbox = outbox
        self._handover = handover
        self._stages = stages
        self._stopped = stopped
        self._on_late = on_late
        self._on_post_copy = on_post_copy
        self._post_copy = False
        self._page_map: PageMap | None = None
        self._classifier: Classifier | None = None
        self._blocks: tuple[RamBlock, ...] = ()
        self._last_record: tuple[FrameType, int, bytes] | None = None
        self._reason: str | None = None
        self._late = False
        self._ending = False
        self._holding = False
        self.peer = protocol.Progress()
        #: Whether the bulk is over and all its references are resolved.
        self.bulk_resolved = False
        #: Seconds that QEMU was held back.
        self.held_seconds = 0.0

    @property
    def counts(self) -> PageCounts:
        """Pages by the way that they went."""
        return self._classifier.counts if self._classifier is not None else PageCounts()

    @property
    def passes(self) -> int:
        """QEMU's passes over RAM that have begun."""
        return self._classifier.passes if self._classifier is not None else 0

    @property
    def mapped_pages(self) -> int:
        """Guest pages that the map places on volumes."""
        return len(self._page_map) if self._page_map is not None else 0

    @property
    def pass_through(self) -> str | None:
        """Why the stream is passed through, None if it is not."""
        return None if self._reason == RAM_COMPLETE else self._reason

    def relay(self, intake: Intake) -> None:
        """Relay a whole stream, until QEMU closes its end."""
        for elements, buffer in intake.batches():
            if self._parser.post_copy_possible and not self._post_copy:
                self._post_copy = True
                self._on_post_copy()
            self._handle(elements, buffer)
            self._take_map()
            if self._late:
                self._hold(intake)
                intake.limit = _LATE_LIMIT if self.passes <= 1 else self._pace()
                intake.gather = False
                if self._outbox.delay != self._settings.queue_delay:
                    self._outbox.delay = self._settings.queue_delay
                    self._on_late()

    def reading_order(self, idle: float) -> NDArray[np.uint32] | None:
        """The destination's reading order when waiting references should be sent as copies: when
        its volumes are what the migration will wait for. Else None. Thread safe.

        :param idle: seconds for which the stream has given the network nothing to do. The time that
            the next piece of the stream takes to be read and digested must not count.
        """
        page_map = self._page_map
        if page_map is None or not self._window.unresolved:
            return None
        # While the stream is held back the network has nothing else to do.
        if not self._holding and (
            idle < _IDLE or self.peer.volume_seconds_left() <= self._settings.hurry_threshold
        ):
            return None
        return page_map.volume_position

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
            not self._late or not self.peer.volume_left
        )
        self._classifier.handle(runs, buffer)
        self._last_record = _last_record(runs[-1])
        if self._stages.current == "setup":
            self._stages.enter("bulk")
        if self._classifier.passes > 1:
            self._late = True
            self._stages.enter("converging")
        elif not self._late:
            left = self._page_map.total_pages - self._classifier.position
            self._late = left <= min(self._settings.hold_pages, self._page_map.total_pages // 16)

    def _pace(self) -> int:
        """Bytes to take from QEMU at once in late passes: what the network carries in a moment."""
        wanted = int(self._outbox.rate * self._settings.queue_delay)
        return min(max(wanted, _PACE_FLOOR), self._settings.batch_size)

    def _hold(self, intake: Intake) -> None:
        """Do not let QEMU get so far that it stops the guest while references are unresolved.

        A QEMU that has closed its end does not decide anything any more: what it has sent until
        then tells whether the migration was cancelled.
        """
        if self._window.unresolved:
            begin = time.monotonic()
            self._drain(intake.hung_up)
            self.held_seconds += time.monotonic() - begin
        if self.passes > 1:
            self.bulk_resolved = True

    def _drain(self, needless: Callable[[], bool] = lambda: False) -> None:
        """Wait until every reference is resolved, or ``needless`` returns true."""
        self._holding = True
        while not self._stopped() and not self._window.wait_empty(0.1) and not needless():
            # The answer to whether copies should be sent unasked changes with time alone.
            self._outbox.wake()
        self._holding = False

    def _handle_setup(self, setup: RamSetup) -> None:
        self._blocks = setup.blocks
        self._page_map = PageMap.empty(setup.blocks)
        self._classifier = Classifier(self._page_map, self._window, self._outbox)
        LOG.info(
            "Instance %s: machine %s, %d RAMBlocks, %d MiB of RAM",
            self._instance,
            self._parser.machine,
            len(setup.blocks),
            self._parser.total_ram >> 20,
        )
        self._outbox.put(protocol.setup_parcel(setup, self._post_copy))
        self._take_map()

    def _take_map(self) -> None:
        """Between two pages: use the map from here on, if there is one that is of use."""
        if not self._handover.waiting:
            return
        if self._late or self._ending or self._reason is not None:
            self._handover.decline()
            return
        if self._classifier is None:
            return
        first = self._classifier.position + 1
        page_map = self._handover.hand_over(self._blocks, first)
        if page_map is None:
            return
        self._page_map = page_map
        self._classifier.use_map(page_map)
        LOG.info(
            "Instance %s: %d pages mapped from page %d on, %d dropped",
            self._instance,
            len(page_map),
            first,
            page_map.dropped,
        )

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
        # No map may come any more: of the page ahead of the front it would know nothing
        self._late = True
        self._classifier.note_delta(element)
        record = bytes(continued(element)) + bytes(element.data[element.head :])
        self._last_record = (FrameType.DELTA, element.block, record)
        self._outbox.put(
            Parcel(FrameType.DELTA, [memoryview(record)], len(record), block=element.block)
        )

    def _handle_opaque(self, element: Opaque, buffer: PooledBuffer) -> None:
        if self._reason is None:
            self._reason = element.reason
            if element.reason == RAM_COMPLETE:
                self._stages.enter("devices")
            else:
                self._latch(element.reason)
        self._put_bytes(FrameType.VERBATIM, element.data, buffer)

    def _latch(self, reason: str) -> None:
        LOG.warning(
            "Instance %s: the stream is passed through from byte %d on: %s",
            self._instance,
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


def _last_record(run: Run) -> tuple[FrameType, int, bytes]:
    """The last record of a run: its kind, its RAMBlock, and its bytes as they continue that."""
    if isinstance(run, PageRun):
        kind, flags, size = FrameType.PAGES, PAGE_CONTINUE, PAGE_RECORD_SIZE
    else:
        kind, flags, size = FrameType.ZEROS, ZERO_CONTINUE, ZERO_RECORD_SIZE
    header = (int(run.offsets[-1]) | flags).to_bytes(RECORD_HEADER_SIZE, "big")
    return kind, run.block, header + bytes(run.data[RECORD_HEADER_SIZE - size :])
