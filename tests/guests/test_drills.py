# SPDX-License-Identifier: Apache-2.0
"""What `make soak` does at length, in short: drills, and migrations back and forth."""

import contextlib
from typing import ClassVar

from nova_dmigrate.migration.summary import CANCELLED
from tests import base
from tests.lab import database_image, processes
from tests.lab.demo.drills import CANCEL, PHASES, Drill, Outcome, carry_out
from tests.lab.demo.scene import Scene, small_scene
from tests.lab.demo.soak import WARM_UP, soak


class TestDrills(base.TestCase):
    """The tests share hosts and a guest, wherever each of them leaves it."""

    _class: ClassVar[contextlib.ExitStack]
    _scene: ClassVar[Scene | None]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(database_image.unavailable())
        cls._class = contextlib.ExitStack()
        cls._scene = None

    @classmethod
    def tearDownClass(cls) -> None:
        cls._class.close()
        super().tearDownClass()

    def setUp(self) -> None:
        super().setUp()
        self.addOnException(lambda _: self._give_up())
        if self._scene is None:
            directory = self._class.enter_context(processes.workspace())
            type(self)._scene = self._class.enter_context(small_scene(directory))
        assert self._scene is not None
        self.scene = self._scene

    def _give_up(self) -> None:
        """What a failed test leaves behind is not the next one's trouble."""
        if self._scene is not None:
            print(self._scene.services.last_words())
        type(self)._scene = None
        self._class.close()

    def drill(self, victim: str, phase: str, once_more: bool = True) -> Outcome:
        outcome = carry_out(Drill(victim, phase), self.scene, once_more)
        self.assertEqual((), outcome.trouble, str(outcome))
        return outcome

    def way(self, victim: str, phase: str) -> tuple[str, str]:
        """How the migration ended, in a drill."""
        summary = self.drill(victim, phase).summary
        return summary.state, summary.mode

    def test_a_source_relay_killed_in_the_middle(self) -> None:
        self.assertEqual(("completed", "ordinary"), self.way("source relay", "migrating"))

    def test_a_source_relay_killed_when_the_guest_may_switch_over(self) -> None:
        self.assertEqual(("completed", "ordinary"), self.way("source relay", "converging"))

    def test_a_destination_relay_killed_before_it_is_needed(self) -> None:
        way = self.way("destination relay", "starting relays")
        self.assertEqual(("completed", "ordinary"), way)

    def test_a_source_service_killed_in_the_middle(self) -> None:
        self.assertEqual(("completed", "dmigrate"), self.way("source service", "migrating"))

    def test_a_source_service_killed_when_the_guest_may_switch_over(self) -> None:
        self.assertEqual(("completed", "dmigrate"), self.way("source service", "converging"))

    def test_a_destination_service_killed_when_relays_start(self) -> None:
        self.drill("destination service", "starting relays")

    def test_an_agent_killed_while_it_prepares(self) -> None:
        self.drill("agent", "starting relays")

    def test_a_database_server_killed_in_the_middle(self) -> None:
        self.assertEqual(("completed", "dmigrate"), self.way("database server", "migrating"))

    def test_a_broker_killed_in_the_middle(self) -> None:
        self.assertEqual(("completed", "dmigrate"), self.way("broker", "migrating"))

    def test_a_libvirtd_killed_in_the_middle(self) -> None:
        for victim in ("source libvirtd", "destination libvirtd"):
            with self.subTest(victim=victim):
                self.drill(victim, "migrating")

    def test_what_else_is_killed_when_the_guest_may_switch_over(self) -> None:
        victims = ("destination relay", "destination service", "agent", "broker", "database server")
        for victim in victims:
            with self.subTest(victim=victim):
                self.drill(victim, "converging", once_more=victim == victims[-1])

    def test_a_migration_cancelled_in_any_phase(self) -> None:
        for phase in PHASES:
            with self.subTest(phase=phase):
                outcome = self.drill(CANCEL, phase, once_more=phase == PHASES[-1])
                self.assertEqual(CANCELLED, outcome.summary.state)

    def test_migrations_back_and_forth_leave_nothing_behind(self) -> None:
        done = soak(self.scene, WARM_UP + 4)
        self.assertEqual((), done.trouble, f"\n{done.table}")
