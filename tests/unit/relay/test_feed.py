# SPDX-License-Identifier: Apache-2.0
"""The feed: frames in their order whatever connection brings them, blocks in between."""

import threading

import numpy as np

from nova_dmigrate.relay.buffers import BufferPool
from nova_dmigrate.relay.feed import DEPTH, Feed, ReceivedFrame
from nova_dmigrate.relay.prefetch import BlockBatch
from nova_dmigrate.relay.wire.frames import Frame, FrameType, Header
from tests.base import TestCase

LONG = 60.0
PAGE = 4096


def frame(seq: int, size: int = 1) -> ReceivedFrame:
    payload = memoryview(bytes(size))
    return ReceivedFrame(Frame(Header(FrameType.VERBATIM, 0, 0, size, seq), payload), None)


def batch(pages: int = 1) -> BlockBatch:
    buffer = BufferPool(PAGE, 1).take()
    assert buffer is not None
    return BlockBatch(
        np.arange(pages), np.zeros((pages, PAGE), np.uint8), np.zeros((pages, 16), np.uint8),
        np.empty(0, np.int64), buffer,
    )  # fmt: skip


class FeedTest(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.feed = Feed()

    def seq(self) -> int:
        item = self.feed.next()
        assert isinstance(item, ReceivedFrame)
        return item.frame.header.seq

    def test_frames_come_in_order_across_connections(self) -> None:
        first, second = self.feed.add_connection(), self.feed.add_connection()
        for seq in (1, 2, 5):
            self.feed.put_frame(first, frame(seq))
        for seq in (0, 3, 4):
            self.feed.put_frame(second, frame(seq))
        self.assertEqual([0, 1, 2, 3, 4, 5], [self.seq() for _ in range(6)])

    def test_a_frame_whose_turn_has_not_come_is_waited_for(self) -> None:
        first, second = self.feed.add_connection(), self.feed.add_connection()
        self.feed.put_frame(first, frame(1))
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(self.seq()), daemon=True)
        thread.start()
        thread.join(0.01)
        self.assertTrue(thread.is_alive())
        self.feed.put_frame(second, frame(0))
        thread.join(LONG)
        self.assertEqual([0], found)

    def test_a_connection_waits_for_room_and_no_other_does(self) -> None:
        first, second = self.feed.add_connection(), self.feed.add_connection()
        for seq in range(1, 1 + DEPTH):
            self.feed.put_frame(first, frame(seq))
        thread = threading.Thread(
            target=self.feed.put_frame, args=(first, frame(1 + DEPTH)), daemon=True
        )
        thread.start()
        thread.join(0.01)
        self.assertTrue(thread.is_alive())
        self.feed.put_frame(second, frame(0))
        self.assertEqual(list(range(2 + DEPTH)), [self.seq() for _ in range(2 + DEPTH)])
        thread.join(LONG)
        self.assertFalse(thread.is_alive())

    def test_any_distribution_over_connections_comes_through(self) -> None:
        random = np.random.default_rng(1)
        count = 500
        owner = random.integers(0, 4, count)
        numbers = [self.feed.add_connection() for _ in range(4)]

        def put(number: int) -> None:
            for seq in np.flatnonzero(owner == number):
                self.feed.put_frame(number, frame(int(seq)))

        threads = [threading.Thread(target=put, args=(n,), daemon=True) for n in numbers]
        for thread in threads:
            thread.start()
        self.assertEqual(list(range(count)), [self.seq() for _ in range(count)])

    def test_blocks_come_when_no_frame_does(self) -> None:
        self.feed.add_connection()
        one = batch()
        self.feed.put_blocks(one)
        self.assertIs(one, self.feed.next())

    def test_frames_and_blocks_share_the_time_by_their_bytes(self) -> None:
        connection = self.feed.add_connection()
        given = {"frames": 0, "blocks": 0}
        seq = 0
        for _ in range(300):
            # Always something of both.
            while len(self.feed._frames[connection]) < DEPTH:
                self.feed.put_frame(connection, frame(seq, 3000))
                seq += 1
            while len(self.feed._blocks) < 2:
                self.feed.put_blocks(batch(4))
            item = self.feed.next()
            if isinstance(item, ReceivedFrame):
                given["frames"] += len(item.frame.payload)
            else:
                assert item is not None
                given["blocks"] += item.pages.nbytes
            self.assertLessEqual(abs(given["frames"] - given["blocks"]), 20000)

    def test_one_kind_alone_does_not_pay_for_it_later(self) -> None:
        connection = self.feed.add_connection()
        for seq in range(3):
            self.feed.put_frame(connection, frame(seq, 1 << 20))
            self.seq()
        self.feed.put_frame(connection, frame(3))
        self.feed.put_blocks(batch())
        self.assertEqual(3, self.seq())

    def test_closing_wakes_everybody_and_nothing_comes_any_more(self) -> None:
        connection = self.feed.add_connection()
        for seq in range(1, 1 + DEPTH):
            self.feed.put_frame(connection, frame(seq))
        found: list[object] = []
        threads = [
            threading.Thread(target=self.feed.put_frame, args=(connection, frame(9)), daemon=True),
            threading.Thread(target=lambda: found.append(self.feed.next()), daemon=True),
        ]
        for thread in threads:
            thread.start()
        self.feed.close()
        for thread in threads:
            thread.join(LONG)
            self.assertFalse(thread.is_alive())
        self.assertEqual([None], found)
        self.feed.put_blocks(batch())
        self.feed.put_frame(connection, frame(0))
        self.assertIsNone(self.feed.next())
