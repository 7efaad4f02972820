# SPDX-License-Identifier: Apache-2.0

import math

import hypothesis
import numpy as np
from hypothesis import strategies as st

from tests import base
from tests.scale.fluid import jain, max_min


def rates(through, caps, capacities):
    found = max_min(np.array(through, np.int64), np.array(caps, float), np.array(capacities, float))
    return found.tolist()


class MaxMinTest(base.TestCase):
    def test_flows_through_one_link_have_equal_shares(self):
        self.assertEqual([2.5] * 4, rates([[0]] * 4, [math.inf] * 4, [10]))

    def test_what_one_cannot_use_goes_to_the_others(self):
        self.assertEqual([1.0, 4.5, 4.5], rates([[0]] * 3, [1, math.inf, math.inf], [10]))

    def test_what_is_narrow_elsewhere_counts(self):
        # Two share link 1, of which one also goes through link 0 with a third
        found = rates([[0, -1], [0, 1], [1, -1]], [math.inf] * 3, [2, 10])
        self.assertEqual([1.0, 1.0, 9.0], found)

    def test_a_flow_that_is_not_there_takes_nothing(self):
        self.assertEqual([0.0, 10.0], rates([[0], [0]], [0, math.inf], [10]))
        self.assertEqual([], max_min(np.empty((0, 1), np.int64), np.empty(0), np.ones(1)).tolist())

    def test_its_own_cap_holds_where_it_goes_through_nothing(self):
        self.assertEqual([7.0], rates([[-1]], [7], [1]))

    @hypothesis.given(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(-1, 3), st.floats(0.1, 100)),
            min_size=1,
            max_size=12,
        ),
        st.lists(st.floats(0.5, 50), min_size=4, max_size=4),
    )
    def test_nothing_is_overrun_and_nobody_could_have_more(self, flows, capacities):
        # Nothing is gone through twice
        pairs = [(one, -1 if other == one else other) for one, other, _ in flows]
        through = np.array(pairs, np.int64)
        caps = np.array([flow[2] for flow in flows])
        found = max_min(through, caps, np.array(capacities))
        users = [(through == number).any(axis=1) for number in range(4)]
        loads = np.array([found[mine].sum() for mine in users])
        self.assertTrue((loads <= np.array(capacities) * (1 + 1e-6)).all())
        self.assertTrue((found <= caps * (1 + 1e-6)).all())
        full = loads >= np.array(capacities) * (1 - 1e-6)
        for flow, rate in enumerate(found):
            # It has its cap, or shares something full in which nobody has more
            bounds = [
                number
                for number, mine in enumerate(users)
                if mine[flow] and full[number] and rate >= found[mine].max() - 1e-6
            ]
            self.assertTrue(rate >= caps[flow] * (1 - 1e-6) or bounds)


class JainTest(base.TestCase):
    def test_it_is_one_where_all_are_equal_and_least_where_one_has_all(self):
        self.assertEqual(1.0, jain(np.full(5, 3.0)))
        self.assertEqual(0.25, jain(np.array([8.0, 0, 0, 0])))
        self.assertEqual(1.0, jain(np.zeros(3)))
