# SPDX-License-Identifier: Apache-2.0
"""What `make soak` does at length, in short: drills, and migrations back and forth."""

import contextlib
from typing import ClassVar

from nova_dmigrate.migration.summary import COMPLETED, DMIGRATE, ORDINARY
from tests import base
from tests.lab import database_image, processes
from tests.lab.demo.drills import CANCEL, CONVERGING, MATRIX, MIGRATING, Drill, carry_out
from tests.lab.demo.scene import Scene, small_scene
from tests.lab.demo.soak import WARM_UP, soak

#: How a migration ends, by victim and phase, where that is certain; elsewhere `carry_out` knows the
#: states that it may come to.
_WAYS = {
    ("source relay", MIGRATING): (COMPLETED, ORDINARY),
    ("source relay", CONVERGING): (COMPLETED, ORDINARY),
    ("destination relay", "starting relays"): (COMPLETED, ORDINARY),
    ("source service", MIGRATING): (COMPLETED, DMIGRATE),
    ("database server", MIGRATING): (COMPLETED, DMIGRATE),
    ("broker", MIGRATING): (COMPLETED, DMIGRATE),
}
#: Some of what `make soak` does whole: each victim, and each phase.
_PHASES: dict[str, tuple[str, ...]] = {
    "source relay": (MIGRATING, CONVERGING),
    "destination relay": ("starting relays",),
    "source service": (MIGRATING,),
    "destination service": ("checking",),
    "agent": ("waiting",),
    "broker": (MIGRATING,),
    "database server": (MIGRATING,),
    "source libvirtd": (MIGRATING,),
    "destination libvirtd": (CONVERGING,),
    CANCEL: (CONVERGING,),
}
_DRILLS = [Drill(victim, phase) for victim, phases in _PHASES.items() for phase in phases]


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

    def drill(self, victim: str) -> None:
        """Kill it in one phase after the other, and once more migrate at the end."""
        drills = [each for each in _DRILLS if each.victim == victim]
        for drill in drills:
            with self.subTest(str(drill)):
                outcome = carry_out(drill, self.scene, once_more=drill == drills[-1])
                self.assertEqual((), outcome.trouble, str(outcome))
                found = outcome.summary.state, outcome.summary.mode
                self.assertEqual(_WAYS.get((victim, drill.phase), found), found, str(outcome))

    def test_each_victim_is_drilled(self) -> None:
        self.assertEqual({each.victim for each in MATRIX}, set(_PHASES))
        self.assertEqual({each.phase for each in MATRIX}, {each.phase for each in _DRILLS})
        self.assertEqual(set(), set(_DRILLS) - set(MATRIX))

    def test_a_source_relay_is_killed(self) -> None:
        self.drill("source relay")

    def test_a_destination_relay_is_killed(self) -> None:
        self.drill("destination relay")

    def test_a_source_service_is_killed(self) -> None:
        self.drill("source service")

    def test_a_destination_service_is_killed(self) -> None:
        self.drill("destination service")

    def test_an_agent_is_killed(self) -> None:
        self.drill("agent")

    def test_a_broker_is_killed(self) -> None:
        self.drill("broker")

    def test_a_database_server_is_killed(self) -> None:
        self.drill("database server")

    def test_a_source_libvirtd_is_killed(self) -> None:
        self.drill("source libvirtd")

    def test_a_destination_libvirtd_is_killed(self) -> None:
        self.drill("destination libvirtd")

    def test_a_migration_is_cancelled(self) -> None:
        self.drill(CANCEL)

    def test_migrations_back_and_forth_leave_nothing_behind(self) -> None:
        done = soak(self.scene, WARM_UP + 4)
        self.assertEqual((), done.trouble, f"\n{done.table}")
