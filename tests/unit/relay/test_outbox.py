# SPDX-License-Identifier: Apache-2.0
"""The outbox: what goes next, and who has to wait."""

import threading

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.relay.outbox import Outbox, Parcel, copies_parcel
from nova_dmigrate.relay.window import PAGE, Window
from nova_dmigrate.relay.wire.frames import COPY, FrameType
from tests.base import TestCase

LONG = 60.0


class OutboxTest(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.window = Window(1024 * PAGE)
        self.order: NDArray[np.uint32] | None = None
        self.outbox = Outbox(self.window, delay=0.01, floor=1000, fill=lambda idle: self.order)
        self.done: list[str] = []

    def parcel(self, name: str, size: int = 10) -> Parcel:
        return Parcel(FrameType.VERBATIM, [], size, done=lambda: self.done.append(name))

    def take(self) -> Parcel:
        parcel = self.outbox.take(0)
        assert parcel is not None
        return parcel

    def missed(self, count: int) -> None:
        slots = self.window.reserve(np.arange(count))
        self.window.keep(slots, np.zeros((count, PAGE), np.uint8))
        self.window.publish(slots)
        self.window.miss(slots)

    def waiting(self, count: int) -> None:
        slots = self.window.reserve(np.arange(count))
        self.window.keep(slots, np.zeros((count, PAGE), np.uint8))
        self.window.publish(slots)
        self.window.ripen()

    def in_thread(self, *parcels: Parcel) -> threading.Thread:
        def put() -> None:
            for parcel in parcels:
                self.outbox.put(parcel)

        thread = threading.Thread(target=put, daemon=True)
        thread.start()
        return thread

    def test_frames_go_in_the_order_of_the_stream_and_are_numbered(self) -> None:
        parcels = [self.parcel(str(number)) for number in range(5)]
        for parcel in parcels:
            self.outbox.put(parcel)
        taken = [self.take() for _ in parcels]
        self.assertEqual([id(parcel) for parcel in parcels], [id(parcel) for parcel in taken])
        self.assertEqual([0, 1, 2, 3, 4], [parcel.seq for parcel in taken])

    def test_nothing_comes_of_nothing(self) -> None:
        self.assertIsNone(self.outbox.take(0.001))

    def test_a_sent_frame_gives_its_buffer_back(self) -> None:
        self.outbox.put(self.parcel("a"))
        parcel = self.take()
        self.assertEqual([], self.done)
        self.outbox.sent(parcel, parcel.size)
        self.assertEqual(["a"], self.done)

    def test_copies_that_were_asked_for_go_first(self) -> None:
        self.outbox.put(self.parcel("a"))
        self.missed(300)
        kinds = [self.take().type for _ in range(3)]
        self.assertEqual([FrameType.COPIES, FrameType.COPIES, FrameType.VERBATIM], kinds)
        self.assertEqual(300, self.outbox.copies_asked)

    def test_copies_go_unasked_only_when_nothing_else_is_to_be_sent(self) -> None:
        self.waiting(300)
        self.order = np.arange(300, dtype=np.uint32)
        self.outbox.put(self.parcel("a"))
        self.assertIs(FrameType.VERBATIM, self.take().type)
        self.assertIs(FrameType.COPIES, self.take().type)
        self.outbox.put(self.parcel("b"))
        self.assertIs(FrameType.VERBATIM, self.take().type)
        self.assertEqual(256, self.outbox.copies_unasked)

    def test_the_network_is_idle_only_when_nothing_that_is_needed_is_under_way(self) -> None:
        idle: list[float] = []
        self.outbox = Outbox(self.window, delay=0.01, floor=1000, fill=idle.append)
        self.outbox.put(self.parcel("a"))
        parcel = self.take()
        for _ in range(3):
            self.assertIsNone(self.outbox.take(0))
        self.assertEqual([0.0] * 3, idle)
        self.outbox.sent(parcel, parcel.size)
        for _ in range(3):
            self.assertIsNone(self.outbox.take(0))
        self.assertEqual(0.0, idle[3])
        self.assertLess(0.0, idle[4])
        self.assertLess(idle[4], idle[5])

    def test_on_a_fast_network_a_frame_goes_at_once_unless_others_wait(self) -> None:
        sent: list[int] = []

        def send(parcel: Parcel) -> None:
            sent.append(parcel.seq)
            self.outbox.sent(parcel, parcel.size)

        self.outbox.direct = send
        self.outbox.put(self.parcel("a"))
        self.assertEqual([], sent)
        self.outbox.wire_rate = 1e9
        self.outbox.put(self.parcel("b"))
        self.assertEqual([], sent)
        self.assertEqual([0, 1], [self.take().seq for _ in range(2)])
        self.outbox.put(self.parcel("c"))
        self.assertEqual([2], sent)
        self.outbox.end(self.parcel("end"))
        self.assertEqual([2, 3], sent)
        self.assertRaises(EOFError, self.outbox.take, 0)

    def test_nothing_goes_at_once_past_what_the_connection_has_in_hand(self) -> None:
        sent: list[int] = []
        self.outbox.direct = lambda parcel: sent.append(parcel.seq)
        self.outbox.put(self.parcel("a"))
        first = self.outbox.take(0, direct=True)
        assert first is not None
        self.outbox.wire_rate = 1e9
        self.outbox.put(self.parcel("b"))
        self.assertEqual([], sent)
        self.outbox.sent(first, first.size)
        self.assertEqual(1, self.take().seq)
        self.outbox.put(self.parcel("c"))
        self.assertEqual([2], sent)

    def test_what_goes_at_once_holds_up_the_thread_of_its_connection_alone(self) -> None:
        going = threading.Event()
        go_on = threading.Event()

        def send(parcel: Parcel) -> None:
            going.set()
            go_on.wait(LONG)
            self.outbox.sent(parcel, parcel.size)

        self.outbox.direct = send
        self.outbox.wire_rate = 1e9
        thread = self.in_thread(self.parcel("a"))
        self.assertTrue(going.wait(LONG))
        self.missed(300)
        self.assertIsNone(self.outbox.take(0, direct=True))
        self.assertEqual(1, self.take().seq)
        self.missed(1)
        found: list[Parcel | None] = []
        waiting = threading.Thread(
            target=lambda: found.append(self.outbox.take(LONG, direct=True)), daemon=True
        )
        waiting.start()
        waiting.join(0.02)
        self.assertEqual([], found)
        go_on.set()
        thread.join(LONG)
        waiting.join(LONG)
        assert found[0] is not None
        self.assertEqual(2, found[0].seq)

    def test_an_abort_is_the_last_frame_also_while_one_goes_at_once(self) -> None:
        sent: list[Parcel] = []
        self.outbox.direct = sent.append
        self.outbox.wire_rate = 1e9
        self.outbox.put(self.parcel("a"))
        last = self.parcel("abort")
        self.outbox.abort(last)
        self.assertIsNone(self.outbox.take(0, direct=True))
        self.outbox.sent(sent[0], sent[0].size)
        self.assertIs(last, self.outbox.take(0, direct=True))
        self.assertRaises(EOFError, self.outbox.take, 0, direct=True)

    def test_copies_do_not_go_unasked_when_there_is_no_hurry(self) -> None:
        self.waiting(3)
        self.assertIsNone(self.outbox.take(0))

    def test_a_wake_makes_a_sender_look_again(self) -> None:
        found: list[Parcel | None] = []
        thread = threading.Thread(target=lambda: found.append(self.outbox.take(LONG)), daemon=True)
        thread.start()
        self.missed(1)
        self.outbox.wake()
        thread.join(LONG)
        assert found[0] is not None
        self.assertIs(FrameType.COPIES, found[0].type)

    def test_the_stream_waits_for_room(self) -> None:
        self.outbox.put(self.parcel("a", 999))
        self.outbox.put(self.parcel("b", 5000))
        thread = self.in_thread(self.parcel("c"), self.parcel("d"))
        thread.join(0.02)
        self.assertTrue(thread.is_alive())
        self.take()
        self.assertTrue(thread.is_alive())
        self.take()
        thread.join(LONG)
        self.assertFalse(thread.is_alive())
        self.assertGreater(self.outbox.blocked_seconds, 0)

    def test_more_may_wait_on_a_fast_network(self) -> None:
        self.outbox.rate = 1e6
        for size in (9999, 1):
            self.outbox.put(self.parcel("a", size))
        thread = self.in_thread(self.parcel("b"))
        thread.join(0.02)
        self.assertTrue(thread.is_alive())
        self.take()
        thread.join(LONG)
        self.assertFalse(thread.is_alive())

    def test_the_end_is_the_last_frame_for_every_sender(self) -> None:
        self.outbox.put(self.parcel("a"))
        self.outbox.end(self.parcel("end"))
        self.take()
        self.take()
        for _ in range(3):
            self.assertRaises(EOFError, self.outbox.take, LONG)

    def test_the_end_wakes_senders_that_wait(self) -> None:
        ended = threading.Semaphore(0)

        def send() -> None:
            try:
                while True:
                    self.outbox.take(LONG)
            except EOFError:
                ended.release()

        for _ in range(3):
            threading.Thread(target=send, daemon=True).start()
        self.outbox.end(self.parcel("end"))
        for _ in range(3):
            self.assertTrue(ended.acquire(timeout=LONG))

    def test_no_copies_go_unasked_behind_the_end(self) -> None:
        self.waiting(1)
        self.order = np.arange(1, dtype=np.uint32)
        self.outbox.end(self.parcel("end"))
        self.take()
        self.assertRaises(EOFError, self.outbox.take, 0)

    def test_an_abort_throws_away_what_waits_and_gives_the_buffers_back(self) -> None:
        self.outbox.put(self.parcel("a", 5000))
        self.missed(1)
        thread = self.in_thread(self.parcel("b"))
        last = self.parcel("abort")
        self.outbox.abort(last)
        thread.join(LONG)
        self.assertFalse(thread.is_alive())
        self.assertEqual({"a", "b"}, set(self.done))
        self.assertIs(last, self.take())
        self.assertRaises(EOFError, self.outbox.take, 0)
        self.outbox.put(self.parcel("c"))
        self.assertIn("c", self.done)

    def test_the_rate_is_that_of_the_time_in_which_there_was_something_to_send(self) -> None:
        self.outbox.put(self.parcel("a", 1000))
        parcel = self.take()
        self.outbox._busy_since -= 0.5
        self.outbox.sent(parcel, parcel.size)
        self.assertGreater(self.outbox.rate, 0)
        self.assertLess(self.outbox.rate, 2001)
        self.assertGreaterEqual(self.outbox.busy_seconds, 0.5)

    def test_a_frame_of_copies_holds_entries_slots_and_pages(self) -> None:
        pages = np.random.default_rng(1).integers(0, 256, (3, PAGE), np.uint8)
        parcel = copies_parcel(np.array([7, 8, 9]), np.array([1, 2, 3], np.uint32), pages)
        self.assertEqual(3 * COPY.itemsize, parcel.size)
        records = np.frombuffer(b"".join(parcel.payload), COPY)
        self.assertEqual([7, 8, 9], records["entry"].tolist())
        self.assertEqual([1, 2, 3], records["slot"].tolist())
        self.assertTrue((records["page"] == pages).all())
