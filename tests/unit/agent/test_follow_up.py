# SPDX-License-Identifier: Apache-2.0
"""Noticing another host: announcements of the network, clocks."""

import struct
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate.agent import follow_up
from tests import base


def link_event(index: int, *attributes: tuple[int, bytes], kind: int = 16) -> bytes:
    """A message of rtnetlink about an interface."""
    body = struct.pack("=BxHiII", 0, 1, index, 0, 0)
    for number, value in attributes:
        attribute = struct.pack("=HH", 4 + len(value), number) + value
        body += attribute + bytes(-len(attribute) % 4)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


NAME = (3, b"eth0\0")
ANNOUNCED = (44, struct.pack("=I", 4))


class AnnouncementTest(base.TestCase):
    def found(self, data: bytes) -> list[int]:
        return list(follow_up.announced_interfaces(data))

    def test_an_announced_interface_is_found_among_other_messages(self) -> None:
        data = (
            link_event(1, NAME)
            + link_event(2, NAME, ANNOUNCED)
            + link_event(3, (44, struct.pack("=I", 1)))
            + link_event(4, ANNOUNCED, kind=17)
            + link_event(5, ANNOUNCED, NAME)
        )
        self.assertEqual([2, 5], self.found(data))

    def test_a_message_that_is_cut_off_is_no_announcement(self) -> None:
        whole = link_event(2, NAME, ANNOUNCED)
        for end in range(len(whole)):
            self.assertEqual([], self.found(whole[:end]))

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(st.binary(max_size=200))
    def test_any_bytes_are_read_to_their_end(self, data: bytes) -> None:
        self.found(data)
        self.found(link_event(1, NAME)[:32] + data)


class ClockTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.wall, self.boot = 1000.0, 100.0
        self.watch = follow_up.ClockWatch(lambda: self.wall, lambda: self.boot)
        self.watch.sign()

    def test_time_that_goes_by_is_no_sign(self) -> None:
        self.wall, self.boot = self.wall + 1.01, self.boot + 1
        self.assertIsNone(self.watch.sign())

    def test_a_wall_clock_that_is_set_and_a_long_absence_are_signs(self) -> None:
        self.wall, self.boot = self.wall + 4, self.boot + 1
        self.assertIn("+3.0", self.watch.sign() or "")
        self.wall, self.boot = self.wall + 30, self.boot + 30
        self.assertIn("away", self.watch.sign() or "")
        self.assertIsNone(self.watch.sign())


class FollowUpTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.now = 50.0
        self.signs: list[str] = []
        clocks = follow_up.ClockWatch(lambda: 0.0, lambda: 0.0)
        self.follow = follow_up.FollowUp(self.signs.append, clocks, lambda: self.now)

    def test_the_announcements_of_one_move_are_one_move(self) -> None:
        self.assertIsNone(self.follow.since_move)
        for _ in range(5):
            self.follow.check_announcement(link_event(2, ANNOUNCED) + link_event(3, ANNOUNCED))
            self.now += 0.15
        self.assertEqual((1, 1), (self.follow.moves, len(self.signs)))
        self.now += 60
        self.assertAlmostEqual(60.15, self.follow.since_move or 0)
        self.follow.check_announcement(link_event(2, ANNOUNCED))
        self.assertEqual(2, self.follow.moves)

    def test_the_watching_thread_can_be_stopped(self) -> None:
        self.follow.start()
        self.follow.stop()
        self.assertNotIn("follow-up", [thread.name for thread in threading.enumerate()])
