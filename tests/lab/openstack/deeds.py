# SPDX-License-Identifier: Apache-2.0
"""What rows do with a database server: its live migrations, alone, with others, and in trouble.

A deed says what must be true, is called with a scene, and says what was.
"""

import dataclasses
from typing import Any, Protocol

from tests.lab.openstack.client import Order
from tests.lab.openstack.move import COMPLETED
from tests.lab.openstack.scene import Scene
from tests.lab.openstack.troubles import Trouble, no_trouble
from tests.lab.openstack.truths import Truth
from tests.lab.openstack.working import Migration, Run

#: MB/s of networks on which there is time in mid-migration for something to happen, and on which a
#: server that changes its memory comes over although all of it is sent.
SLOW, FAST = 8.0, 50.0


@dataclasses.dataclass(frozen=True)
class Done:
    """``was``: what became of it, in a sentence; ``wrong``: what of it must not be; ``run``: what
    a migration has cost.
    """

    was: str
    wrong: list[str]
    run: Run | None = None


class Deed(Protocol):
    """As a text: what must be true of it afterwards."""

    def __call__(self, scene: Scene) -> Done:
        """Do it.

        :raises Exception: it could not be carried out; the scene has to be mended.
        """


@dataclasses.dataclass(frozen=True)
class Migrated:
    """The server is live-migrated.

    :ivar trouble: goes on meanwhile.
    :ivar network: MB/s; None for what the scene has.
    """

    mode: str
    truth: Truth
    trouble: Trouble = no_trouble
    network: float | None = None

    def __str__(self) -> str:
        return str(self.truth)

    def __call__(self, scene: Scene) -> Done:
        with scene.network(self.network), self.trouble(scene):
            move, run = scene.working.migrate(self.mode, f"Nova, {scene.storage}")
        # What has gone on besides is part of what it has cost: no table compares that
        counts = run["completed"] and self.trouble is no_trouble
        return Done(str(move), self.truth.lies(move), run if counts else None)


@dataclasses.dataclass(frozen=True)
class Emptied:
    """All servers of the host are live-migrated at once: the database server, another one with a
    database, and one that has nothing that could be asked.

    :ivar truth: about both database servers.
    """

    mode: str
    truth: Truth

    def __str__(self) -> str:
        return f"the host is empty; both database servers: {self.truth}; the other one: completed"

    def __call__(self, scene: Scene) -> Done:
        client, source = scene.cloud.client, scene.here
        with scene.neighbour() as other, scene.companion() as companion:
            migrations: list[Migration] = []
            orders: list[Order] = []

            def order_others() -> None:
                migrations.append(Migration(scene.cloud, companion.server))
                orders.append(Order(client, other))

            move, _ = scene.working.migrate(
                self.mode, f"Nova, {scene.storage}", ordered=order_others
            )
            second = migrations[0].end(told=True)
            status = orders[0].wait()
            wrong = self.truth.lies(move) + self._other_lies(scene, other, status)
            wrong += [f"the second database server: {each}" for each in self.truth.lies(second)]
            if source.guests():
                wrong.append(f"there are still servers on {source.name}")
        return Done(f"{move}; {second}; the other one: {status}", wrong)

    @staticmethod
    def _other_lies(scene: Scene, other: Any, status: str) -> list[str]:
        wrong = [] if status == COMPLETED else [f"Nova says {status} of the other one"]
        told = [each for each in scene.cloud.client.events(other) if "dmigrate" in each]
        return wrong + ([f"DMigrate tells of the other one: {told}"] if told else [])
