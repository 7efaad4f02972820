# SPDX-License-Identifier: Apache-2.0
"""The arbiter: whoever speaks last of a guest page is right, in whatever order things come."""

from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from nova_dmigrate.relay.digest import DIGEST_SIZE
from nova_dmigrate.relay.entries import EntryTable, Verdict
from tests.base import TestCase

RIGHT, WRONG = 1, 2


def digests(*values: int) -> NDArray[np.uint8]:
    return np.repeat(np.array(values, np.uint8), DIGEST_SIZE).reshape(-1, DIGEST_SIZE)


def array(values: ArrayLike) -> NDArray[np.int64]:
    return np.array(values, np.int64)


class EntryTableTest(TestCase):
    """Every event in every state, for entry 3 with slot 30."""

    def setUp(self) -> None:
        super().setUp()
        self.table = EntryTable(8)

    def reference(self, digest: int = RIGHT) -> Verdict:
        return self.table.references(array([3]), np.array([30], np.uint32), digests(digest))

    def block(self, digest: int = RIGHT) -> Verdict:
        return self.table.blocks(array([3]), digests(digest))

    def page(self) -> Verdict:
        return self.table.pages(array([3]))

    def copy(self, slot: int = 30) -> Verdict:
        return self.table.copies(array([3]), np.array([slot], np.uint32))

    def fail(self) -> Verdict:
        return self.table.fail(array([3]))

    def assert_verdict(
        self,
        verdict: Verdict,
        *,
        emit: bool | None = None,
        settled: bool = False,
        changed: bool = False,
        unreadable: bool = False,
    ) -> None:
        self.assertEqual(emit, None if verdict.emit is None else bool(verdict.emit[0]))
        self.assertEqual([30] * settled, verdict.settled.tolist())
        self.assertEqual([30] * changed, verdict.changed.tolist())
        self.assertEqual([30] * unreadable, verdict.unreadable.tolist())

    def assert_open(self, count: int) -> None:
        self.assertEqual(count, self.table.open)

    def assert_settled(self) -> None:
        """Nothing that comes from the volume has a say any more."""
        self.assert_open(0)
        self.assertFalse(self.table.wanted(array([3]))[0])
        self.assertEqual(7, self.table.wanted_count)
        self.assert_verdict(self.block(), emit=False)
        self.assert_verdict(self.block(WRONG), emit=False)
        self.assert_verdict(self.copy(), emit=False)
        self.assert_verdict(self.fail())
        self.assert_verdict(self.page())
        self.assertRaises(ValueError, self.reference)
        self.assertEqual([], self.table.withdraw().tolist())

    def test_a_block_that_comes_first_is_emitted(self) -> None:
        self.assertTrue(self.table.wanted(array([3]))[0])
        self.assert_verdict(self.block(), emit=True)
        self.assert_open(0)
        self.assertFalse(self.table.wanted(array([3]))[0])
        self.assertEqual(1, self.table.speculated)

    def test_a_reference_to_what_was_emitted_is_settled_at_once(self) -> None:
        self.block()
        self.assert_verdict(self.reference(), settled=True)
        self.assertEqual(1, self.table.hits)
        self.assert_settled()

    def test_a_reference_to_something_else_than_was_emitted_is_a_miss(self) -> None:
        self.block(WRONG)
        self.assert_verdict(self.reference(), changed=True)
        self.assert_open(1)
        self.assert_verdict(self.block(), emit=False)
        self.assert_verdict(self.copy(), emit=True)
        self.assert_settled()

    def test_a_reference_that_comes_first_waits_for_its_block(self) -> None:
        self.assert_verdict(self.reference())
        self.assert_open(1)
        self.assertTrue(self.table.wanted(array([3]))[0])
        self.assert_verdict(self.block(), emit=True, settled=True)
        self.assertEqual(1, self.table.hits)
        self.assert_settled()

    def test_a_block_that_is_not_what_the_reference_says_is_not_emitted(self) -> None:
        self.reference()
        self.assert_verdict(self.block(WRONG), emit=False, changed=True)
        self.assert_open(1)
        self.assert_verdict(self.copy(), emit=True)
        self.assert_settled()

    def test_a_copy_that_comes_unasked_settles_the_reference(self) -> None:
        self.reference()
        self.assert_verdict(self.copy(), emit=True, settled=True)
        self.assert_settled()

    def test_a_copy_that_comes_unasked_and_too_late_is_dropped(self) -> None:
        self.reference()
        self.block()
        self.assert_verdict(self.copy(), emit=False)
        self.assert_settled()

    def test_a_copy_of_another_slot_means_another_reference(self) -> None:
        self.reference()
        self.assert_verdict(self.copy(31), emit=False)
        self.assert_open(1)

    def test_a_copy_without_a_reference_is_dropped(self) -> None:
        self.assert_verdict(self.copy(0), emit=False)
        self.block()
        self.assert_verdict(self.copy(0), emit=False)

    def test_an_unreadable_block_makes_the_waiting_reference_a_miss(self) -> None:
        self.reference()
        self.assert_verdict(self.fail(), unreadable=True)
        self.assert_open(1)
        self.assert_verdict(self.copy(), emit=True)
        self.assert_settled()

    def test_an_unreadable_block_makes_a_later_reference_a_miss(self) -> None:
        self.assert_verdict(self.fail())
        self.assertFalse(self.table.wanted(array([3]))[0])
        self.assert_verdict(self.reference(), unreadable=True)
        self.assert_open(1)
        self.assert_verdict(self.copy(), emit=True)
        self.assert_settled()

    def test_a_page_settles_from_every_state(self) -> None:
        def nothing() -> None:
            return None

        def missed() -> None:
            self.reference()
            self.block(WRONG)

        begins: list[tuple[Callable[[], object], bool]] = [
            (nothing, False),
            (self.block, False),
            (self.reference, True),
            (missed, False),
            (self.fail, False),
        ]
        for begin, answered in begins:
            self.table = EntryTable(8)
            begin()
            # Who waits for an answer gets it; a miss has had its answer, its copy comes too late.
            self.assert_verdict(self.page(), settled=answered)
            self.assert_settled()

    def test_a_page_in_place_of_an_emitted_block_is_counted(self) -> None:
        self.block()
        self.page()
        self.assertEqual(1, self.table.replaced)

    def test_a_second_reference_is_refused_in_every_state(self) -> None:
        self.reference()
        self.assertRaises(ValueError, self.reference)
        self.block(WRONG)
        self.assertRaises(ValueError, self.reference)
        self.copy()
        self.assertRaises(ValueError, self.reference)

    def test_withdrawn_is_what_was_emitted_and_never_spoken_of(self) -> None:
        self.table.blocks(array([1, 3, 5]), digests(RIGHT, RIGHT, RIGHT))
        self.reference()
        self.table.pages(array([5, 6]))
        self.assertTrue(self.table.unsettled)
        self.assertEqual([1], self.table.withdraw().tolist())
        self.assertFalse(self.table.unsettled)
        self.assertEqual(0, self.table.wanted_count)
        verdict = self.table.blocks(array([0, 1]), digests(RIGHT, RIGHT))
        assert verdict.emit is not None
        self.assertFalse(verdict.emit.any())

    def test_an_empty_table_is_settled(self) -> None:
        table = EntryTable(0)
        self.assertFalse(table.unsettled)
        self.assertEqual([], table.withdraw().tolist())


class Model:
    """One migration of few pages, slow and simple: QEMU's memory, and both ends of the wire.

    Frames to the destination are in a queue, answers to the source are in another; blocks are read
    at any time.
    """

    PAGES = 4

    def __init__(self) -> None:
        self.table = EntryTable(self.PAGES)
        self.sent = [0] * self.PAGES  # what the source has said last; 0 as long as nothing
        self.memory = [0] * self.PAGES  # what QEMU at the destination has
        self.volume = [RIGHT] * self.PAGES
        self.kept: dict[int, tuple[int, int]] = {}  # slot: entry, version
        self.copied: set[int] = set()
        self.frames: list[tuple[str, int, int, int]] = []  # kind, entry, version, slot
        self.answers: list[tuple[str, int]] = []
        self.spoken: set[int] = set()
        self.read: set[int] = set()
        self.slots = iter(range(10, 1000))

    # The source

    def say(self, entry: int, version: int) -> None:
        self.sent[entry] = version
        self.spoken.add(entry)
        self.frames.append(("page", entry, version, 0))

    def refer(self, entry: int, version: int) -> None:
        if entry in self.spoken:
            return self.say(entry, version)
        slot = next(self.slots)
        self.sent[entry] = version
        self.spoken.add(entry)
        self.kept[slot] = entry, version
        self.frames.append(("reference", entry, version, slot))
        return None

    def send_copy(self, which: int) -> None:
        waiting = sorted(set(self.kept) - self.copied)
        if waiting:
            slot = waiting[which % len(waiting)]
            self.copied.add(slot)
            self.frames.append(("copy", *self.kept[slot], slot))

    def hear(self, place: int = 0) -> None:
        """:param place: how many frames were on their way before the copy overtook the rest."""
        if not self.answers:
            return
        kind, slot = self.answers.pop(0)
        # Every slot is answered once.
        entry, version = self.kept.pop(slot)
        if kind == "miss" and slot not in self.copied:
            self.frames.insert(place, ("copy", entry, version, slot))

    # The destination

    def receive(self) -> None:
        if not self.frames:
            return
        kind, entry, version, slot = self.frames.pop(0)
        entries, slots = array([entry]), np.array([slot], np.uint32)
        if kind == "page":
            self.answer(self.table.pages(entries))
            self.memory[entry] = version
        elif kind == "reference":
            self.answer(self.table.references(entries, slots, digests(version)))
        else:
            verdict = self.table.copies(entries, slots)
            self.answer(verdict)
            assert verdict.emit is not None
            if verdict.emit[0]:
                self.memory[entry] = version

    def read_block(self, entry: int, readable: bool) -> None:
        if entry in self.read:
            return
        self.read.add(entry)
        if not readable:
            self.answer(self.table.fail(array([entry])))
            return
        version = self.volume[entry]
        verdict = self.table.blocks(array([entry]), digests(version))
        self.answer(verdict)
        assert verdict.emit is not None
        if verdict.emit[0]:
            self.memory[entry] = version

    def answer(self, verdict: Verdict) -> None:
        self.answers += [("settled", int(slot)) for slot in verdict.settled]
        self.answers += [("miss", int(slot)) for slot in verdict.changed]
        self.answers += [("miss", int(slot)) for slot in verdict.unreadable]

    def finish(self) -> None:
        """RAM's END: the source has waited until its window was empty."""
        for entry in range(self.PAGES):
            self.read_block(entry, True)
        while self.frames or self.answers:
            self.receive()
            self.hear()
        assert not self.kept, "a reference without an answer"
        assert not self.table.open
        assert self.table.referenced == self.table.missed == 0
        for entry in self.table.withdraw().tolist():
            assert entry not in self.spoken, "a page that was spoken of is withdrawn"
            self.memory[entry] = 0


ENTRY = st.integers(0, Model.PAGES - 1)
VERSION = st.integers(RIGHT, 4)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), ENTRY, VERSION),
        st.tuples(st.just("refer"), ENTRY, VERSION),
        st.tuples(st.just("send_copy"), ENTRY),
        st.tuples(st.just("hear"), st.integers(0, 5)),
        st.tuples(st.just("receive")),
        st.tuples(st.just("receive")),
        st.tuples(st.just("read_block"), ENTRY, st.booleans()),
        st.tuples(st.just("change"), ENTRY, VERSION),
    ),
    max_size=60,
)


class InterleavingsTest(TestCase):
    @settings(
        max_examples=1000,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(STEPS)
    def test_the_last_word_wins_in_any_order_of_events(
        self, steps: list[tuple[str, int, int]]
    ) -> None:
        model = Model()
        for name, *arguments in steps:
            if name == "change":
                model.volume[arguments[0]] = arguments[1]
            else:
                getattr(model, name)(*arguments)
        model.finish()
        self.assertEqual(model.sent, model.memory)

    def test_batches_are_handled_as_their_entries_one_by_one(self) -> None:
        for seed in range(50):
            random = np.random.default_rng(seed)
            together, apart = EntryTable(64), EntryTable(64)
            slots = np.arange(64, dtype=np.uint32) + 100
            referred = np.zeros(64, bool)
            for _ in range(12):
                event = random.choice(["pages", "references", "blocks", "fail", "copies"])
                entries = np.flatnonzero(random.random(64) < 0.3)
                if event == "references":
                    entries = entries[~referred[entries]]
                if event in ("references", "pages"):
                    referred[entries] = True
                values = digests(*random.integers(1, 3, len(entries)).tolist())
                rest = {
                    "references": (slots[entries], values),
                    "blocks": (values,),
                    "copies": (slots[entries],),
                }.get(event, ())
                whole = getattr(together, event)(entries, *rest)
                single = [
                    getattr(apart, event)(entries[i : i + 1], *(a[i : i + 1] for a in rest))
                    for i in range(len(entries))
                ]
                for field in ("emit", "settled", "changed", "unreadable"):
                    if getattr(whole, field) is None:
                        continue
                    parts = [getattr(verdict, field) for verdict in single]
                    self.assertEqual(
                        np.concatenate([*parts, []]).tolist(), getattr(whole, field).tolist()
                    )
                for count in ("open", "hits", "speculated", "replaced", "wanted_count"):
                    self.assertEqual(getattr(apart, count), getattr(together, count), count)
            self.assertEqual(apart.withdraw().tolist(), together.withdraw().tolist())
