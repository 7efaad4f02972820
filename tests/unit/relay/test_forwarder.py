# SPDX-License-Identifier: Apache-2.0
"""What waits at the source until every reference is resolved."""

import threading
from collections.abc import Iterator
from typing import cast

import numpy as np

from nova_dmigrate.buffermap import BufferMap
from nova_dmigrate.memory_layout import MemoryLayout, MemoryRange
from nova_dmigrate.relay.buffers import BufferPool, PooledBuffer
from nova_dmigrate.relay.forwarder import Forwarder
from nova_dmigrate.relay.handover import MapHandover
from nova_dmigrate.relay.intake import Intake
from nova_dmigrate.relay.monitor import Stages
from nova_dmigrate.relay.outbox import Outbox
from nova_dmigrate.relay.session import RelaySettings
from nova_dmigrate.relay.window import Window
from nova_dmigrate.relay.wire.frames import REFERENCE, FrameType
from nova_dmigrate.stream.elements import Element
from nova_dmigrate.stream.reader import StreamParser
from tests.base import TestCase
from tests.unit.relay.guest import encode_delta
from tests.unit.relay.pair import extents_of
from tests.unit.stream.builder import StreamBuilder, page_contents

PAGE = 4096
RAM_PAGES = 512
MAPPED = np.arange(256, RAM_PAGES)
LONG = 60.0


class FakeIntake:
    """Gives out each piece of a stream as one batch, as fast as it is asked for."""

    limit = 0
    gather = True

    def __init__(self, parser: StreamParser, pieces: list[bytes]) -> None:
        self._parser = parser
        self._pieces = pieces
        self._pool = BufferPool(4 << 20, len(pieces))
        self.given = 0
        self.closed = False

    def hung_up(self) -> bool:
        return self.closed

    def batches(self) -> Iterator[tuple[list[Element], PooledBuffer]]:
        for piece in self._pieces:
            buffer = self._pool.take()
            assert buffer is not None
            buffer.view[: len(piece)] = piece
            self.given += 1
            yield self._parser.parse(buffer.view[: len(piece)])[0], buffer
            buffer.release()


class TestWaits(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.window = Window(RAM_PAGES * PAGE)
        self.outbox = Outbox(self.window, delay=1, floor=1 << 30, fill=lambda idle: None)
        self.parser = StreamParser()
        self.failed = False
        # A 16th of RAM, 32 pages, is what the bulk is held before.
        self.handover = MapHandover("instance", self.outbox, LONG)
        self.handover.answer("")
        self.forwarder = Forwarder(
            "instance",
            RelaySettings(),
            self.parser,
            self.window,
            self.outbox,
            self.handover,
            Stages("setup"),
            stopped=lambda: self.failed,
        )
        volume = extents_of("volume", RAM_PAGES * PAGE, MAPPED, MAPPED)
        layout = MemoryLayout((MemoryRange(0, RAM_PAGES * PAGE, "pc.ram", 0),))
        self.handover.offer(BufferMap.build([volume]), layout)
        self.addCleanup(setattr, self, "failed", True)

    def relay(self, *parts: range, delta: bool = False) -> tuple[FakeIntake, threading.Thread]:
        """Relay these pages, each range in a batch of its own, and one more batch behind, in which
        one of the pages may change.
        """
        builder = StreamBuilder([("pc.ram", RAM_PAGES * PAGE)]).begin()
        pieces = [builder.take()]
        for part in parts:
            numbers = np.array(part)
            builder.part().pages(0, numbers * PAGE, page_contents(numbers)).finish()
            pieces.append(builder.take())
        if delta:
            builder.part().delta(0, 256 * PAGE, encode_delta(8, b"changed")).finish()
        pieces.append(builder.command(2, b"\0\0\0\7").take())
        intake = FakeIntake(self.parser, pieces)
        thread = threading.Thread(
            target=self.forwarder.relay, args=(cast(Intake, intake),), daemon=True
        )
        thread.start()
        thread.join(0.3)
        return intake, thread

    def settle(self) -> list[FrameType]:
        """The destination resolves every reference that was sent; returns what was sent."""
        kinds = []
        while (parcel := self.outbox.take(0)) is not None:
            kinds.append(parcel.type)
            if parcel.type is FrameType.REFERENCES:
                references = np.frombuffer(b"".join(parcel.payload), REFERENCE)
                self.window.settle(references["slot"].astype(np.uint32))
            self.outbox.sent(parcel, parcel.size)
        return kinds

    def test_in_the_bulk_references_are_not_waited_for(self) -> None:
        intake, thread = self.relay(range(300), range(300, 400))
        self.assertFalse(thread.is_alive())
        self.assertEqual(144, self.window.unresolved)
        self.assertEqual(4, intake.given)

    def test_near_the_end_of_the_bulk_nothing_is_taken_until_they_are_resolved(self) -> None:
        intake, thread = self.relay(range(300), range(300, 490))
        self.assertTrue(thread.is_alive())
        self.assertEqual(3, intake.given)
        self.assertFalse(self.forwarder.bulk_resolved)
        self.settle()
        thread.join(LONG)
        self.assertFalse(thread.is_alive())
        self.assertEqual(4, intake.given)
        self.assertFalse(self.forwarder.bulk_resolved)
        self.assertGreater(self.forwarder.held_seconds, 0.2)

    def test_the_bulk_is_resolved_only_when_it_is_over_and_nothing_is_open(self) -> None:
        intake, thread = self.relay(range(300), range(10))
        self.assertTrue(thread.is_alive())
        self.assertEqual(3, intake.given)
        self.assertFalse(self.forwarder.bulk_resolved)
        self.settle()
        thread.join(LONG)
        self.assertTrue(self.forwarder.bulk_resolved)

    def test_a_qemu_that_has_closed_its_end_is_not_held(self) -> None:
        intake, thread = self.relay(range(300), range(10))
        self.assertTrue(thread.is_alive())
        intake.closed = True
        thread.join(LONG)
        self.assertFalse(thread.is_alive())

    def test_a_failure_ends_the_wait(self) -> None:
        intake, thread = self.relay(range(300), range(10))
        self.assertTrue(thread.is_alive())
        self.failed = True
        thread.join(LONG)
        self.assertFalse(thread.is_alive())

    def test_a_delta_waits_for_the_page_that_it_changes(self) -> None:
        intake, thread = self.relay(range(300), delta=True)
        self.assertTrue(thread.is_alive())
        kinds = self.settle()
        thread.join(LONG)
        self.assertFalse(thread.is_alive())
        self.assertIn(FrameType.DELTA, kinds + self.settle())
