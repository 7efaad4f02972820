# SPDX-License-Identifier: Apache-2.0
"""What `make openstack` does, row by row, and what must be true after each."""

import dataclasses
from typing import Any

from tests.lab.openstack.scene import CEPH, Scene
from tests.lab.openstack.truths import Truth, Way, described, places
from tests.lab.openstack.working import DMIGRATE, STOCK


@dataclasses.dataclass(frozen=True)
class Result:
    """``must``, ``was``: in sentences; ``wrong``: what of it must not be."""

    row: str
    must: str
    was: str
    wrong: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        verdict = f"WRONG: {'; '.join(self.wrong)}" if self.wrong else "ok"
        return f"{self.row}: {verdict} (must be: {self.must}; was: {self.was})"


@dataclasses.dataclass(frozen=True)
class Row:
    """The database server on a storage is migrated under load.

    :ivar truth: what must be true then.
    """

    name: str
    storage: str
    mode: str
    truth: Truth


ROWS = tuple(
    Row(f"{CEPH}, {name} {way}", CEPH, mode, truth)
    for name, mode, truth in (
        ("stock", STOCK, Truth(Way.STOCK)),
        ("DMigrate", DMIGRATE, Truth(Way.VOLUME)),
    )
    for way in ("there", "back")
)


def carry_out(row: Row, scene: Scene) -> Result:
    """Carry out a row, and look at what must be true after any of them."""
    try:
        move, run = scene.working.migrate(row.mode, f"Nova, {row.storage}")
        if run["completed"]:
            scene.runs.append(run)
        was, wrong = described(move), row.truth.lies(move) + _always_wrong(scene)
    except Exception as error:  # noqa: BLE001 - the others are to be carried out as well
        was, wrong = "not carried out to its end", [f"{type(error).__name__}: {error}"]
    return Result(row.name, str(row.truth), was, tuple(wrong))


def check(scene: Scene) -> Result:
    """Look at the data of a scene, whose rows have all been carried out."""
    wrong = scene.wrong_with_data()
    for run in scene.runs:
        run["check_ok"] = not wrong
    commits = scene.working.ledger.acknowledged()
    return Result(
        f"{scene.storage}, the data at the end",
        "no table has errors, no commit is lost",
        f"{commits} commits were acknowledged",
        tuple(wrong),
    )


def _always_wrong(scene: Scene) -> list[str]:
    """What of a server must never be: that it is in two places, or has lost commits."""
    found = places(scene.cloud, scene.server)
    here = scene.cloud.client.host_of(scene.server)
    wrong = [] if found == [here] else [f"Nova has it on {here}, libvirt on {found}"]
    return wrong + scene.wrong_with_ledger()
