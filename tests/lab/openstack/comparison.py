# SPDX-License-Identifier: Apache-2.0
"""What a database has in memory after its migrations, and what its volume has."""

import dataclasses

from tests.lab.openstack.deeds import Done
from tests.lab.openstack.scene import Scene
from tests.lab.openstack.sql import checksums, table_errors, wait_until_filled
from tests.lab.openstack.truths import Truth
from tests.lab.openstack.working import DMIGRATE, Migration


@dataclasses.dataclass(frozen=True)
class Compared:
    """The database does nothing, its tables are checked, it migrates once more, and is started
    anew from its volume.

    :ivar truth: about that migration.
    """

    truth: Truth

    def __str__(self) -> str:
        return (
            "no table has errors, and each has the same checksum on the other host and from the"
            f" volume; the migration: {self.truth}"
        )

    def __call__(self, scene: Scene) -> Done:
        server = scene.working.server
        with scene.working.at_rest():
            wrong = [f"CHECK TABLE: {line}" for line in table_errors(server)]
            before = checksums(server)
            scene.working.choose(DMIGRATE)
            move = Migration(scene.cloud, scene.server).end(told=True)
            moved = checksums(server)
            scene.reboot()
            wait_until_filled(server)
            restarted = checksums(server)
        scene.working.wait_for_commit()
        wrong += [
            f"CHECKSUM TABLE {name}: {checksum}, {where} {found.get(name)}"
            for where, found in (("on the other host", moved), ("from the volume", restarted))
            for name, checksum in before.items()
            if found.get(name) != checksum
        ]
        for run in scene.runs:
            run["check_ok"] = not wrong
        return Done(f"{move}; {len(before)} tables", wrong + self.truth.lies(move))
