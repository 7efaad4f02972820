# SPDX-License-Identifier: Apache-2.0
"""The window: each copy is kept until the one answer to its reference has come."""

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nova_dmigrate.relay.window import Window
from tests.base import TestCase

PAGE = 4096


def pages(*values: int) -> NDArray[np.uint8]:
    return np.repeat(np.array(values, np.uint8), PAGE).reshape(-1, PAGE)


def slots(values: ArrayLike) -> NDArray[np.uint32]:
    return np.array(values, np.uint32)


class WindowTest(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.window = Window(4 * PAGE)

    def keep(self, *entries: int, publish: bool = True) -> NDArray[np.uint32]:
        """Keep a page for each entry, filled with its number."""
        taken = self.window.reserve(np.array(entries, np.int64))
        self.window.keep(taken, pages(*entries)[: len(taken)])
        if publish:
            self.window.publish(taken)
        return taken

    def rank(self) -> NDArray[np.uint32]:
        return np.arange(100, dtype=np.uint32)

    def test_as_many_are_reserved_as_there_is_room_for(self) -> None:
        self.assertEqual(3, len(self.keep(1, 2, 3)))
        self.assertEqual(1, len(self.keep(4, 5)))
        self.assertEqual(0, len(self.keep(6)))
        self.assertEqual(4, self.window.unresolved)
        self.assertEqual(4, self.window.peak)

    def test_a_window_smaller_than_a_page_holds_one(self) -> None:
        self.assertEqual(1, Window(1).slots)

    def test_a_settled_slot_is_used_again(self) -> None:
        taken = self.keep(1, 2, 3, 4)
        self.window.settle(taken[1:3])
        self.assertEqual(2, self.window.unresolved)
        self.assertEqual(set(taken[1:3].tolist()), set(self.keep(5, 6).tolist()))
        self.assertEqual(4, self.window.peak)

    def test_a_missed_copy_is_taken_once_with_its_entry(self) -> None:
        taken = self.keep(7, 8, 9)
        self.window.miss(taken[1:])
        self.assertEqual(2, self.window.missed)
        copies = self.window.take_missed(10)
        assert copies is not None
        self.assertEqual([8, 9], copies[0].tolist())
        self.assertEqual(taken[1:].tolist(), copies[1].tolist())
        self.assertEqual([8, 9], copies[2][:, 17].tolist())
        self.assertIsNone(self.window.take_missed(10))
        self.assertEqual((0, 1), (self.window.missed, self.window.unresolved))

    def test_missed_copies_are_taken_in_order_and_in_portions(self) -> None:
        taken = self.keep(1, 2, 3, 4)
        self.window.miss(taken[:3])
        self.window.miss(taken[3:])
        found = []
        while (copies := self.window.take_missed(2)) is not None:
            found.append(copies[0].tolist())
        self.assertEqual([[1, 2], [3], [4]], found)

    def test_copies_that_were_taken_stay_as_they_were_when_their_slot_is_used_again(self) -> None:
        taken = self.keep(1, 2, 3, 4)
        self.window.miss(taken)
        copies = self.window.take_missed(4)
        assert copies is not None
        self.keep(5, 6, 7, 8)
        self.assertEqual([1, 2, 3, 4], copies[2][:, 0].tolist())
        self.assertEqual([1, 2, 3, 4], copies[0].tolist())

    def test_an_answer_may_come_before_the_reference_is_published(self) -> None:
        taken = self.keep(1, 2, 3, publish=False)
        self.window.settle(taken[:1])
        self.window.miss(taken[1:2])
        self.window.publish(taken)
        copies = self.window.take_missed(4)
        assert copies is not None
        self.assertEqual([2], copies[0].tolist())
        self.window.settle(taken[2:])
        self.assertEqual(0, self.window.unresolved)

    def test_only_what_has_waited_is_sent_unasked(self) -> None:
        taken = self.keep(1, publish=False)
        self.window.ripen()
        self.assertIsNone(self.window.take_last(9, self.rank()))
        self.window.publish(taken)
        self.assertIsNone(self.window.take_last(9, self.rank()))
        self.window.ripen()
        copies = self.window.take_last(9, self.rank())
        assert copies is not None
        self.assertEqual([1], copies[0].tolist())
        self.assertIsNone(self.window.take_last(9, self.rank()))

    def test_what_is_read_last_is_sent_unasked_first(self) -> None:
        self.keep(1, 2, 3, 4)
        self.window.ripen()
        rank = np.array([0, 30, 40, 10, 20], np.uint32)
        copies = self.window.take_last(2, rank)
        assert copies is not None
        self.assertEqual({1, 2}, set(copies[0].tolist()))

    def test_a_slot_whose_copy_is_on_its_way_waits_for_its_answer(self) -> None:
        for answer in ("settle", "miss"):
            with self.subTest(answer=answer):
                taken = self.keep(1, 2, 3, 4)
                self.window.ripen()
                self.window.take_last(9, self.rank())
                self.assertEqual(4, self.window.unresolved)
                self.assertEqual(0, len(self.keep(5)))
                # A miss is not answered by a second copy.
                getattr(self.window, answer)(taken)
                self.assertEqual((0, 0), (self.window.unresolved, self.window.missed))
                self.assertIsNone(self.window.take_missed(9))

    def test_misses_of_copied_and_uncopied_pages_may_come_together(self) -> None:
        first = self.keep(1, 2)
        self.window.ripen()
        self.window.take_last(9, self.rank())
        second = self.keep(3, 4)
        self.window.miss(np.concatenate([first, second]))
        copies = self.window.take_missed(9)
        assert copies is not None
        self.assertEqual([3, 4], copies[0].tolist())

    def test_bad_answers_are_refused_and_change_nothing(self) -> None:
        taken = self.keep(1, 2)
        missed = self.keep(3)
        self.window.miss(missed)
        free = next(iter({0, 1, 2, 3} - set(taken.tolist()) - set(missed.tolist())))
        for bad in ([4], [2**32 - 1], [free], missed, [*taken, free], [taken[0], taken[0]]):
            for answer in (self.window.settle, self.window.miss):
                self.assertRaises(ValueError, answer, slots(bad))
        self.assertEqual((3, 1), (self.window.unresolved, self.window.missed))
        self.window.settle(taken)
        self.assertRaises(ValueError, self.window.settle, taken)
        self.assertEqual(3, len(self.keep(5, 6, 7, 8)))

    def test_an_empty_answer_means_nothing(self) -> None:
        self.window.settle(slots([]))
        self.window.miss(slots([]))
        self.assertIsNone(self.window.take_missed(9))

    def test_who_waits_for_emptiness_is_woken_by_it(self) -> None:
        self.assertTrue(self.window.wait_empty(0))
        taken = self.keep(1)
        self.assertFalse(self.window.wait_empty(0.001))
        self.assertTrue(self.wait_while(lambda: self.window.settle(taken)))

    def test_who_waits_for_emptiness_is_woken_by_the_end(self) -> None:
        self.keep(1)
        self.assertFalse(self.wait_while(self.window.close))

    def wait_while(self, wake: Callable[[], None]) -> bool:
        results: list[bool] = []
        thread = threading.Thread(
            target=lambda: results.append(self.window.wait_empty(600)), daemon=True
        )
        thread.start()
        wake()
        thread.join(60)
        return results[0]

    def test_random_lives_of_slots_keep_the_books(self) -> None:
        random = np.random.default_rng(1)
        window = Window(64 * PAGE)
        open_: dict[int, int] = {}  # slot -> entry
        rank = self.rank()
        for _ in range(2000):
            action = random.integers(0, 5)
            chosen = slots([slot for slot in open_ if random.random() < 0.3])
            if action == 0:
                entries = random.integers(0, 100, random.integers(1, 20))
                for slot, entry in zip(window.reserve(entries), entries, strict=False):
                    self.assertNotIn(int(slot), open_)
                    open_[int(slot)] = int(entry)
                    window.keep(slots([slot]), pages(int(entry)))
                    window.publish(slots([slot]))
            elif action == 1:
                window.settle(chosen)
                for slot in chosen:
                    del open_[int(slot)]
            elif action == 2:
                window.ripen()
                copies = window.take_last(8, rank)
                if copies is not None:
                    self.assertEqual(copies[0].tolist(), [open_[int(s)] for s in copies[1]])
                    self.assertEqual(copies[0].tolist(), copies[2][:, 0].tolist())
            elif action == 3:
                window.miss(chosen)
                copied = 0
                while (copies := window.take_missed(8)) is not None:
                    copied += len(copies[1])
                    self.assertEqual(copies[0].tolist(), [open_[int(s)] for s in copies[1]])
                    self.assertEqual(copies[0].tolist(), copies[2][:, 0].tolist())
                for slot in chosen:
                    del open_[int(slot)]
            self.assertEqual(len(open_), window.unresolved)
