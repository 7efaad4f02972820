# SPDX-License-Identifier: Apache-2.0
"""How many relays there is room for, and what each may take."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate.host.capacity import Claim, Limits, Load, Rates, fair_shares, shares, shortage
from tests import base

ROLES = ("source", "destination")
SOURCE, DESTINATION = map(Load, ROLES)


class ShortageTest(base.TestCase):
    def test_each_role_has_its_own_number(self) -> None:
        limits = Limits(max_relays=2)
        self.assertIsNone(shortage(limits, [SOURCE], SOURCE))
        self.assertIn("2 source", shortage(limits, [SOURCE] * 2, SOURCE) or "")
        self.assertIsNone(shortage(limits, [SOURCE] * 2, DESTINATION))

    def test_memory_is_shared_by_both_roles(self) -> None:
        limits = Limits(10, memory=1000, relay_memory={"source": 400, "destination": 200})
        self.assertIsNone(shortage(limits, [SOURCE] * 1, SOURCE))
        self.assertIn("memory", shortage(limits, [SOURCE] * 2, SOURCE) or "")
        self.assertIsNone(shortage(limits, [SOURCE] * 2, DESTINATION))

    def test_destinations_leave_room_for_one_source(self) -> None:
        limits = Limits(10, memory=1000, relay_memory={"source": 400, "destination": 200})
        self.assertIsNone(shortage(limits, [DESTINATION] * 2, DESTINATION))
        self.assertIsNotNone(shortage(limits, [DESTINATION] * 3, DESTINATION))
        self.assertIsNone(shortage(limits, [DESTINATION] * 3, SOURCE))

    def test_the_larger_the_guest_the_more_its_relays_need(self) -> None:
        own = {"source": 400, "destination": 200}
        limits = Limits(10, 1000, own, page_memory=10, max_pages=50)
        for memory, needed in ((0, 400), (4095, 400), (3 * 4096, 430), (1 << 40, 900)):
            self.assertEqual(needed, limits.needs(Load("source", memory)))
        large = Load("destination", 20 * 4096)
        # 400, and 400 for a source of such a guest, and of another one
        self.assertIsNone(shortage(limits, (), large))
        self.assertIsNotNone(shortage(limits, [large], large))
        self.assertIsNone(shortage(limits, [DESTINATION], Load("destination", 0)))
        self.assertIsNotNone(shortage(limits, [large], DESTINATION))

    @settings(deadline=None, derandomize=True, max_examples=100)
    @given(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=24),
        st.integers(1, 3),
        st.integers(700, 1600),
        st.integers(0, 5),
    )
    def test_hosts_that_migrate_to_each_other_come_to_an_end(
        self, migrations: list[tuple[int, int]], most: int, memory: int, pages: int
    ) -> None:
        """All begin with their destinations; whoever has both relays ends."""
        own = {"source": 400, "destination": 200}
        limits = Limits(most, memory, own, page_memory=10, max_pages=9)
        source_load, target_load = (Load(role, pages * 4096) for role in ROLES)
        running: list[list[Load]] = [[], [], []]
        waiting = [(source, target) for source, target in migrations if source != target]
        begun: list[tuple[int, int]] = []
        while waiting or begun:
            for source, target in list(waiting):
                if shortage(limits, running[target], target_load) is None:
                    running[target].append(target_load)
                    waiting.remove((source, target))
                    begun.append((source, target))
            moved = False
            for source, target in list(begun):
                if shortage(limits, running[source], source_load) is None:
                    begun.remove((source, target))
                    running[target].remove(target_load)
                    moved = True
            self.assertTrue(moved or not begun, "nobody gets on")


class SharesTest(base.TestCase):
    def test_what_one_cannot_use_goes_to_the_others(self) -> None:
        self.assertEqual([5, 5], fair_shares(10, [0, 0]))
        self.assertEqual([2, 8], fair_shares(10, [2, 0]))
        self.assertEqual([4.5, 1, 4.5], fair_shares(10, [5, 1, 0]))
        self.assertEqual([2, 3], fair_shares(10, [2, 3]))
        self.assertEqual([], fair_shares(10, []))

    def test_without_a_cap_of_the_host_each_has_its_own(self) -> None:
        self.assertEqual([0, 3], fair_shares(0, [0, 3]))

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(
        st.floats(1, 1e12),
        st.lists(st.just(0.0) | st.floats(1, 1e12), min_size=1, max_size=12),
    )
    def test_shares_are_fair(self, total: float, caps: list[float]) -> None:
        found = fair_shares(total, caps)
        self.assertLessEqual(sum(found), total * (1 + 1e-9))
        largest = max(found)
        for share, cap in zip(found, caps, strict=True):
            self.assertGreater(share, 0)
            if cap:
                self.assertLessEqual(share, cap)
            # Who has less than another has all that it can use
            if share < largest * (1 - 1e-9):
                self.assertEqual(cap, share)
        if all(not cap or cap >= total for cap in caps):
            self.assertGreaterEqual(sum(found), total * (1 - 1e-9))

    def test_the_network_is_the_sources_and_volumes_are_the_destinations(self) -> None:
        limits = Limits(host=Rates(10, 6), relay=Rates(network=8))
        one = Claim("one", "source", Rates())
        two = Claim("two", "destination", Rates(1, 2))
        self.assertEqual({"one": Rates(8, 0), "two": Rates(0, 2)}, shares(limits, [one, two]))
        more = Claim("more", "source", Rates(3, 1))
        self.assertEqual(Rates(7, 0), shares(limits, [one, two, more])["one"])
