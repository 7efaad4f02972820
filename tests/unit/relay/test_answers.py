# SPDX-License-Identifier: Apache-2.0
"""Answers: many small ones become one frame, and nobody waits to give one."""

import threading
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nova_dmigrate import exception
from nova_dmigrate.relay import answers
from nova_dmigrate.relay.answers import Answers
from nova_dmigrate.relay.entries import Verdict
from nova_dmigrate.relay.protocol import MissReason, Progress
from nova_dmigrate.relay.wire.frames import MISS, RULES, FrameType, Role
from tests.base import TestCase

LONG = 60.0


class FakeConnection:
    """Collects frames; fails as the real one does when they are too long."""

    def __init__(self) -> None:
        self.frames: list[tuple[FrameType, bytes]] = []
        self.lost = False

    def send(self, kind: FrameType, *, payload: Any = (), **rest: Any) -> int:
        data = b"".join(bytes(part) for part in payload)
        rule = RULES[Role.ACKS][kind]
        assert rule.minimum <= len(data) <= rule.maximum, (kind, len(data))
        if self.lost:
            raise exception.PeerLost(peer="it", reason="gone")
        self.frames.append((kind, data))
        return len(data)


def slots(values: ArrayLike) -> NDArray[np.uint32]:
    return np.array(values, np.uint32)


def verdict(
    settled: ArrayLike = (), changed: ArrayLike = (), unreadable: ArrayLike = ()
) -> Verdict:
    return Verdict(None, slots(settled), slots(changed), slots(unreadable))


class AnswersTest(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.answers = Answers()
        self.connection = FakeConnection()

    def send(self) -> list[tuple[FrameType, bytes]]:
        """Send until the end; returns the frames."""
        self.answers.send(self.connection)  # type: ignore[arg-type]
        return self.connection.frames

    def test_settled_slots_of_many_verdicts_go_in_one_frame(self) -> None:
        for first in range(0, 9, 3):
            self.answers.put_verdict(verdict(range(first, first + 3)))
        self.answers.end(FrameType.DONE, b"{}")
        frames = self.send()
        self.assertEqual([FrameType.SETTLED, FrameType.DONE], [kind for kind, _ in frames])
        self.assertEqual(list(range(9)), np.frombuffer(frames[0][1], "<u4").tolist())

    def test_misses_say_why(self) -> None:
        self.answers.put_verdict(verdict((), [1, 2], [3]))
        self.answers.put_verdict(verdict((), (), [4]))
        self.answers.end(FrameType.DONE, b"{}")
        misses = np.frombuffer(self.send()[0][1], MISS)
        self.assertEqual([1, 2, 3, 4], misses["slot"].tolist())
        changed, unreadable = MissReason.CHANGED, MissReason.READ_ERROR
        self.assertEqual([changed, changed, unreadable, unreadable], misses["reason"].tolist())

    def test_the_newest_progress_goes(self) -> None:
        for done in range(3):
            self.answers.put_progress(Progress(done, 1.0, 5))
        self.answers.end(FrameType.DONE, b"{}")
        frames = self.send()
        self.assertEqual(2, len(frames))
        self.assertEqual(Progress(2, 1.0, 5), Progress.parse(memoryview(frames[0][1])))

    def test_other_frames_keep_their_order_and_the_last_one_is_the_last(self) -> None:
        for number in range(4):
            self.answers.put(FrameType.RETURN_PATH, bytes([number]))
        self.answers.put(FrameType.RETURN_END)
        self.answers.put_verdict(verdict([1]))
        self.answers.end(FrameType.FAILED, b"why")
        frames = self.send()
        self.assertEqual(FrameType.SETTLED, frames[0][0])
        self.assertEqual([b"\0", b"\1", b"\2", b"\3", b"", b"why"], [d for _, d in frames[1:]])

    def test_more_than_fits_a_frame_goes_in_several(self) -> None:
        self.answers.put_verdict(verdict(range(10), range(7)))
        self.answers.end(FrameType.DONE, b"{}")
        with mock.patch.object(answers, "_RECORDS_PER_FRAME", 4):
            frames = self.send()
        sizes = [len(data) for kind, data in frames if kind is not FrameType.DONE]
        self.assertEqual([16, 16, 8, 20, 15], sizes)

    def test_the_records_of_a_full_frame_fit_it(self) -> None:
        count = answers._RECORDS_PER_FRAME + 1
        self.answers.put_verdict(verdict(range(count), range(count)))
        self.answers.end(FrameType.DONE, b"{}")
        self.assertEqual(5, len(self.send()))

    def test_an_empty_verdict_is_no_answer(self) -> None:
        self.answers.put_verdict(verdict())
        self.answers.end(FrameType.DONE, b"{}")
        self.assertEqual(1, len(self.send()))

    def test_silence_is_broken_to_show_that_we_are_alive(self) -> None:
        with mock.patch.object(answers, "KEEPALIVE_SECONDS", 0.001):
            thread = threading.Thread(target=self.send, daemon=True)
            thread.start()
            while not self.connection.frames:
                thread.join(0.001)
            self.answers.end(FrameType.DONE, b"{}")
            thread.join(LONG)
        self.assertEqual(FrameType.KEEPALIVE, self.connection.frames[0][0])
        self.assertEqual(FrameType.DONE, self.connection.frames[-1][0])

    def test_an_answer_wakes_who_sends(self) -> None:
        thread = threading.Thread(target=self.send, daemon=True)
        with mock.patch.object(answers, "KEEPALIVE_SECONDS", 600.0):
            thread.start()
            self.answers.put_verdict(verdict([1]))
            while not self.connection.frames:
                thread.join(0.001)
            self.answers.end(FrameType.DONE, b"{}")
            thread.join(LONG)
        self.assertFalse(thread.is_alive())

    def test_a_lost_source_ends_the_sending(self) -> None:
        self.connection.lost = True
        self.answers.put_verdict(verdict([1]))
        self.assertRaises(exception.PeerLost, self.send)
