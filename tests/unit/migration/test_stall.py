# SPDX-License-Identifier: Apache-2.0
"""When a migration through relays has come to a standstill, and when it only seems so."""

from nova_dmigrate.migration.job import Job
from nova_dmigrate.migration.stall import Stall
from tests import base

MIB = 1 << 20


class StallTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.now = 1000.0
        self.stall = Stall(30, clock=lambda: self.now)
        self.sent = 0

    def during(
        self,
        seconds: int,
        moves: bool = False,
        told: bool = True,
        failure: str | None = None,
        silence: float = 0.0,
    ) -> list[str]:
        """What it says in so many seconds.

        :param told: by libvirt. :param silence: of the source relay, before those seconds.
        """
        found = set()
        for second in range(seconds):
            self.now += 1
            self.sent += MIB if moves else 0
            job = Job(transferred=self.sent) if told else None
            silent = silence + second if silence else 0.0
            found.add(self.stall.reason(job, failure, silent))
        return sorted(each for each in found if each is not None)

    def test_a_relay_that_tells_nothing_while_nothing_moves_is_one(self) -> None:
        self.assertEqual([], self.during(30, moves=True))
        self.assertEqual([], self.during(39, silence=1))
        why = self.during(5, silence=40)
        self.assertEqual(1, len({each[:30] for each in why}))
        self.assertIn("source relay: it tells nothing", why[0])

    def test_memory_that_moves_is_none_whoever_is_silent(self) -> None:
        self.assertEqual([], self.during(600, moves=True, silence=1))
        self.assertIsNone(self.stall.doubt())

    def test_it_is_doubted_long_before_it_is_given_up(self) -> None:
        self.during(30, moves=True)
        self.assertEqual([], self.during(10, silence=1))
        self.assertIsNone(self.stall.doubt())
        self.assertEqual([], self.during(10, silence=11))
        self.assertIn("source relay: it tells nothing", self.stall.doubt() or "")
        self.assertEqual([], self.during(1, moves=True, silence=21))
        self.assertIsNone(self.stall.doubt())

    def test_a_relay_that_tells_of_itself_is_waited_for(self) -> None:
        self.assertEqual([], self.during(600))

    def test_it_is_not_known_what_has_moved_while_libvirt_tells_nothing(self) -> None:
        self.assertEqual([], self.during(600, told=False, silence=1))
        self.assertEqual([], self.during(39, silence=600))
        self.assertNotEqual([], self.during(5, silence=640))

    def test_a_relay_that_has_failed_is_one_soon(self) -> None:
        self.assertEqual([], self.during(30, moves=True))
        self.assertEqual([], self.during(5, failure="so it is"))
        self.assertEqual(["so it is"], self.during(5, failure="so it is"))

    def test_that_is_so_as_well_while_qemu_does_not_answer(self) -> None:
        # At a switchover it does not as long as the relay does not read
        self.assertEqual([], self.during(5, told=False, failure="so it is"))
        self.assertEqual(["so it is"], self.during(5, told=False, failure="so it is"))

    def test_while_memory_moves_there_is_no_hurry(self) -> None:
        self.assertEqual([], self.during(600, moves=True, failure="so it is"))
        self.assertEqual([], self.during(5, failure="so it is"))
        self.assertEqual(["so it is"], self.during(1, failure="so it is"))
