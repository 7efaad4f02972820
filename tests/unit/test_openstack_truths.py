# SPDX-License-Identifier: Apache-2.0
"""What the OpenStack lab says of live migrations that are not as they must be."""

from typing import Any

from tests import base
from tests.lab.openstack.move import CANCELLED, COMPLETED, Move
from tests.lab.openstack.truths import Truth, Way

VOLUME = Truth(Way.VOLUME)
NO_AGENT = Truth(Way.BARE, "agent-unreachable")
NO_HOST = Truth(Way.ORDINARY, "host-unreachable")
ABORTED = Truth(Way.VOLUME, status=CANCELLED)


def move(status: str = COMPLETED, host: str = "b", **told: Any) -> Move:
    """A migration from a, through the relays with pages from the volume."""
    summary = {
        "mode": "dmigrate",
        "state": status,
        "total_s": 12.34,
        "fallback_reason": None,
        "pages_referenced": 7,
        "misses": 0,
        "volume_bytes": 7 << 12,
        "mapping_s": 1.5,
    }
    return Move(status, "a", host, {**summary, **told})


def ordinary(reason: str, **told: Any) -> Move:
    """One that was not to be an ordinary one."""
    return move(**{"mode": "ordinary", "fallback_reason": reason, "pages_referenced": 0, **told})


class TruthTest(base.TestCase):
    def test_what_is_as_it_must_be_has_nothing_wrong(self) -> None:
        for truth, moved in (
            (Truth(Way.STOCK), Move(COMPLETED, "a", "b", {})),
            (VOLUME, move()),
            (NO_AGENT, move(fallback_reason="agent-unreachable", pages_referenced=0)),
            (NO_AGENT, ordinary("agent-unreachable")),
            (NO_HOST, ordinary("host-unreachable")),
            (ABORTED, move(CANCELLED, "a")),
            (ABORTED, move(CANCELLED, "a", pages_referenced=0)),
        ):
            self.assertEqual([], truth.lies(moved), truth)

    def test_novas_end_and_ours_are_looked_at(self) -> None:
        self.assertIn("Nova says error", VOLUME.lies(move("error")))
        self.assertIn("DMigrate says failed", VOLUME.lies(move(state="failed")))
        self.assertIn(
            "DMigrate says completed", ABORTED.lies(move(CANCELLED, "a", state=COMPLETED))
        )
        self.assertEqual(2, len(ABORTED.lies(move(host="a"))))

    def test_a_server_is_where_it_should_be(self) -> None:
        (wrong,) = VOLUME.lies(move(host="a"))
        self.assertIn("is on a", wrong)
        (wrong,) = ABORTED.lies(move(CANCELLED, "b"))
        self.assertIn("is on b", wrong)

    def test_who_has_migrated_it_is_looked_at(self) -> None:
        (wrong,) = Truth(Way.STOCK).lies(move())
        self.assertIn("DMigrate tells", wrong)
        self.assertEqual(["DMigrate tells nothing"], VOLUME.lies(Move(COMPLETED, "a", "b", {})))
        (wrong,) = NO_HOST.lies(move(fallback_reason="host-unreachable", pages_referenced=0))
        self.assertEqual("the mode is dmigrate", wrong)

    def test_pages_come_from_the_volume_or_do_not(self) -> None:
        self.assertEqual(["0 pages were references"], VOLUME.lies(move(pages_referenced=0)))
        (wrong,) = NO_AGENT.lies(move(fallback_reason="agent-unreachable"))
        self.assertEqual("7 pages were references", wrong)

    def test_one_that_was_aborted_has_come_as_far_as_the_volume(self) -> None:
        (wrong,) = ABORTED.lies(move(CANCELLED, "a", volume_bytes=0, pages_referenced=0))
        self.assertEqual("nothing was read of the volume", wrong)

    def test_references_that_did_not_match_are_no_pages_from_the_volume(self) -> None:
        some = Truth(Way.VOLUME, matched=0)
        self.assertEqual([], VOLUME.lies(move(misses=3)))
        self.assertEqual(["4 of 7 references did not match"], VOLUME.lies(move(misses=4)))
        self.assertEqual([], some.lies(move(misses=6)))
        self.assertEqual(["7 of 7 references did not match"], some.lies(move(misses=7)))
        self.assertEqual([], ABORTED.lies(move(CANCELLED, "a", misses=7)))
        self.assertIn("7 references, 7 misses", str(move(misses=7)))

    def test_another_reason_and_none_are_both_wrong(self) -> None:
        (wrong,) = NO_AGENT.lies(ordinary("late-map"))
        self.assertEqual("it is so because of late-map", wrong)
        (wrong,) = NO_AGENT.lies(move(pages_referenced=0))
        self.assertEqual("it is so for no reason", wrong)
        self.assertIn("it is so because of late-map", VOLUME.lies(move(fallback_reason="late-map")))

    def test_sentences_have_what_was_and_what_must_be(self) -> None:
        self.assertEqual(
            "completed in any way, without pages from the volume, because agent-unreachable",
            str(NO_AGENT),
        )
        self.assertEqual(
            "completed, dmigrate completed in 12.3 s, the map in 1.5 s, 7 references", str(move())
        )
        self.assertEqual(
            "completed, ordinary completed in 12.3 s, no-room, the map in 1.5 s",
            str(ordinary("no-room")),
        )
        self.assertEqual("completed, DMigrate says nothing", str(Move(COMPLETED, "a", "b", {})))
