# SPDX-License-Identifier: Apache-2.0
"""How many relays there is room for, and what each may take."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate.host.capacity import Claim, Limits, Rates, fair_shares, shares, shortage
from tests import base

ROLES = ("source", "destination")


class ShortageTest(base.TestCase):
    def test_each_role_has_its_own_number(self) -> None:
        limits = Limits(max_relays=2)
        self.assertIsNone(shortage(limits, ["source"], "source"))
        self.assertIn("2 source", shortage(limits, ["source"] * 2, "source") or "")
        self.assertIsNone(shortage(limits, ["source"] * 2, "destination"))

    def test_memory_is_shared_by_both_roles(self) -> None:
        limits = Limits(10, memory=1000, relay_memory={"source": 400, "destination": 200})
        self.assertIsNone(shortage(limits, ["source"] * 1, "source"))
        self.assertIn("memory", shortage(limits, ["source"] * 2, "source") or "")
        self.assertIsNone(shortage(limits, ["source"] * 2, "destination"))

    def test_destinations_leave_room_for_one_source(self) -> None:
        limits = Limits(10, memory=1000, relay_memory={"source": 400, "destination": 200})
        self.assertIsNone(shortage(limits, ["destination"] * 2, "destination"))
        self.assertIsNotNone(shortage(limits, ["destination"] * 3, "destination"))
        self.assertIsNone(shortage(limits, ["destination"] * 3, "source"))

    @settings(deadline=None, derandomize=True, max_examples=100)
    @given(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=24),
        st.integers(1, 3),
        st.integers(600, 1500),
    )
    def test_hosts_that_migrate_to_each_other_come_to_an_end(
        self, migrations: list[tuple[int, int]], most: int, memory: int
    ) -> None:
        """All begin with their destinations; whoever has both relays ends."""
        limits = Limits(most, memory, {"source": 400, "destination": 200})
        running: list[list[str]] = [[], [], []]
        waiting = [(source, target) for source, target in migrations if source != target]
        begun: list[tuple[int, int]] = []
        while waiting or begun:
            for source, target in list(waiting):
                if shortage(limits, running[target], "destination") is None:
                    running[target].append("destination")
                    waiting.remove((source, target))
                    begun.append((source, target))
            moved = False
            for source, target in list(begun):
                if shortage(limits, running[source], "source") is None:
                    begun.remove((source, target))
                    running[target].remove("destination")
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
